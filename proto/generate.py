"""Generates `gen/` from the contracts (`make gen`): Python code with types, and the descriptor set that Envoy loads.

Everything comes from PyPI packages. googleapis' own protos (google/api/…) are laid out from googleapis-common-protos,
whose generated code is what runs, under build/googleapis, where buf.yaml looks for them. The result depends on nothing
but the contracts and the locked versions, so a check can generate once more and compare.
"""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GOOGLEAPIS = ROOT / "build" / "googleapis"
DESCRIPTORS = Path("gen/helios/api/descriptors.pb")
# No contract names them, but every error carries them: Envoy's transcoder and reflection clients need them to show it.
_ERROR_PROTOS = ("google/rpc/error_details.proto", "google/rpc/status.proto")
_IMPORT = re.compile(r'^import (?:public )?"(google/(?!protobuf/)[^"]+)";', re.MULTILINE)


def main() -> None:
    """Writes gen/."""
    lay_out_googleapis(ROOT / "proto", GOOGLEAPIS)
    generate(ROOT)


def generate(out: Path) -> None:
    """Writes `<out>/gen`, replacing what is there; needs build/googleapis."""
    buf("generate", "--output", str(out))
    (out / DESCRIPTORS).parent.joinpath("py.typed").touch()
    # Without source info: comments are half of the bytes, and Envoy reads the file at every start.
    buf("build", "--as-file-descriptor-set", "--exclude-source-info", "--output", str(out / DESCRIPTORS))


def lay_out_googleapis(protos: Path, target: Path) -> None:
    """Copies the google/… protos that `protos` import, directly or not, from the installed package to `target`.

    What else lies there is removed: it would end up in the descriptor set.
    """
    package = _package_directory()
    wanted = [*_ERROR_PROTOS]
    wanted += [name for path in sorted(protos.rglob("*.proto")) for name in _IMPORT.findall(path.read_text())]
    done: set[str] = set()
    while wanted:
        name = wanted.pop()
        if name in done:
            continue
        done.add(name)
        text = (package / name).read_text()
        copy = target / name
        if not copy.exists() or copy.read_text() != text:
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(package / name, copy)
        wanted += _IMPORT.findall(text)
    for path in target.rglob("*.proto"):
        if path.relative_to(target).as_posix() not in done:
            path.unlink()


def buf(*arguments: str, directory: Path = ROOT) -> None:
    """Runs buf in `directory`.

    Raises:
        subprocess.CalledProcessError: with what buf printed in `output`.
    """
    command = [str(ROOT / ".venv" / "bin" / "buf"), *arguments]
    done = subprocess.run(
        command, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode != 0:
        raise subprocess.CalledProcessError(done.returncode, command, output=done.stdout)


def _package_directory() -> Path:
    """Returns the folder that holds google/api and google/rpc of googleapis-common-protos."""
    spec = importlib.util.find_spec("google.api.annotations_pb2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("googleapis-common-protos is not installed: run `make setup`")
    return Path(spec.origin).parent.parent.parent


if __name__ == "__main__":
    main()
