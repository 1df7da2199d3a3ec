"""From prompts and sampling parameters to what vLLM's engine takes, through vLLM's own renderer and tokenizer."""

import dataclasses
from typing import Any

from helios.worker.engines.vllm import compat
from helios.worker.replica.engine import Conversation, Prompt, Sampling, Text, TokenIds, Tokenized


class PromptRenderer:
    """Renders prompts of one model. Safe for concurrent calls: vLLM's renderer is."""

    def __init__(self, model_config: Any, renderer: Any, chat_template: str | None) -> None:
        self._model = model_config
        self._renderer = renderer
        self._chat_template = chat_template
        self._defaults: dict[str, Any] = model_config.get_diff_sampling_param()

    async def render(self, prompt: Prompt, sampling: Sampling) -> tuple[Any, Any]:
        """Returns engine input and SamplingParams. Raises vLLM's errors for what the model can't take."""
        return await self._render(prompt, sampling.max_tokens or 0), self._parameters(sampling)

    async def tokenize(self, prompt: Prompt) -> Tokenized:
        """Returns the ids that the model would be given for a prompt."""
        rendered = await self._render(prompt, 0)
        token_ids = tuple(rendered["prompt_token_ids"])
        tokenizer = self._renderer.tokenizer
        return Tokenized(token_ids, tuple(tokenizer.decode([token_id]) for token_id in token_ids))

    async def _render(self, prompt: Prompt, max_output_tokens: int) -> Any:
        if isinstance(prompt, Conversation):
            parameters = dataclasses.replace(
                self._renderer.default_chat_tok_params,
                max_output_tokens=max_output_tokens,
                max_output_tokens_param="max_tokens",
            )
            chat = compat.ChatParams(
                chat_template=self._chat_template,
                # The text only: vLLM then looks at its length before it tokenizes, and tokenizes in a thread. A
                # template that tokenizes does it in the event loop, for 20 s where a message has 20 MiB.
                chat_template_kwargs=dict(prompt.template_arguments)
                | {"add_generation_prompt": True, "tokenize": False},
            )
            messages = [
                {"role": turn.role, "content": turn.content} | ({"name": turn.name} if turn.name else {})
                for turn in prompt.turns
            ]
            _, (rendered,) = await self._renderer.render_chat_async([messages], chat, parameters)
            return rendered
        parameters = dataclasses.replace(
            self._renderer.default_cmpl_tok_params,
            max_output_tokens=max_output_tokens,
            max_output_tokens_param="max_tokens",
            add_special_tokens=not isinstance(prompt, Text) or prompt.add_special_tokens,
        )
        raw = _raw_prompt(prompt)
        (rendered,) = await self._renderer.render_cmpl_async([compat.parse_model_prompt(self._model, raw)], parameters)
        return rendered

    def _parameters(self, sampling: Sampling) -> Any:
        values: dict[str, Any] = {
            field.name: value
            for field in dataclasses.fields(Sampling)
            if field.name != "adapter" and (value := getattr(sampling, field.name)) is not None and value != ()
        }
        values |= {name: list(values[name]) for name in ("stop", "stop_token_ids") if name in values}
        # The model's own defaults, then the request. Without a bound the engine goes on to the end of the context.
        merged: dict[str, Any] = {"max_tokens": None} | self._defaults | values
        return compat.SamplingParams.from_optional(**merged, output_kind=compat.RequestOutputKind.DELTA)


def _raw_prompt(prompt: Text | TokenIds) -> Any:
    if isinstance(prompt, Text):
        return compat.TextPrompt(prompt=prompt.text)
    return compat.TokensPrompt(prompt_token_ids=list(prompt.ids))
