"""The text that an adaptation may learn from: token ids, which are real, which count in the loss."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Context:
    """Legend: `B` sequences, `T` tokens.

    Attributes:
        ids: `[B, T]` int64, padded on the left.
        mask: `[B, T]` bool, real tokens.
        targets: `[B, T]` bool, tokens whose prediction may count in a loss (never the first real one).
        explicit: whether the caller chose the targets; strategies then do not narrow them.
        inputs: further model inputs that go with the prompt (pictures and the like), batch first.
    """

    ids: Tensor
    mask: Tensor
    targets: Tensor
    explicit: bool = False
    inputs: dict[str, Any] = field(default_factory=dict)

    def repeat(self, times: int) -> Context:
        """Each sequence `times` times, copies side by side."""
        if times == 1:
            return self
        return replace(
            self,
            ids=self.ids.repeat_interleave(times, 0),
            mask=self.mask.repeat_interleave(times, 0),
            targets=self.targets.repeat_interleave(times, 0),
            inputs={k: v.repeat_interleave(times, 0) for k, v in self.inputs.items()},
        )

    def continued(self, ids: Tensor) -> Context:
        """The same prompts with generated tokens after them, `ids [B, T']`; new tokens are targets."""
        fresh = torch.ones_like(ids[:, self.ids.shape[1] :], dtype=torch.bool)
        return replace(
            self,
            ids=ids,
            mask=torch.cat([self.mask, fresh], 1),
            targets=torch.cat([self.targets, fresh], 1),
        )

    def head(self) -> Context:
        """All but the last token."""
        return replace(self, ids=self.ids[:, :-1], mask=self.mask[:, :-1], targets=self.targets[:, :-1])
