"""What Helios leans on in vLLM for models that make vectors, several ranks and adapters; run with `contracts`."""

import inspect
from typing import Any

from vllm.entrypoints.pooling.base.serving import PoolingBaseServing
from vllm.model_executor.models import registry
from vllm.utils.ompmultiprocessing import OMPProcessManager
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from helios.worker.engines.vllm import compat, compat_pooling
from helios.worker.engines.vllm.ranks import rank_cores
from tests.worker.engines.contracts import contract, parameters


@contract
def vectors_come_from_a_class_that_is_called_with_a_request() -> None:
    serving = compat_pooling.ServingEmbedding
    taken = parameters(PoolingBaseServing.__init__)
    assert {"engine_client", "models", "request_logger", "chat_template_config"} <= taken
    assert [*inspect.signature(serving.__call__).parameters] == ["self", "request", "raw_request"]
    assert [*inspect.signature(compat_pooling.ChatTemplateConfig).parameters][:1] == ["chat_template"]
    # It encodes each input by itself; their tokens are counted where they come by.
    assert "engine_client.encode(" in inspect.getsource(PoolingBaseServing)
    output = {"finished", "prompt_token_ids", "num_cached_tokens"}
    assert output <= parameters(compat_pooling.PoolingRequestOutput.__init__)
    fields = compat_pooling.EmbeddingCompletionRequest.model_fields
    assert {"input", "model", "encoding_format", "dimensions"} <= set(fields)


@contract
def the_class_of_berts_that_make_vectors_is_the_one_that_the_registry_names() -> None:
    named: Any = registry._EMBEDDING_MODELS["BertModel"]
    assert named == ("bert", compat_pooling.BertEmbeddingModel.__name__)


@contract
def each_rank_has_cores_of_its_own() -> None:
    assert [rank_cores((4, 5, 6, 7), rank, 2) for rank in (0, 1)] == [[4, 5], [6, 7]]
    assert [rank_cores((4,), rank, 2) for rank in (0, 1)] == [[4], [4]]
    assert rank_cores((), 1, 2) == []
    assert "nobind" in inspect.getsource(OMPProcessManager)
    arguments = [*inspect.signature(CPUWorker.__init__).parameters]
    assert arguments[1:4] == ["vllm_config", "local_rank", "rank"]


@contract
def the_buffer_between_groups_of_layers_is_made_in_a_warm_up_that_can_be_left_out() -> None:
    source = inspect.getsource(GPUModelRunner)
    assert "self.intermediate_tensors: IntermediateTensors | None = None" in source
    assert source.count("self.model.make_empty_intermediate_tensors(") == 1
    assert "make_empty_intermediate_tensors" in inspect.getsource(GPUModelRunner._dummy_run)


@contract
def adapters_are_loaded_by_the_list_of_models_and_found_by_their_names() -> None:
    assert {"lora_name", "lora_path"} <= set(compat.LoadLoRAAdapterRequest.model_fields)
    assert inspect.iscoroutinefunction(compat.OpenAIServingModels.load_lora_adapter)
    source = inspect.getsource(compat.OpenAIServingModels.load_lora_adapter)
    assert "self.engine_client.add_lora(" in source
    assert "self.lora_requests[lora_name] =" in source
    assert "lora_request" in parameters(AsyncLLM.generate)
