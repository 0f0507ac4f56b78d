"""Where a generated sequence ends: at an end-of-sequence id, or where `generate` began to write padding.

A criterion of the caller's ends a sequence without such an id, and then only the padding shows it. Padding in the
middle is a token like any other: a model may emit it, and `generate` goes on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Endings:
    """Legend: `B` sequences, `S` tokens.

    Attributes:
        eos: end-of-sequence ids. pad: what is written after them, None where nothing is.
    """

    eos: tuple[int, ...] = ()
    pad: int | None = None

    def over(self, ids: Tensor) -> Tensor:
        """`[B, S]` bool: tokens that are an end-of-sequence id, or behind one."""
        return torch.isin(ids, torch.tensor(self.eos, dtype=ids.dtype, device=ids.device)).cumsum(1) > 0

    def padding(self, ids: Tensor) -> Tensor:
        """`[B, S]` bool: tokens that may be padding."""
        return torch.zeros_like(ids, dtype=torch.bool) if self.pad is None else ids == self.pad

    def outside(self, new: Tensor) -> Tensor:
        """`[B, S]` bool: generated tokens that end a sequence or stand behind its end."""
        trailing = self.padding(new).long().flip(1).cumprod(1).flip(1) > 0
        return self.over(new) | trailing
