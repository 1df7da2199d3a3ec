"""Two models on few cores: one starts while the other one streams."""

import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from tests.scenarios.running_mesh import MODEL, QUESTION, RunningMesh

NEIGHBOUR: Final = "neighbour"
# Half a minute of a core; a start beside it takes two seconds.
TOKENS: Final = 1500


def test_a_start_beside_a_stream_does_not_wait_for_its_end(mesh: RunningMesh, smollm2_directory: Path) -> None:
    added = mesh.helios("models", "add", NEIGHBOUR, str(smollm2_directory))
    assert added.returncode == 0, added.stdout + added.stderr
    try:
        # Their files are on the node, and the first one runs.
        for name in (NEIGHBOUR, MODEL):
            assert mesh.chat(model=name).status == 200
        assert mesh.helios("scale", NEIGHBOUR, "0").returncode == 0
        mesh.wait(lambda: [one["model"] for one in mesh.replicas()] == [MODEL], 60, "the first model is alone")
        document = {"model": MODEL, "messages": QUESTION, "max_tokens": TOKENS, "ignore_eos": True, "stream": True}
        request = urllib.request.Request(f"http://{mesh.edge}/v1/chat/completions", json.dumps(document).encode())
        request.add_header("content-type", "application/json")
        with ThreadPoolExecutor(1) as pool, urllib.request.urlopen(request, timeout=120) as stream:
            assert stream.readline().startswith(b"data:")
            asked = pool.submit(mesh.chat, model=NEIGHBOUR, max_tokens=4)
            has_ended = False
            while not asked.done() and not has_ended:
                has_ended = b"[DONE]" in stream.readline()
        # The rest of the stream is left: nobody wants it.
        assert asked.result().status == 200
        assert not has_ended, mesh.helios("why", "--last", NEIGHBOUR).stdout
    finally:
        mesh.helios("scale", NEIGHBOUR, "0")
        assert mesh.helios("models", "rm", NEIGHBOUR).returncode == 0
