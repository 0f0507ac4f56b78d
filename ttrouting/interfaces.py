"""How a router's choice reaches the experts: as arguments, as dense scores, or as a sorted dispatch.

Legend: `N` tokens, `E` experts, `K` experts per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class ExpertsInterface:
    """The common one: `experts(hidden [N, H], ids [N, K], weights [N, K])`, met by a pre-hook."""

    limits: tuple[str, ...] = ()

    def read_router_output(self, out: Any, top_k: int | None) -> tuple[Tensor, Tensor] | None:
        """`(ids, weights)`, both `[N, K]`, as the router's output states them; None where arguments carry them.

        `top_k` is `K` where it is known already: finding it out costs a device sync.
        """
        return None

    def write_router_output(self, out: Any, ids: Tensor, weights: Tensor) -> Any:
        """The router's output with another choice in it."""
        return out


class DenseInterface(ExpertsInterface):
    """Llama 4: the router gives `scores [N, E]`, zero for experts not chosen; every expert runs."""

    limits = ("every expert runs on every token: fewer experts per token save nothing",)

    def read_router_output(self, out: Any, top_k: int | None) -> tuple[Tensor, Tensor] | None:
        scores = out[0]  # [N, E]
        if top_k is None:
            top_k = int((scores != 0).sum(-1).max())
        weights, ids = scores.topk(top_k, -1)
        return ids, weights

    def write_router_output(self, out: Any, ids: Tensor, weights: Tensor) -> Any:
        # in the dtype of the weights: fp32 edits leave fp32 scores, which a bf16 model's experts do not take
        scores = torch.zeros_like(out[0], dtype=weights.dtype).scatter_add(1, ids, weights)
        return (scores, *out[1:])


class SortedInterface(ExpertsInterface):
    """JetMoe's MLP: token-expert pairs sorted by expert, `(order, token, gate, sizes, logits)`."""

    limits = ("the attention router of the same layer is left alone: its k is the number of query heads",)

    def read_router_output(self, out: Any, top_k: int | None) -> tuple[Tensor, Tensor] | None:
        order, _token, gate, sizes, logits = out
        pairs = order.shape[0]
        k = pairs // logits.shape[0]
        expert = torch.repeat_interleave(
            torch.arange(len(sizes), device=order.device),
            torch.as_tensor(sizes, device=order.device),
        )
        ids = torch.empty(pairs, dtype=torch.int64, device=order.device).scatter(0, order, expert)
        weights = torch.zeros_like(gate).scatter(0, order, gate)
        return ids.view(-1, k), weights.view(-1, k)

    def write_router_output(self, out: Any, ids: Tensor, weights: Tensor) -> Any:
        k = ids.shape[1]
        _, order = ids.flatten().sort(dim=0, stable=True)  # [N * K]
        sizes = torch.bincount(ids.flatten(), minlength=len(out[3])).tolist()
        gate = weights.flatten()[order].to(out[2].dtype)
        return (order, order // k, gate, sizes, *out[4:])


INTERFACES: dict[str, ExpertsInterface] = {
    "experts": ExpertsInterface(),
    "dense": DenseInterface(),
    "sorted": SortedInterface(),
}
