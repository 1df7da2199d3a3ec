"""What Helios leans on in vLLM for models that make vectors, several ranks and adapters; run with `contracts`."""

import inspect
from typing import Any

import torch
from vllm.config import ModelConfig
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.pooling.base.serving import PoolingBaseServing
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.request import LoRARequest
from vllm.model_executor.models import registry
from vllm.utils.ompmultiprocessing import OMPProcessManager
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from helios.worker.engines.vllm import compat_adapters, compat_config, compat_pooling
from helios.worker.engines.vllm.ranks import rank_cores
from tests.worker.engines import architectures, splits
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
def the_registrys_list_of_architectures_is_the_engines() -> None:
    """Where this fails after an upgrade: `python -m tests.worker.engines.architectures` writes the list anew."""
    listed = {line for line in architectures.FILE.read_text().splitlines() if not line.startswith("#")}
    own = architectures.own_architectures()
    assert own - listed == set()
    assert listed - own <= architectures.transformers_names()


@contract
def classes_can_be_split_as_the_registrys_table_says() -> None:
    """Some of each kind; `make soak` asks all. `python -m tests.worker.engines.splits` writes the table anew."""
    rows = [line.split() for line in splits.FILE.read_text().splitlines() if not line.startswith("#")]
    table = {name: set(words) for name, *words in rows}
    for name in ("LlamaForCausalLM", "MixtralForCausalLM", "GPT2LMHeadModel", "BertModel", "Mamba2ForCausalLM"):
        assert splits.own_splits(name) == table[name], name
    assert "is_pp_supported_model(" in inspect.getsource(ModelConfig.verify_with_parallel_config)


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
def adapters_are_told_apart_by_name_and_found_in_the_list_of_models() -> None:
    assert [*LoRARequest.__struct_fields__][:3] == ["lora_name", "lora_int_id", "lora_path"]
    assert LoRARequest("a#1", 1, "p") == LoRARequest("a#1", 2, "p"), "two of one name would be one in a batch"
    for name in ("add_lora", "remove_lora"):
        assert inspect.iscoroutinefunction(getattr(AsyncLLM, name))
    for method in (AsyncLLM.generate, AsyncLLM.encode):
        assert "lora_request" in parameters(method)
    assert "self.models.lora_requests[request.model]" in inspect.getsource(BaseServing)
    for serving in (OpenAIServingChat, OpenAIServingCompletion, PoolingBaseServing):
        source = inspect.getsource(serving)
        assert "self.models.model_name(lora_request)" in source
        assert "lora_request=" in source, "by keyword: requests are counted by it"
    assert "self.lora_requests" in inspect.getsource(OpenAIServingModels.__init__)
    shown = compat_adapters.public_name(LoRARequest("pirate#12", 12, "p"))
    assert shown == "pirate"


@contract
def products_of_adapters_are_those_of_vllm_where_every_token_has_one_and_nothing_where_it_has_none() -> None:
    random = torch.Generator().manual_seed(5)
    inputs, weights = torch.randn(7, 12, generator=random), torch.randn(3, 1, 4, 12, generator=random)
    back, lengths = torch.randn(3, 1, 9, 4, generator=random), torch.tensor([2, 4, 1])
    for name, kernel in compat_adapters.KERNELS.items():
        original: Any = getattr(lora_ops, name)
        for indices in (torch.tensor([2, 0, 1]), torch.tensor([2, -1, 1])):
            tokens = torch.repeat_interleave(indices, lengths)
            is_sequences, is_shrink = name.startswith("sgmv"), "shrink" in name
            which = (torch.zeros(3), lengths, indices, 3, 4, 7) if is_sequences else (tokens,)
            more = (0.5,) if is_shrink else (*((2, 9) if "slice" in name else ()), True)
            arguments = (inputs, weights) if is_shrink else (inputs[:, :4], back)
            before = torch.zeros(7, 4) if is_shrink else torch.ones(7, 12)
            expected, found = before.clone(), before.clone()
            original(*arguments, expected, *which, *more)
            kernel(*arguments, found, *which, *more)
            has_one = tokens >= 0
            assert torch.allclose(found[has_one], expected[has_one], atol=1e-5), name
            assert torch.equal(found[~has_one], before[~has_one]), name


@contract
def an_adapter_beyond_the_rank_is_told_which_rank_to_set() -> None:
    assert [compat_config.lora_rank_for(rank) for rank in (1, 9, 16, 17, 4096)] == [1, 16, 16, 32, 512]
