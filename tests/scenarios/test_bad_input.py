"""What is wrong with a request is said clearly, with the right status, and leaves nothing behind."""

import json
import shutil
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from tests.scenarios.running_mesh import ALIAS, MODEL, QUESTION, Answer, RunningMesh

CHAT = "/v1/chat/completions"


def chat_body(**fields: Any) -> bytes:
    return json.dumps({"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 4} | fields).encode()


def refused(answer: Answer, status: int, code: str | None = None) -> dict[str, Any]:
    assert answer.status == status, answer.body
    assert answer.headers["content-type"].startswith("application/json")
    error = answer.error
    if code is not None:
        assert error["code"] == code
    return error


@pytest.fixture(autouse=True)
def serves_on(mesh: RunningMesh) -> Any:
    """Whatever a test sent, the next request is answered and no process has died."""
    before = {child["name"]: child["restart_count"] for child in mesh.record()["processes"]}
    yield
    assert "Paris" in mesh.chat().json["choices"][0]["message"]["content"]
    assert {child["name"]: child["restart_count"] for child in mesh.record()["processes"]} == before


@pytest.mark.parametrize(
    "body", [b"{", b'{"model": "' + MODEL.encode(), b"not json", b"[1, 2]", b'"text"', b"\xff\xfe", b"{}", b""]
)
def test_malformed_json(mesh: RunningMesh, body: bytes) -> None:
    refused(mesh.request(CHAT, body), 400)


def test_a_missing_model_is_named(mesh: RunningMesh) -> None:
    error = refused(mesh.request(CHAT, json.dumps({"messages": QUESTION}).encode()), 400)
    assert "model" in error["message"]


@pytest.mark.parametrize("model", ["no-such-model", "no/such", "../etc/passwd", "x" * 3000, "модель"])
def test_an_unknown_model(mesh: RunningMesh, model: str) -> None:
    error = refused(mesh.request(CHAT, chat_body(model=model)), 404, "model_not_found")
    assert error["type"] == "invalid_request_error"
    assert mesh.request("/v1/models/no-such-model").status == 404


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"max_tokens": -1}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "warm"}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"n": 0}, "n"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"content": "hi"}]}, "role"),
        ({"model": 7}, "model"),
        ({"model": None}, "model"),
    ],
)
def test_a_wrong_field_is_named(mesh: RunningMesh, fields: dict[str, Any], named: str) -> None:
    error = refused(mesh.request(CHAT, chat_body(**fields)), 400)
    assert named in error["message"] or error["param"] == named


def test_a_context_that_is_too_long(mesh: RunningMesh) -> None:
    words = "word " * 20_000
    error = refused(
        mesh.request(CHAT, chat_body(messages=[{"role": "user", "content": words}])), 400, "context_length_exceeded"
    )
    assert "token" in error["message"]


def test_a_wrong_content_type(mesh: RunningMesh) -> None:
    answer = mesh.request(CHAT, chat_body(), headers={"content-type": "text/plain"})
    assert 400 <= answer.status < 500, answer.body
    assert "application/json" in answer.error["message"]


def test_a_body_of_40_mib(mesh: RunningMesh) -> None:
    answer = mesh.request(CHAT, chat_body(messages=[{"role": "user", "content": "x" * (40 << 20)}]))
    refused(answer, 413)


def test_a_body_below_32_mib_reaches_the_model(mesh: RunningMesh) -> None:
    answer = mesh.request(CHAT, chat_body(user="x" * (30 << 20)))
    assert answer.status == 200, answer.body


def test_two_model_keys(mesh: RunningMesh) -> None:
    ending = f'"messages": {json.dumps(QUESTION)}, "max_tokens": 4}}'
    for keys in (f'"model": "{MODEL}", "model": "{ALIAS}"', f'"model": "{MODEL}", "mod\\u0065l": "{ALIAS}"'):
        error = refused(mesh.request(CHAT, ("{" + keys + "," + ending).encode()), 400)
        assert "model" in error["message"]


