"""What Helios leans on in vLLM for answers that another replica takes up; see `contracts`."""

import inspect
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import AsyncMPClient
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.metrics.stats import PrefillStats

from helios.worker.engines.vllm import compat_continue
from helios.worker.replica.continuation import Continuation
from tests.worker.engines.contracts import contract, parameters


@contract
def a_request_goes_to_the_engine_by_one_method_that_can_be_stood_in_for() -> None:
    # Registered with the output processor first, then sent; one request of one answer comes this way.
    source = inspect.getsource(AsyncLLM._add_request)
    assert source.index("self.output_processor.add_request(") < source.index("self.engine_core.add_request_async(")
    assert list(inspect.signature(AsyncLLM._add_request).parameters)[1:] == [
        "request",
        "prompt",
        "parent_req",
        "index",
        "queue",
    ]
    assert "if is_pooling or params.n == 1:\n            await self._add_request(" in inspect.getsource(
        AsyncLLM.add_request
    )
    assert "request_id" in parameters(AsyncLLM.check_admission)
    assert "request" in parameters(AsyncMPClient.add_request_async)


@contract
def tokens_go_through_the_output_processor_without_an_engine() -> None:
    processor = OutputProcessor(None, log_stats=False)
    params = SamplingParams(max_tokens=9, output_kind=RequestOutputKind.DELTA)
    request: Any = EngineCoreRequest("r", [1, 2, 3], None, params, None, 0.0, None, None, None, external_req_id="x")
    queue = RequestOutputCollector(RequestOutputKind.DELTA, "r")
    processor.add_request(request, None, None, 0, queue)
    for token_ids, cached in (([7, 8], 2), ([9], 99)):
        counts = PrefillStats(num_prompt_tokens=3)
        counts.num_cached_tokens = cached
        processor.process_outputs([EngineCoreOutput("r", list(token_ids), prefill_stats=counts)])
        output: Any = queue.get_nowait()
        assert list(output.outputs[0].token_ids) == token_ids
        # The prompt is what was registered, and only the first output says what was cached of it.
        assert (output.prompt_token_ids, output.num_cached_tokens) == ([1, 2, 3], 2)
        assert not output.finished


@contract
def what_an_engine_tracks_of_an_answer_has_these_names_and_defaults() -> None:
    plain = SamplingParams(temperature=0.0)
    for name, without_effect, _ in compat_continue._TRACKED:
        assert getattr(plain, name) in (without_effect, []), name
    assert compat_continue.check_continuable(plain, Continuation())
    # Fields that are new in a version of vLLM have to be thought about.
    assert len(SamplingParams.__struct_fields__) == 43, SamplingParams.__struct_fields__
    with pytest.raises(VLLMValidationError):
        compat_continue.check_continuable(SamplingParams(frequency_penalty=0.1), Continuation())
    with pytest.raises(VLLMValidationError):
        compat_continue.check_continuable(SamplingParams(seed=1), Continuation())
    assert compat_continue.check_continuable(SamplingParams(seed=1, temperature=0.0), Continuation())
    assert not compat_continue.check_continuable(SamplingParams(seed=1), Continuation(is_strict=False))


@contract
def the_rest_of_an_answer_is_a_request_of_its_own() -> None:
    params = SamplingParams(max_tokens=9, min_tokens=3)
    request = EngineCoreRequest("r", [1, 2], None, params, None, 0.0, None, None, None)
    rest = compat_continue._rest(request, [7, 8, 9, 10])
    assert rest.prompt_token_ids == [1, 2, 7, 8, 9, 10]
    assert rest.sampling_params is not None
    assert (rest.sampling_params.max_tokens, rest.sampling_params.min_tokens) == (5, 0)
    # What counts the answer keeps the request as it was.
    assert (request.prompt_token_ids, params.max_tokens, params.min_tokens) == ([1, 2], 9, 3)
