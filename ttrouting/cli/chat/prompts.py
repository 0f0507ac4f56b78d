"""What does a model read for a conversation, and does it fit into its context?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2.exceptions import TemplateError

from ttrouting.cli.chat.conversation import Turn
from ttrouting.cli.models import encode
from ttrouting.errors import ConfigError
from ttrouting.sites import text_config

# Without a template a conversation is written as solved examples are, which base models follow best; for the pocket
# model it is the very format of its training.
STOP = "\nQ:"
PLAIN = "This model has no chat template: a turn is written 'Q: <message>' and a new line 'A:', after earlier ones."


def messages(turns: Sequence[Turn], text: str) -> list[dict[str, str]]:
    """The conversation with a new message, as chat templates and servers take it."""
    found = []
    for turn in turns:
        found += [{"role": "user", "content": turn.user}, {"role": "assistant", "content": turn.answer}]
    return [*found, {"role": "user", "content": text}]


def plain(turns: Sequence[Turn], text: str) -> str:
    """The same as text, for models without a chat template."""
    return "".join(f"Q: {turn.user}\nA: {turn.answer}\n" for turn in turns) + f"Q: {text}\nA:"


def visible(text: str, stop: str | None, ended: bool) -> str:
    """What of a text that is being written belongs to the answer for sure.

    White space around an answer does not belong to it; neither does what follows `stop`, and before the end a tail
    that may become `stop` is held back.
    """
    found = text.lstrip()
    if stop is not None:
        found = f"\n{text}".split(stop)[0].lstrip()
        if not ended:
            held = next((n for n in range(len(stop), 0, -1) if found.endswith(stop[:n])), 0)
            found = found[: len(found) - held]
    return found.rstrip()


class Prompts:
    """Conversations as a model's token ids.

    Attributes:
        templated: whether the tokenizer has a chat template.
        limit: tokens of the model's context, None if it has no limit of its own.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self.templated = bool(getattr(tokenizer, "chat_template", None))
        self.limit: int | None = getattr(text_config(model.config), "max_position_embeddings", None)

    @property
    def stop(self) -> str | None:
        """Text that ends an answer; templates end it with a token of their own."""
        return None if self.templated else STOP

    def encoded(self, turns: Sequence[Turn], text: str) -> dict[str, Any]:
        """`input_ids` and `attention_mask`, both `[1, T]`.

        Raises:
            ConfigError: the template refuses this conversation.
        """
        if not self.templated:
            return encode(self._model, self._tokenizer, [plain(turns, text)])
        try:
            written = self._tokenizer.apply_chat_template(
                messages(turns, text), tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise ConfigError(f"The chat template refuses this conversation: {error}. Start anew: /clear.") from None
        return encode(self._model, self._tokenizer, [written], special_tokens=False)

    def fitted(self, turns: Sequence[Turn], text: str, new_tokens: int) -> tuple[dict[str, Any], int]:
        """As `encoded`, without the oldest turns where all of them leave no room, and how many were left out.

        Room is what `new_tokens` take, but no more than a quarter of the context.

        Raises:
            ConfigError: the message alone does not fit.
        """
        if self.limit is None:
            return self.encoded(turns, text), 0
        room = min(new_tokens, max(1, self.limit // 4))
        for left_out in range(len(turns) + 1):
            inputs = self.encoded(turns[left_out:], text)
            if inputs["input_ids"].shape[1] + room <= self.limit:
                return inputs, left_out
        length = inputs["input_ids"].shape[1]
        if length >= self.limit:
            raise ConfigError(
                f"This message alone has {length} tokens, the model's context {self.limit}. Nothing was sent: "
                "shorten it."
            )
        return inputs, len(turns)

    def unreadable(self, text: str) -> list[str]:
        """Characters of a text that the tokenizer has no token for."""
        unknown = getattr(self._tokenizer, "unk_token_id", None)
        if unknown is None or unknown not in self._tokenizer(text)["input_ids"]:
            return []
        return sorted({c for c in text if unknown in self._tokenizer(c)["input_ids"]})
