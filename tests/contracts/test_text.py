"""What committed text must not hold: paths of one machine, addresses of package registries, secrets."""

import re
import subprocess

from proto.generate import ROOT

# Put together from parts, so that this file passes its own test.
MACHINE_PATHS = ["/" + name + "/" for name in ("work", "opt/wheels", "opt/pypi", "root", "home/[a-z]+")]
REGISTRY_HOSTS = [r"\.".join(host) for host in (("pypi", "org"), ("pythonhosted", "org"), ("npmjs", "org"))]
REGISTRY_HOSTS += [r"\.".join(host) for host in (("deb", "debian", "org"), ("npmjs", "com"), ("yarnpkg", "com"))]
SECRETS = ["-----BEGIN " + "(?:[A-Z]+ )?PRIVATE KEY", "hf_" + "[A-Za-z0-9]{30,}", "AKIA" + "[A-Z0-9]{16}"]
# Text is about the project, whoever or whatever wrote it.
AUTHORS = [r"(?i:\b" + word + r"\b)" for word in ("clau" + "de", "co-authored" + "-by", "as an ai" + " language model")]
# Absolute paths only: what stands before one is a quote, a bracket, a separator or nothing.
PATTERN = re.compile(
    "|".join([rf"(?<![^\s\"'`(\[=:,]){path}" for path in MACHINE_PATHS] + REGISTRY_HOSTS + SECRETS + AUTHORS)
)
BINARY = {".pb", ".png", ".gguf", ".safetensors"}


def test_tracked_files_name_no_machine_and_no_registry() -> None:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, timeout=60).stdout
    found = []
    for name in listing.decode().split("\0"):
        path = ROOT / name
        if name and path.suffix not in BINARY and path.is_file():
            for number, line in enumerate(path.read_text().splitlines(), start=1):
                found += [f"{name}:{number}: {match[0]}" for match in PATTERN.finditer(line)]
    assert not found, "\n".join(found)


def test_locks_hold_versions_and_hashes_only() -> None:
    """A lock that names where a package came from installs nowhere else."""
    allowed = re.compile(r"#.*|[a-z0-9-]+(\[[a-z0-9,-]+\])?==\S+ \\|    --hash=sha256:[0-9a-f]{64}( \\)?")
    for path in sorted((ROOT / "requirements").glob("*.lock")):
        wrong = [line for line in path.read_text().splitlines() if not allowed.fullmatch(line)]
        assert not wrong, f"{path.name}: {wrong[:3]}"
    package_lock = (ROOT / "tests" / "scenarios" / "node" / "package-lock.json").read_text()
    assert '"resolved"' not in package_lock
