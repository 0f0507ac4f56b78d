"""C3PO's surrogates: what may stand in for the loss of an answer that nobody knows yet (arXiv 2504.07964).

Legend: `B` sequences, `k` neighbours, `L` MoE layers, `E` experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

COARSE = 10  # intervals of the search over [0, 1], each then halved twice around the best


def core_experts(omega: Tensor, sizes: list[int], first: int, amount: int | float) -> Tensor:
    """Which entries may change: the heaviest experts of each critical layer, `[B, L, E]` bool.

    Args:
        omega: `[B, L, E]`, the sample's own scores. sizes: experts of each layer. first: lowest critical layer.
        amount: a count, or a share of each layer's experts (rounded, at least one).
    """
    chosen = torch.zeros_like(omega, dtype=torch.bool)
    for layer in range(first, len(sizes)):
        size = sizes[layer]
        count = amount if isinstance(amount, int) else max(1, round(amount * size))
        heaviest = omega[:, layer, :size].topk(count, -1).indices
        chosen[:, layer] = chosen[:, layer].scatter(-1, heaviest, True)
    return chosen


def mean_pathway(weights: Tensor, omega: Tensor) -> Tensor:
    """`sum_i K_i omega_i / sum_i K_i`: `[B, k]` weights that sum to 1, `[B, k, L, E]` -> `[B, L, E]`."""
    return (weights[:, :, None, None] * omega).sum(1)


def search_alpha(loss: Callable[[Tensor], Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
    """The share `alpha` of its own pathway with which each sequence's neighbours have the least loss.

    First eleven values from 0 to 1, then twice the two middles beside the best: exact to 0.025 where the loss has
    one valley around it. Of equal ones the largest is taken: the least change.

    Args:
        loss: `alpha [B]` -> `[B]`. like: any tensor of the wanted device, dtype and first size.

    Returns:
        `alpha [B]` and its loss `[B]`.
    """
    best = like.new_ones(like.shape[0])
    least = loss(best)

    def offer(alpha: Tensor) -> None:
        nonlocal best, least
        found = loss(alpha)
        better = found < least
        best, least = torch.where(better, alpha, best), torch.where(better, found, least)

    for i in reversed(range(COARSE)):
        offer(like.new_full(best.shape, i / COARSE))
    step = 0.5 / COARSE
    for _ in range(2):
        centre = best
        for sign in (1, -1):
            offer((centre + sign * step).clamp(0, 1))
        step /= 2
    return best, least


def cosine_rates(start: float, end: float, steps: int) -> list[float]:
    """Learning rates from `start` down to `end` along half a cosine, one for each step."""
    span = max(1, steps - 1)
    return [end + (start - end) * (1 + math.cos(math.pi * i / span)) / 2 for i in range(steps)]
