"""buf's own checks: style and comments, generated code that fits the contracts, compatibility with what was there."""

import filecmp
import io
import subprocess
import tarfile
from pathlib import Path

import pytest

from proto.generate import GOOGLEAPIS, ROOT, buf, generate, lay_out_googleapis

# From here on contracts only grow. A break that has to be moves this date, and the commit that moves it says why.
COMPATIBLE_SINCE = "2026-11-22T06:00:00Z"
# States in which KvCacheNews was for two minutes, before anything spoke it: nobody is to be compatible with it as it
# was thought of first.
TAKEN_BACK = frozenset({"9ff30d5ae2754de3da55087ab305b7ae3f9c7009", "17025a12429a1b810edee40bb1a923c65804569f"})
RULES = '{"version": "v2", "breaking": {"use": ["FILE"]}}'


def git(*arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=True, timeout=60).stdout


def test_contracts_pass_lint_and_are_commented(googleapis: None) -> None:
    try:
        buf("lint")
    except subprocess.CalledProcessError as error:
        pytest.fail(error.output)
    # The check above is only as good as its configuration.
    rules = (ROOT / "buf.yaml").read_text()
    assert "- STANDARD" in rules
    assert "- COMMENTS" in rules


def test_contracts_are_formatted(googleapis: None) -> None:
    try:
        buf("format", "proto", "--diff", "--exit-code")
    except subprocess.CalledProcessError as error:
        pytest.fail(error.output)


def test_generated_code_is_what_the_contracts_give(googleapis: None, tmp_path: Path) -> None:
    """Runs the generators into another folder and compares every byte."""
    generate(tmp_path)
    fresh, committed = (
        {path.relative_to(root): path for path in (root / "gen").rglob("*") if is_generated(path)}
        for root in (tmp_path, ROOT)
    )
    assert fresh.keys() == committed.keys(), "files were added or removed: run make gen"
    differing = [str(name) for name in fresh if not filecmp.cmp(fresh[name], committed[name], shallow=False)]
    assert not differing, "run make gen"


def is_generated(path: Path) -> bool:
    return path.is_file() and path.suffix != ".pyc"


def earlier_states() -> list[str]:
    """Names the commits whose contracts today's must be compatible with.

    HEAD, for changes that are not committed yet; the state at COMPATIBLE_SINCE; and every change of the contracts since
    then. A shallow clone or a new repository has fewer of them, or none.
    """
    of_contracts = ["HEAD", "--", "proto/helios"]
    commits = git("rev-list", "--max-count=1", *of_contracts).split()
    commits += git("rev-list", "--max-count=1", f"--before={COMPATIBLE_SINCE}", *of_contracts).split()
    commits += git("rev-list", "--max-count=40", f"--since={COMPATIBLE_SINCE}", *of_contracts).split()
    return [name for commit in dict.fromkeys(commits) if (name := commit.decode()) not in TAKEN_BACK]


def test_contracts_stay_compatible(googleapis: None, tmp_path: Path) -> None:
    """No field, RPC, service or file goes away or changes its meaning (buf's FILE rules)."""
    states = earlier_states() if (ROOT / ".git").exists() else []
    if not states:
        pytest.skip("no commit here holds contracts")
    now = tmp_path / "now.binpb"
    buf("build", "--output", str(now))
    for state in states:
        before = tmp_path / state
        with tarfile.open(fileobj=io.BytesIO(git("archive", "--format=tar", state, "proto/helios"))) as archive:
            archive.extractall(before, filter="data")
        lay_out_googleapis(before / "proto", before / GOOGLEAPIS.relative_to(ROOT))
        (before / "buf.yaml").write_text((ROOT / "buf.yaml").read_text())
        image = tmp_path / f"{state}.binpb"
        buf("build", "--output", str(image), directory=before)
        try:
            # Images, because the two workspaces have two modules each, which buf would compare one by one.
            buf("breaking", str(now), "--against", str(image), "--exclude-imports", "--config", RULES)
        except subprocess.CalledProcessError as error:
            pytest.fail(f"against {state}:\n{error.output}")