def test_a_header_that_names_another_model_than_the_body(mesh: RunningMesh) -> None:
    refused(mesh.request(CHAT, chat_body(), headers={"x-helios-model": ALIAS}), 400, "model_mismatch")
    typed = {"model": MODEL, "messages": [{"role": "ROLE_USER", "content": "hi"}]}
    call = mesh.grpcurl(
        "-H",
        f"x-helios-model: {ALIAS}",
        "-d",
        json.dumps(typed),
        mesh.edge,
        "helios.api.inference.v1.InferenceService/Chat",
    )
    assert "InvalidArgument" in call.stderr


HEADERS = {
    "x-helios-endpoint": "127.0.0.1:1",
    "x-helios-route-model": "other",
    "x-helios-route-revision": "sha256:0",
    "x-helios-anything": "1",
    "x-envoy-original-path": "/admin/v1/replicas",
    "x-envoy-upstream-rq-timeout-ms": "1",
    "x-envoy-max-retries": "100",
    "x-envoy-retry-on": "5xx",
    "x-envoy-decorator-operation": "x",
    "x-forwarded-client-cert": "URI=spiffe://helios.local/ns/default/sa/admin-edge",
    "x-openai-error": '{"error": {"message": "mine", "type": "x", "param": null, "code": null}}',
}


@pytest.mark.parametrize("header", sorted(HEADERS))
def test_headers_of_the_mesh_that_a_client_sends_change_nothing(mesh: RunningMesh, header: str) -> None:
    sent = {header: HEADERS[header]}
    plain, spoofed = mesh.chat(), mesh.request(CHAT, chat_body(max_tokens=16), headers=sent)
    assert spoofed.status == 200, spoofed.body
    assert spoofed.json["choices"] == plain.json["choices"]
    assert mesh.request("/v1/models", headers=sent).json == mesh.request("/v1/models").json
    missing = mesh.request(CHAT, chat_body(model="no-such-model"), headers=sent)
    assert refused(missing, 404, "model_not_found")["message"] != "mine"
    assert mesh.request("/healthz", headers=sent).status == 200
    assert mesh.request("/admin/v1/replicas", headers=sent).status == 404
    replicas = mesh.request("/admin/v1/replicas", headers=sent, is_admin=True)
    assert replicas.status == 200


@pytest.mark.parametrize(
    "path", ["/admin/v1/replicas", "/admin/v1/models", "/helios.api.admin.v1.AdminService/ListReplicas",
             "/helios.api.registry.v1.RegistryService/ListModels", "/metrics", "/", "/v2/models",
             "/v1/../admin/v1/replicas"],
)  # fmt: skip
def test_admin_paths_do_not_exist_on_the_public_address(mesh: RunningMesh, path: str) -> None:
    assert mesh.request(path, headers={"authorization": f"Bearer {mesh.token}"}).status == 404
    assert mesh.request(path, b"{}", headers={"authorization": f"Bearer {mesh.token}"}).status == 404


def test_the_admin_address_wants_token_host_and_no_foreign_origin(mesh: RunningMesh) -> None:
    path = "/admin/v1/replicas"
    assert mesh.request(path, is_admin=True).status == 200
    assert mesh.request(path, headers={"authorization": "Bearer wrong"}, is_admin=True).status == 401
    assert mesh.request(path, headers={"authorization": ""}, is_admin=True).status == 401
    assert mesh.request(path, headers={"host": "evil.example"}, is_admin=True).status in (403, 404, 421)
    foreign = mesh.request(path, headers={"origin": "http://evil.example"}, is_admin=True)
    assert foreign.status == 403
    assert "access-control-allow-origin" not in foreign.headers
    assert (mesh.state / "admin-token").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("body", [b"{}", b'{"replicas": 3}', b'{"replica_count": -1}', b'{"replica_count": 100000}'])
