"""KV blocks on disk stay within their bound, the newest ones longest."""

import asyncio
import os
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from helios.worker.replica.kv_disk import BlockFile, keep_within, superfluous

FILES = st.lists(st.tuples(st.integers(1, 100), st.floats(0, 100)), max_size=30).map(
    lambda said: [BlockFile(Path(str(number)), size, at) for number, (size, at) in enumerate(said)]
)


@given(FILES, st.integers(1, 2000))
def test_what_stays_is_within_the_bound_and_no_older_than_what_goes(files: list[BlockFile], limit: int) -> None:
    gone = superfluous(files, limit)
    kept = [file for file in files if file not in gone]
    assert sum(file.size_bytes for file in kept) <= 0.9 * limit
    if gone and kept:
        assert max(file.written_at for file in gone) <= min(file.written_at for file in kept)
    if sum(file.size_bytes for file in files) <= 0.9 * limit:
        assert not gone


async def test_the_oldest_blocks_go_and_the_tier_s_own_file_stays(tmp_path: Path) -> None:
    directory = tmp_path / "model_digest" / "00"
    directory.mkdir(parents=True)
    (directory.parent / "config.json").write_bytes(b"x" * 5000)
    (directory / "half.tmp").write_bytes(b"x" * 5000)
    for number in range(10):
        block = directory / f"{number}.bin"
        block.write_bytes(b"x" * 1000)
        os.utime(block, (number, number))
    async with asyncio.TaskGroup() as group:
        keeper = group.create_task(keep_within(tmp_path, 8000))
        async with asyncio.timeout(10):
            while (directory / "3.bin").exists():
                await asyncio.sleep(0.01)
        keeper.cancel()
    left = sorted(file.name for file in directory.parent.rglob("*") if file.is_file())
    assert left == ["4.bin", "5.bin", "6.bin", "7.bin", "8.bin", "9.bin", "config.json", "half.tmp"]


async def test_a_directory_that_is_not_there_yet_is_waited_for(tmp_path: Path) -> None:
    async with asyncio.TaskGroup() as group:
        keeper = group.create_task(keep_within(tmp_path / "later", 1))
        await asyncio.sleep(0.1)
        assert not keeper.done()
        keeper.cancel()
