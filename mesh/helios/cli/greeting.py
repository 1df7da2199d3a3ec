"""What ``helios up`` prints when the mesh serves: lines that work when they are pasted."""

import json
import shlex
import shutil
import sys
from pathlib import Path

from helios.cli.state import StateDirectory


def greeting(state: StateDirectory, *, edge: str, admin: str, model: str, needs_key: bool = False) -> str:
    """Returns the text: a curl line, an openai-python snippet, a grpcurl line for each address, and what to do next."""
    grpcurl = _command("grpcurl")
    helios = _command("helios")
    token_file = shlex.quote(str(state.admin_token_file))
    where = f" --state-dir {shlex.quote(str(state.root))}"
    question = "What is the capital of France?"
    header = '-H "authorization: Bearer $HELIOS_API_KEY" ' if needs_key else ""
    api_key = 'os.environ["HELIOS_API_KEY"]' if needs_key else '"none"'
    more = "import os\n  " if needs_key else ""
    # Greedy: a small model that samples may go on for thousands of tokens now and then.
    messages = [{"role": "user", "content": question}]
    body = json.dumps({"model": model, "stream": True, "temperature": 0, "messages": messages})
    return f"""\
The mesh serves {model} (and whatever you add) on http://{edge}/v1

curl:
  curl -sN http://{edge}/v1/chat/completions {header}-H 'content-type: application/json' -d '{body}'

Python (pip install openai):
  {more}from openai import OpenAI
  client = OpenAI(base_url="http://{edge}/v1", api_key={api_key})
  messages = [{{"role": "user", "content": "What is the capital of France?"}}]
  for chunk in client.chat.completions.create(model="{model}", stream=True, temperature=0, messages=messages):
      print(chunk.choices[0].delta.content or "", end="", flush=True)

gRPC:
  {grpcurl} -plaintext {header}-d '{{"model": "{model}", "messages": [{{"role": "ROLE_USER", "content": "Hi"}}], \
"sampling": {{"temperature": 0}}}}' {edge} helios.api.inference.v1.InferenceService/Chat

gRPC, administration:
  TOKEN=$(cat {token_file}) {grpcurl} -plaintext -expand-headers -H 'authorization: Bearer ${{TOKEN}}' \
{admin} helios.api.admin.v1.AdminService/ListReplicas

Next: {helios} chat{where} · {helios} status{where} · {helios} models add NAME PATH{where} · {helios} down{where}
"""


def _command(name: str) -> str:
    """Returns how to call a command of this environment: by name where the PATH finds it, else by its path."""
    beside = Path(sys.executable).with_name(name)
    found = shutil.which(name)
    if found and (not beside.exists() or Path(found).resolve() == beside.resolve()):
        return name
    return shlex.quote(str(beside))
