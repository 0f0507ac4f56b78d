"""Gradient descent on a tensor with one row for each sequence: rows never mix.

Legend: `B` sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

OPTIMIZERS = ("adam", "sgd")


def descend(
    loss: Callable[[Tensor], Tensor],
    start: Tensor,
    rates: Sequence[float],
    moves: Tensor,
    optimizer: str = "adam",
    project: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """One step for each rate.

    Args:
        loss: `x [B, ...]` -> `[B]`, each row's loss from its own row of `x` alone.
        start: `[B, ...]`. rates: learning rate of each step.
        moves: how strongly entries move, broadcast to `x`; 0 keeps one where it is.
        optimizer: `adam` (betas 0.9 and 0.999, epsilon 1e-8) or `sgd`.
        project: applied to `x` after each step.

    Returns:
        The last `x`, and the loss `[B]` before each step.
    """
    x = start
    mean, square = torch.zeros_like(start), torch.zeros_like(start)
    curve: list[Tensor] = []
    for step, rate in enumerate(rates, 1):
        variable = x.detach().requires_grad_(True)
        with torch.enable_grad():
            rows = loss(variable)
            gradient = torch.autograd.grad(rows.sum(), variable)[0]
        curve.append(rows.detach())
        direction = gradient
        if optimizer == "adam":
            mean = 0.9 * mean + 0.1 * gradient
            square = 0.999 * square + 0.001 * gradient**2
            direction = (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
        x = x - rate * moves * direction
        if project is not None:
            x = project(x)
    return x, curve
