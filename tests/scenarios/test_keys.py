"""API keys on a real mesh: made, used with real tokens counted, ended; and no public address without one."""

import json
import subprocess
from pathlib import Path
from typing import Any

from tests.ports import free_port
from tests.scenarios.running_mesh import ALIAS, HELIOS, MODEL, QUESTION, Answer, RunningMesh


def ask(mesh: RunningMesh, secret: str, **more: Any) -> Answer:
    body = {"model": ALIAS, "messages": QUESTION, "temperature": 0, **more}
    headers = {"authorization": f"Bearer {secret}"}
    return mesh.request("/v1/chat/completions", json.dumps(body).encode(), headers=headers)


def test_a_key_is_made_used_and_ended(mesh: RunningMesh) -> None:
    assert mesh.chat().status == 200
    command = ("keys", "create", "scenario", "--model", "smol*", "--tokens", "1000", "--requests", "100", "--json")
    made = json.loads(mesh.helios(*command).stdout)
    secret = made.pop("secret")
    assert json.loads(mesh.helios("keys", "list", "--json").stdout) == [made]
    listed = mesh.request("/admin/v1/keys", is_admin=True)
    assert [(key["id"], key["limits"]["tokens_per_minute"]) for key in listed.json["keys"]] == [(made["id"], 1000)]
    assert mesh.request("/admin/v1/keys").status == 404, "the public address knows nothing of keys"
    mesh.wait(lambda: ask(mesh, secret, max_tokens=8).status == 200, 30, "the proxy knows the key")
    answer = ask(mesh, secret, max_tokens=300)
    assert answer.status == 200
    usage = answer.json["usage"]
    at_pick = int(answer.headers["x-ratelimit-remaining-tokens"])
    assert usage["completion_tokens"] < 300

    def remaining() -> int:
        return int(ask(mesh, secret, max_tokens=1).headers["x-ratelimit-remaining-tokens"])

    # The pick reserved 300 tokens for an answer that took few: the rest is there again once the replica has said so.
    mesh.wait(lambda: remaining() > at_pick + 100, 30, "the answer is settled by what it used")
    assert ask(mesh, secret, max_tokens=2000).error["code"] == "exceeds_token_limit"
    hidden = ask(mesh, secret, model="other")
    assert (hidden.status, hidden.error["code"]) == (404, "model_not_found")
    models = mesh.request("/v1/models", headers={"authorization": f"Bearer {secret}"})
    assert MODEL in [model["id"] for model in models.json["data"]]
    assert mesh.helios("keys", "revoke", "scenario").returncode == 0
    mesh.wait(lambda: ask(mesh, secret).status == 401, 30, "the proxy refuses the key")
    assert mesh.chat().status == 200, "nobody needs a key on a loopback address"
    for log in (mesh.state / "logs").glob("*.log"):
        assert secret not in log.read_text(errors="replace"), log
    audits = [line for line in (mesh.state / "logs" / "registry.log").read_text().splitlines() if '"audit"' in line]
    assert any("create key" in line and made["id"] in line for line in audits)
    assert any("revoke key" in line and made["id"] in line for line in audits)


def test_where_keys_are_required_a_mesh_without_one_does_not_start(tmp_path: Path) -> None:
    command = [HELIOS, "up", "--state-dir", str(tmp_path / "s"), "--model", ""]
    command += ["--port", str(free_port()), "--admin-port", str(free_port()), "--set=proxy.admission.require_keys=true"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 1
    assert "NO_API_KEYS" in result.stderr
    assert "helios keys create" in result.stderr