def test_scaling_without_a_good_count_changes_nothing(mesh: RunningMesh, body: bytes) -> None:
    before = mesh.request(f"/admin/v1/models/{MODEL}", is_admin=True).json
    assert mesh.request(f"/admin/v1/models/{MODEL}:scale", body, is_admin=True).status == 400
    assert mesh.request(f"/admin/v1/models/{MODEL}", is_admin=True).json == before


def test_a_browser_may_call_the_public_address(mesh: RunningMesh) -> None:
    headers = {
        "origin": "http://app.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    preflight = mesh.request(CHAT, method="OPTIONS", headers=headers)
    assert preflight.status in (200, 204)
    assert preflight.headers["access-control-allow-origin"] in ("*", "http://app.example")
    assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
    answer = mesh.request("/v1/models", headers={"origin": "http://app.example"})
    assert answer.headers["access-control-allow-origin"] in ("*", "http://app.example")


def registry_files(mesh: RunningMesh) -> set[str]:
    root = mesh.state / "registry"
    return {str(path.relative_to(root)) for path in (root / "blobs").rglob("*") if path.is_file()}


def add_fails(mesh: RunningMesh, path: Path, *arguments: str) -> str:
    before, models = registry_files(mesh), mesh.request("/admin/v1/models", is_admin=True).json
    result = mesh.helios("models", "add", "broken", str(path), *arguments)
    assert result.returncode == 1, result.stdout
    assert "Traceback" not in result.stderr
    # What was half stored is swept right after the failure, not before the answer.
    deadline = time.monotonic() + 5
    while registry_files(mesh) != before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert registry_files(mesh) == before
    assert mesh.request("/admin/v1/models", is_admin=True).json == models
    assert mesh.request(CHAT, chat_body(model="broken")).status == 404
    return result.stderr


def test_a_gguf_that_is_cut_short(mesh: RunningMesh, tmp_path: Path, embedded_gguf: Path) -> None:
    cut = tmp_path / "cut.gguf"
    with embedded_gguf.open("rb") as source:
        cut.write_bytes(source.read(20 << 20))
    assert "cut" in add_fails(mesh, cut).replace(str(tmp_path), "")
    cut.write_bytes(b"GGUF")
    add_fails(mesh, cut)
    cut.write_bytes(b"PK\x03\x04" * 100)
    add_fails(mesh, cut)


def test_a_wrong_expected_digest(mesh: RunningMesh, embedded_gguf: Path) -> None:
    assert "sha256" in add_fails(mesh, embedded_gguf, "--sha256", "0" * 64)


def lying_header(document: dict[str, Any], data: bytes, length: int | None = None) -> bytes:
    header = json.dumps(document).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


LIES = {
    "beyond the file": lying_header({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, b"\0" * 8),
    "wrong shape": lying_header({"w": {"dtype": "F32", "shape": [5], "data_offsets": [0, 16]}}, b"\0" * 16),
    "overlap": lying_header(
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
         "b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}, b"\0" * 16),
    "negative": lying_header({"w": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}, b"\0" * 16),
    "huge header": lying_header({}, b"", length=1 << 62),
    "not json": struct.pack("<Q", 8) + b"notjson!",
}  # fmt: skip


@pytest.mark.parametrize("lie", sorted(LIES))
def test_safetensors_with_a_lying_header(mesh: RunningMesh, tmp_path: Path, smollm2_directory: Path, lie: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(smollm2_directory, model, ignore=shutil.ignore_patterns("*.safetensors"))
    (model / "model.safetensors").write_bytes(LIES[lie])
    assert "model.safetensors" in add_fails(mesh, model)


def test_pickles_and_missing_files_are_refused(mesh: RunningMesh, tmp_path: Path, smollm2_directory: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(smollm2_directory, model, ignore=shutil.ignore_patterns("*.safetensors"))
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    assert "safetensors" in add_fails(mesh, model)
    assert "does not exist" in add_fails(mesh, tmp_path / "nowhere")
    for name in ("../up", "/abs", "", "a b", "x" * 300):
        result = mesh.helios("models", "add", name, str(smollm2_directory))
        assert result.returncode != 0
