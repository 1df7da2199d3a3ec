"""A model of transformers on its device: loaded, and asked for prompts and for logits."""

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from jinja2.exceptions import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer

from helios.mesh.errors import ContextLengthExceeded, InvalidRequest
from helios.worker.replica.engine import Conversation, EngineHooks, Prompt, Text, TokenIds
from helios.worker.replica.spec import ReplicaSpec

_DTYPES: Final = ("float16", "bfloat16", "float32")
# What a model's generation_config.json may say about how to draw, by the names of Sampling.
_DEFAULTS: Final = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
# A tokenizer that knows no limit says something astronomical.
_NO_LIMIT: Final = 1 << 30


class LoadedModel:
    """The weights, the tokenizer, and what the configuration says. Methods are safe in any thread but ``render``, which
    one thread calls: a tokenizer takes its settings with each call.

    Attributes:
        model: The module, in evaluation mode.
        device: Where it is.
        context_tokens: The model's own limit.
        vocabulary_size: Length of a row of logits.
        forward_options: Arguments of each call of ``model``.
        kv_bytes_per_token: KV cache of one token over all layers.
        end_ids: Tokens by which it says that it is done.
        defaults: How it wants to be drawn from, by the names of ``Sampling``.
    """

    def __init__(self, spec: ReplicaSpec, hooks: EngineHooks) -> None:
        """Loads. Raises what transformers says of a model that it can't load; InvalidRequest for an unknown dtype."""
        dtype = spec.settings.dtype or "auto"
        if dtype != "auto" and dtype not in _DTYPES:
            raise InvalidRequest(
                f"dtype {dtype!r}: there is auto, {', '.join(_DTYPES)}", reason="INVALID_ENGINE_SETTINGS"
            )
        with hooks.phase("tokenizer"):
            self._tokenizer: Any = AutoTokenizer.from_pretrained(spec.model_path, local_files_only=True)
            if spec.settings.chat_template:
                self._tokenizer.chat_template = spec.settings.chat_template
        with hooks.phase("load"):
            self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            self.model: Any = AutoModelForCausalLM.from_pretrained(
                spec.model_path,
                dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                local_files_only=True,
                use_safetensors=True,
            )
            self.model = self.model.eval().to(self.device)
        config = self.model.config.get_text_config()
        self.context_tokens = int(getattr(config, "max_position_embeddings", 0) or self._tokenizer.model_max_length)
        if self.context_tokens >= _NO_LIMIT:
            raise InvalidRequest("the model does not say how long its context is: set max_context_tokens")
        self.vocabulary_size = int(config.vocab_size)
        self._longest_token_chars = max(map(len, self._tokenizer.get_vocab()))
        # Logits of a whole prompt are the largest thing in memory; nearly every model can leave them out.
        has_choice = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        self.forward_options: dict[str, Any] = {"logits_to_keep": 1} if has_choice else {}
        self.kv_bytes_per_token = _kv_bytes_per_token(config, self.model.dtype.itemsize)
        self.end_ids = _end_ids(self.model.generation_config.eos_token_id, self._tokenizer.eos_token_id)
        self.defaults = _defaults(Path(spec.model_path))

    def render(self, prompt: Prompt) -> list[int]:
        """Returns the ids that the model is given for a prompt. Raises InvalidRequest for what the template refuses."""
        if isinstance(prompt, TokenIds):
            return list(prompt.ids)
        if isinstance(prompt, Text):
            return self._encode(prompt.text, add_special_tokens=prompt.add_special_tokens)
        # The template has the special tokens in it.
        return self._encode(self._conversation(prompt), add_special_tokens=False)

    def text_of(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        """Returns the text of tokens."""
        text: str = self._tokenizer.decode(
            token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        # Tokenizing a message of 20 MiB takes as many seconds, and others wait.
        if len(text) > self.context_tokens * self._longest_token_chars:
            raise ContextLengthExceeded(
                f"this model's maximum context length is {self.context_tokens} tokens; the prompt has {len(text)} "
                "characters"
            )
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def _conversation(self, prompt: Conversation) -> str:
        if not self._tokenizer.chat_template:
            raise InvalidRequest("this model has no chat template", metadata={"param": "messages"})
        messages = [
            {"role": turn.role, "content": turn.content} | ({"name": turn.name} if turn.name else {})
            for turn in prompt.turns
        ]
        arguments = {**prompt.template_arguments, "add_generation_prompt": True, "tokenize": False}
        try:
            text: str = self._tokenizer.apply_chat_template(messages, **arguments)
        except (TemplateError, TypeError, ValueError) as error:
            raise InvalidRequest(f"messages: {error}", metadata={"param": "messages"}) from error
        return text


def _kv_bytes_per_token(config: Any, item_bytes: int) -> int:
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(2 * config.num_hidden_layers * key_heads * head_size * item_bytes)


def _end_ids(configured: int | list[int] | None, tokenizer_s: int | None) -> tuple[int, ...]:
    several = configured if isinstance(configured, list) else [configured]
    return tuple(dict.fromkeys(token_id for token_id in (*several, tokenizer_s) if token_id is not None))


def _defaults(directory: Path) -> Mapping[str, Any]:
    path = directory / "generation_config.json"
    if not path.is_file():
        return {}
    configured = json.loads(path.read_text())
    return {name: configured[name] for name in _DEFAULTS if configured.get(name) is not None}
