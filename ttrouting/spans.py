"""Which tokens count in a loss: all, those that match a pattern, or the assistant's turns."""

from __future__ import annotations

import re
from bisect import bisect_right
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from ttrouting.context import Context
from ttrouting.errors import ConfigError

_MARKS = ("\u2402user\u2403", "\u2402reply\u2403", "\u2402again\u2403")


def check_loss_on(loss_on: str, tokenizer: Any = ..., option: str = "loss_on") -> None:
    """Raise `ConfigError` on a bad pattern, or where a tokenizer (if given, may be None) is missing.

    Args:
        loss_on: `all`, `assistant` or a regular expression.
        tokenizer: leave out to check the text alone. option: how messages call it.
    """
    if not isinstance(loss_on, str) or not loss_on:
        raise ConfigError(f"{option} must be 'all', 'assistant' or a regular expression, got {loss_on!r}.")
    if loss_on not in ("all", "assistant"):
        try:
            re.compile(loss_on)
        except re.error as error:
            raise ConfigError(f"{option}={loss_on!r} is no regular expression: {error}.") from None
    if tokenizer is None and loss_on != "all":
        raise ConfigError(
            f"{option}={loss_on!r} looks at text and needs the tokenizer: ttr.adapt(model, ..., tokenizer=tokenizer)."
        )
    if loss_on == "assistant" and tokenizer is not ...:
        _assistant_pattern(tokenizer)


def narrow_targets(context: Context, loss_on: str, tokenizer: Any) -> Tensor:
    """`context.targets` restricted to what `loss_on` names, `[B, T]` bool; the caller's own mask wins."""
    if loss_on == "all" or context.explicit:
        return context.targets
    pattern = _assistant_pattern(tokenizer) if loss_on == "assistant" else re.compile(loss_on)
    inside = torch.zeros_like(context.targets)
    for i in range(context.ids.shape[0]):
        columns = context.mask[i].nonzero().flatten().tolist()
        text, starts = token_starts(context.ids[i, columns].tolist(), tokenizer)
        for match in pattern.finditer(text):
            first, last = match.span(1 if pattern.groups else 0)
            for column, begin, end in zip(columns, starts, [*starts[1:], len(text)], strict=True):
                if begin < last and end > first:
                    inside[i, column] = True
    return context.targets & inside


def last_match(ids: list[int], pattern: re.Pattern[str], tokenizer: Any) -> int | None:
    """Number of the token in which the last match of a pattern begins, or None where there is no match."""
    text, starts = token_starts(ids, tokenizer)
    found = [match.start() for match in pattern.finditer(text)]
    # a token that begins before the match holds its beginning, unless the next one begins there too
    return bisect_right(starts, found[-1]) - 1 if found else None


def tokens_from(rows: list[list[int]], starts: list[int], tokenizer: Any) -> Tensor:
    """`[B, P]` bool by position: tokens from `starts` on, and special tokens at the beginning.

    Those have hidden states like no others, and are part of what a text by itself is embedded by.

    Args:
        rows: token ids of `B` texts without padding, `P` the longest. starts: `B` positions.
    """
    chosen = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.bool)
    for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
        chosen[i, : leading_special(row, tokenizer)] = True
        chosen[i, start : len(row)] = True
    return chosen


def leading_special(ids: list[int], tokenizer: Any) -> int:
    """How many special tokens a text begins with."""
    special = set(getattr(tokenizer, "all_special_ids", ()))
    return next((n for n, token in enumerate(ids) if token not in special), len(ids))


def token_starts(ids: list[int], tokenizer: Any) -> tuple[str, list[int]]:
    """The text of token ids and where in it each token begins."""
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if getattr(tokenizer, "is_fast", False):
        again = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        if again["input_ids"] == ids:
            return text, [begin for begin, _ in again["offset_mapping"]]
    # the same text may have been split differently: decode prefixes instead
    starts = [
        len(tokenizer.decode(ids[:i], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        for i in range(len(ids))
    ]
    return text, starts


def _assistant_pattern(tokenizer: Any) -> re.Pattern[str]:
    """A pattern whose group is an assistant turn, read off the chat template by rendering marks with it."""
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "loss_on='assistant' needs a tokenizer with a chat template. Use a pattern such as 'A: .*' instead."
        )
    roles = ("user", "assistant", "user")
    turns = [{"role": role, "content": mark} for role, mark in zip(roles, _MARKS, strict=True)]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    before = text.split(_MARKS[0])[-1].split(_MARKS[1])[0]
    after = text.split(_MARKS[1])[-1].split(_MARKS[2])[0]
    # what closes a reply whatever follows it: the text may end there, or a tool may speak next
    closed = tokenizer.apply_chat_template(turns[:2], tokenize=False).split(_MARKS[1])[-1]
    shared = takewhile(lambda pair: pair[0] == pair[1], zip(after, closed, strict=False))
    after = "".join(letter for letter, _ in shared).rstrip() or after
    if not before or not after or any(mark not in text for mark in _MARKS):
        raise ConfigError(
            "The chat template does not separate turns, so loss_on='assistant' cannot find them. Use a pattern."
        )
    return re.compile(rf"{re.escape(before)}(.*?)(?={re.escape(after)}|\Z)", re.DOTALL)
