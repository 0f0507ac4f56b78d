"""The common router as plain operations, where a probe showed that they give its bits: no function mode is needed.

A function mode meets every operation inside a router, at several microseconds each. Most routers are a linear, a
softmax, a top-k and perhaps a division, so their edits can simply stand between these.

Legend: `N` tokens, `H` hidden size, `E` experts, `K` experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttrouting.scoring import WeightRule

Edit = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class DirectRouter:
    """`(logits [N, E], weights [N, K], ids [N, K])`, as softmax routers of transformers return them.

    Attributes:
        top_k: `K`. renormalises: whether the chosen weights are divided by their sum. weight_dtype: theirs.
    """

    top_k: int
    renormalises: bool
    weight_dtype: torch.dtype

    def __call__(
        self, router: nn.Module, hidden: Tensor, on_logits: Edit | None = None, on_scores: Edit | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Route `hidden [..., H]`; edits of the logits and of the scores come where the family has them."""
        weight = router.weight
        logits = F.linear(hidden.reshape(-1, hidden.shape[-1]), weight)  # type: ignore[arg-type]
        edited = logits if on_logits is None else on_logits(logits)
        scores = torch.softmax(edited, -1, dtype=torch.float)
        value, ids = torch.topk(scores if on_scores is None else on_scores(scores), self.top_k, dim=-1)
        if self.renormalises:
            value = value / value.sum(-1, keepdim=True)
        return logits, value.to(self.weight_dtype), ids


def find_direct(router: nn.Module, hidden: Tensor, out: Any, rule: WeightRule) -> DirectRouter | None:
    """The plain operations of a router, or None unless they give what it gave, to the bit and in this order.

    Args:
        hidden: what it was given in the probe, `[..., H]`. out: what it returned.
    """
    simple = isinstance(out, tuple) and len(out) == 3 and all(isinstance(t, Tensor) for t in out)
    weight = getattr(router, "weight", None)
    alone = [name for name, _ in router.named_parameters()] == ["weight"] and not list(router.buffers())
    if not simple or not alone or not isinstance(weight, Tensor) or rule.scoring != "softmax" or rule.scaling != 1:
        return None
    direct = DirectRouter(out[2].shape[-1], rule.renormalises, out[1].dtype)
    if weight.is_meta or weight.dim() != 2 or weight.shape[-1] != hidden.shape[-1] or weight.shape[0] < direct.top_k:
        return None
    with torch.no_grad():
        mine = direct(router, hidden)
    same = all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(mine, out, strict=True))
    return direct if same else None
