"""`python -m tests.worker.engines.run_engine SPEC`: makes the engine of a spec (JSON) as a replica does, holds it to
every contract, and prints a JSON object: ``{"errors": {contract: what is wrong, "" where it holds}, "notes": …}``.

A process of its own: an engine forks before the process has other threads, and torch and vLLM stay out of the tests.
"""

import asyncio
import json
import sys
import traceback
from typing import Any

import pytest

from helios.worker.replica.engine import Engine
from helios.worker.replica.engines import engine_module
from helios.worker.replica.spec import ReplicaSpec
from helios.worker.replica.start import EngineStart
from tests.worker.engines.engine_contracts import CONTRACTS, NEEDS_CHANCE, NEEDS_TOKENS, Subject

CONTRACT_SECONDS = 60.0


async def hold(spec: ReplicaSpec, start: EngineStart) -> dict[str, Any]:
    """Runs all contracts that the engine can be held to."""
    engine: Engine = await asyncio.wrap_future(start.engine)
    subject = Subject(
        engine, spec.model, has_tokens=spec.engine != "custom", is_random=spec.engine in {"vllm", "transformers"}
    )
    errors = {}
    for contract in CONTRACTS:
        name = contract.__name__
        if (name in NEEDS_TOKENS and not subject.has_tokens) or (name in NEEDS_CHANCE and not subject.is_random):
            continue
        try:
            async with asyncio.timeout(CONTRACT_SECONDS):
                await contract(subject)
            errors[name] = ""
        except (Exception, pytest.fail.Exception):  # noqa: BLE001  told to the test
            errors[name] = traceback.format_exc(limit=-4)
    subject.notes["tasks"] = [task.get_name() for task in asyncio.all_tasks()]
    engine.close()
    return {"errors": errors, "notes": subject.notes}


def main() -> None:
    """Starts the engine, holds it to the contracts, prints what came of it."""
    spec = ReplicaSpec.from_document(json.loads(sys.argv[1]))
    engine_module(spec.engine).preload()
    start = EngineStart(spec)
    start.run_until_forked()
    print(json.dumps(asyncio.run(hold(spec, start))), flush=True)


if __name__ == "__main__":
    main()
