"""Objects by obstore: the port's promises against an HTTP server with faults and against a store with conditions."""

import hashlib
import random
import socket
from pathlib import Path

import pytest
from obstore.store import MemoryStore

from helios.mesh.errors import BlobNotFound, InvalidRequest, PermissionDenied, Unavailable
from helios.mesh.transfer.engine import Downloader
from helios.mesh.transfer.objects import ObjectSource, open_object_store
from helios.mesh.transfer.order import Transfer, Wanted
from helios.mesh.transfer.source import SourceChanged, SourceState
from tests.mesh.transfer.blob_server import Answer, serve_blob
from tests.mesh.transfer.test_engine import CHUNK, OPTIONS

CONTENT = random.Random(7).randbytes(9 * CHUNK + 5)
WANTED = Wanted(len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
CLIENT = {"allow_http": True}


def test_an_object_is_fetched_in_ranges(tmp_path: Path) -> None:
    store = MemoryStore()
    store.put("a/blob", CONTENT)
    result = Downloader(OPTIONS).fetch(Transfer(ObjectSource(store, "a/blob"), tmp_path / "blob", WANTED))
    assert (tmp_path / "blob").read_bytes() == CONTENT
    assert result.etag


def test_faults_cost_retries_and_no_byte(tmp_path: Path) -> None:
    faults = iter([Answer(status=500), Answer(cut_bytes=1000), Answer(status=429)])
    with serve_blob(CONTENT) as blob:
        blob.script = lambda _: next(faults, Answer())
        source = ObjectSource(open_object_store(blob.url.removesuffix("/blob"), client=CLIENT), "blob")
        Downloader(OPTIONS).fetch(Transfer(source, tmp_path / "blob", WANTED))
        assert len(blob.ranges) > len(set(blob.ranges))
    assert (tmp_path / "blob").read_bytes() == CONTENT


def test_an_object_that_is_replaced_is_not_mixed() -> None:
    store = MemoryStore()
    store.put("blob", CONTENT)
    source = ObjectSource(store, "blob")
    state = source.describe()
    store.put("blob", CONTENT[::-1])
    with pytest.raises(SourceChanged):
        source.read(state, 0, 10, lambda _: None)


def test_an_option_that_makes_no_sense_is_not_quoted() -> None:
    with pytest.raises(InvalidRequest) as caught:
        open_object_store("gs://bucket", options={"google_service_account_key": '"secret"'})
    assert "secret" not in str(caught.value)
    assert caught.value.__suppress_context__, "a log would have the cause's text"


def test_errors_are_the_meshs() -> None:
    with pytest.raises(BlobNotFound):
        ObjectSource(MemoryStore(), "nothing").describe()
    with pytest.raises(InvalidRequest, match="can't be opened"):
        open_object_store("nowhere://bucket")
    with pytest.raises(InvalidRequest):
        open_object_store("s3://bucket", options={"no_such_option": "1"})


@pytest.mark.parametrize(("status", "error"), [(500, Unavailable), (429, Unavailable), (403, PermissionDenied)])
def test_what_a_server_refuses(status: int, error: type[Exception], tmp_path: Path) -> None:
    with serve_blob(CONTENT) as blob:
        source = ObjectSource(open_object_store(blob.url.removesuffix("/blob"), client=CLIENT), "blob")
        blob.script = lambda _: Answer(status=status)
        with pytest.raises(error):
            source.read(state=_state(), offset=0, length=10, sink=lambda _: None)
        assert len(blob.requests) == 1, "trying again is the engine's"


def test_a_store_that_is_not_there_is_unavailable() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(Unavailable):
            ObjectSource(open_object_store(url, client=CLIENT), "blob").describe()


def _state() -> SourceState:
    return SourceState(len(CONTENT), etag='"one"')
