"""Which sequence and which position each token of a forward belongs to.

Legend: `B` forward rows, `S` tokens a row, `N = B * S`. Tokens reach routers row-major.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """The layout of one forward.

    Attributes:
        sequence: `[B]` int64, the sequence (row of the session's state) of each forward row.
        valid: `[B, S]` bool, real tokens: no padding, nothing after a sequence has ended.
        position: `[B, S]` int64, position inside the sequence, padding not counted.
        stream: `[B]` int64, 0 for the model's own routing, 1.. for the extra rows of a decoding strategy.
        streams: how many streams there are; 1 without a decoding strategy.
    """

    sequence: Tensor
    valid: Tensor
    position: Tensor
    stream: Tensor
    streams: int = 1

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

    @cached_property
    def token_row(self) -> Tensor:
        """`[N]` the forward row of each token."""
        row = torch.arange(self.batch, device=self.valid.device)
        return row.repeat_interleave(self.length, output_size=self.tokens)

    def per_token(self, per_sequence: Tensor, device: torch.device) -> Tensor:
        """Spread a value of each sequence, `[B', ...]`, over its tokens: `[N, ...]`."""
        chosen = per_sequence.to(device)[self.sequence.to(device)]  # [B, ...]
        return chosen.repeat_interleave(self.length, dim=0, output_size=self.tokens)


def make_rows(batch: int, length: int, sequences: int, valid: Tensor, start: Tensor | int, streams: int = 1) -> Rows:
    """Lay out a forward of `batch` rows, the streams one after the other.

    Args:
        batch: `B`, all streams included. length: `S`. sequences: rows of the session's state.
        valid: `[B / streams, S]` bool. start: position of the first token of each row, `[B / streams]` or int.
    """
    device = valid.device
    one = batch // streams
    sequence = torch.arange(one, device=device) // max(1, one // sequences)
    before = valid.long().cumsum(1) - 1
    position = (before.clamp_min(0) + (start[:, None] if isinstance(start, Tensor) else start)).long()
    return Rows(
        sequence=sequence.repeat(streams),
        valid=valid.repeat(streams, 1),
        position=position.repeat(streams, 1),
        stream=torch.arange(streams, device=device).repeat_interleave(one),
        streams=streams,
    )
