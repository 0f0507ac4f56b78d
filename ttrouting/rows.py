"""Which sequence and which position each token of a forward belongs to.

Legend: `B` forward rows, `S` tokens a row, `N = B * S`. Tokens reach routers row-major.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


class _Once:
    """A property that is computed when first asked for; functools' own takes a lock, which cannot be compiled."""

    def __init__(self, compute: Callable[[Any], Tensor]) -> None:
        self._compute = compute
        self.__doc__ = compute.__doc__

    def __get__(self, rows: Any, _owner: Any = None) -> Tensor:
        found = rows.known.get(self._compute.__name__)
        if found is None:
            found = rows.known[self._compute.__name__] = self._compute(rows)
        return found


@dataclass(frozen=True)
class Rows:
    """The layout of one forward. What no strategy asks for is not computed.

    Attributes:
        valid: `[B, S]` bool, real tokens: no padding, nothing after a sequence has ended.
        sequences: how many rows a run's state has; each stands for `B / streams / sequences` neighbouring rows.
        start: `[B / streams]`, position of the first token of each row, or one number for all.
        streams: how many streams there are, one after the other; 1 without a decoding strategy.
    """

    valid: Tensor
    sequences: int
    start: Tensor | int
    streams: int = 1
    known: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def batch(self) -> int:
        """`B`, rows of the forward."""
        return self.valid.shape[0]

    @property
    def length(self) -> int:
        """`S`, tokens in each row."""
        return self.valid.shape[1]

    @property
    def tokens(self) -> int:
        """`N = B * S`."""
        return self.valid.numel()

    @_Once
    def sequence(self) -> Tensor:
        """`[B]` int64, the sequence (row of the session's state) of each forward row."""
        one = self.batch // self.streams
        return (torch.arange(one, device=self.valid.device) // max(1, one // self.sequences)).repeat(self.streams)

    @_Once
    def position(self) -> Tensor:
        """`[B, S]` int64, position inside the sequence, padding not counted."""
        before = (self.valid.long().cumsum(1) - 1).clamp_min(0)
        start = self.start.repeat(self.streams)[:, None] if isinstance(self.start, Tensor) else self.start
        return (before + start).long()

    @_Once
    def stream(self) -> Tensor:
        """`[B]` int64, 0 for the model's own routing, 1.. for the extra rows of a decoding strategy."""
        one = self.batch // self.streams
        return torch.arange(self.streams, device=self.valid.device).repeat_interleave(one, output_size=self.batch)

    @_Once
    def token_row(self) -> Tensor:
        """`[N]` the forward row of each token."""
        row = torch.arange(self.batch, device=self.valid.device)
        return row.repeat_interleave(self.length, output_size=self.tokens)

    def per_token(self, per_sequence: Tensor, device: torch.device) -> Tensor:
        """Spread a value of each sequence, `[B', ...]`, over its tokens: `[N, ...]`."""
        chosen = per_sequence.to(device)
        if self.batch != self.sequences:
            chosen = chosen[self.sequence.to(device)]  # [B, ...]
        if self.length == 1:
            return chosen
        return chosen.repeat_interleave(self.length, dim=0, output_size=self.tokens)


def make_rows(valid: Tensor, sequences: int, start: Tensor | int, streams: int = 1) -> Rows:
    """Lay out a forward, the streams one after the other.

    Args:
        valid: `[B / streams, S]` bool. sequences: rows of the session's state.
        start: position of the first token of each row, `[B / streams]` or int.
    """
    return Rows(valid if streams == 1 else valid.repeat(streams, 1), sequences, start, streams)
