"""What Helios leans on in vLLM's models that make vectors: the class of the commonest ones, and its embedding server.

A third of ``compat``; pinned and tested with it.
"""

from vllm.entrypoints.pooling.embed.protocol import EmbeddingCompletionRequest
from vllm.entrypoints.pooling.embed.serving import ServingEmbedding
from vllm.model_executor.models.bert import BertEmbeddingModel
from vllm.outputs import PoolingRequestOutput
from vllm.renderers.chat_utils import ChatTemplateConfig

__all__ = [
    "BertEmbeddingModel",
    "ChatTemplateConfig",
    "EmbeddingCompletionRequest",
    "PoolingRequestOutput",
    "ServingEmbedding",
]
