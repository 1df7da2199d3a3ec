"""The hub of the tests is a hub: huggingface_hub's own client, made for the real one, gets on with it."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import tqdm  # type: ignore[import-untyped]
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.emulators.hugging_face import hugging_face

FILES = {"config.json": b"{}", "deep/er/notes.txt": b"n", "model.safetensors": bytes(range(256)) * 100, "empty": b""}


# Its thread would be left behind.
tqdm.tqdm.monitor_interval = 0


async def _call(function: Callable[..., Any], *arguments: object, **more: object) -> Any:
    return await asyncio.to_thread(function, *arguments, **more)


async def test_its_own_client_downloads_the_same_files(tmp_path: Path) -> None:
    async with hugging_face() as hub:
        commit = hub.repository("org/m", FILES).commits[-1][0]
        hub.page_size = 2
        directory = await _call(
            huggingface_hub.snapshot_download, "org/m", endpoint=hub.endpoint, cache_dir=tmp_path, token=False
        )
        found = {path: (Path(directory) / path).read_bytes() for path in FILES}
        assert found == FILES
        assert Path(directory).name == commit
        info = await _call(huggingface_hub.HfApi(endpoint=hub.endpoint, token=False).model_info, "org/m")
        assert info.sha == commit
        huggingface_hub.close_session()


async def test_its_own_client_finds_its_errors(tmp_path: Path) -> None:
    async with hugging_face() as hub:
        hub.tokens = {"good", "other"}
        hub.repository("org/open", FILES)
        hub.repository("org/private", FILES, is_private=True, tokens=frozenset({"good"}))
        hub.repository("org/gated", FILES, is_gated=True, tokens=frozenset({"good"}))
        cases: list[tuple[type[Exception], str, str, str | bool, str | None]] = [
            (RepositoryNotFoundError, "org/none", "config.json", False, None),
            (RepositoryNotFoundError, "org/none", "config.json", "good", None),
            (RepositoryNotFoundError, "org/private", "config.json", False, None),
            (RepositoryNotFoundError, "org/private", "config.json", "other", None),
            (GatedRepoError, "org/gated", "config.json", False, None),
            (GatedRepoError, "org/gated", "config.json", "other", None),
            (RevisionNotFoundError, "org/open", "config.json", False, "nowhere"),
            (RemoteEntryNotFoundError, "org/open", "nothing.json", False, None),
            (HfHubHTTPError, "org/open", "config.json", "expired", None),
        ]
        for expected, repository, path, token, revision in cases:
            with pytest.raises(expected):
                await _call(
                    huggingface_hub.hf_hub_download,
                    repository,
                    path,
                    revision=revision,
                    endpoint=hub.endpoint,
                    cache_dir=tmp_path / f"{repository}{token}{revision}",
                    token=token,
                )
        for repository in ("org/private", "org/gated"):
            await _call(
                huggingface_hub.hf_hub_download,
                repository,
                "model.safetensors",
                endpoint=hub.endpoint,
                cache_dir=tmp_path,
                token="good",
            )
        assert hub.leaked == []
        huggingface_hub.close_session()
