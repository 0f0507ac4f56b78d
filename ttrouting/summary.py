"""Watch one forward and sum up how each layer routed: confidence, entropy, which experts were used.

Legend: `B` sequences, `S` tokens, `N = B * S`, `L` layers, `E` experts, `K` per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ttrouting.rows import Rows
from ttrouting.session import Session
from ttrouting.sites import Site
from ttrouting.taps import Call


@dataclass
class RoutingSummary:
    """Sums over the tokens of the forwards inside `summarise`, padding left out; one tensor a layer.

    Attributes:
        tokens: `[B]`, how many were routed.
        confidence: `[B]`, of `-(1/K) sum_j log p_j` over the chosen experts (arXiv 2510.14853).
        entropy: `[B]`, of the entropy of `pi` in nats.
        usage: `[B, E]`, how many chose the expert.
    """

    tokens: dict[int, Tensor] = field(default_factory=dict)
    confidence: dict[int, Tensor] = field(default_factory=dict)
    entropy: dict[int, Tensor] = field(default_factory=dict)
    usage: dict[int, Tensor] = field(default_factory=dict)

    def means(self, name: str, device: torch.device) -> Tensor:
        """`[B, L]`, the mean `confidence` or `entropy` of a token."""
        sums: dict[int, Tensor] = getattr(self, name)
        return torch.stack([(sums[i] / self.tokens[i].clamp_min(1)).to(device) for i in sorted(sums)], 1)

    def share(self, layer: int, sequence: int) -> Tensor:
        """`[E]`, the share of a sequence's tokens that chose each expert."""
        return (self.usage[layer][sequence] / self.tokens[layer][sequence].clamp_min(1)).cpu()

    def observe(self, site: Site, call: Call, ids: Tensor, weights: Tensor, rows: Rows) -> None:
        """An observer for `Session.observers`."""
        with torch.no_grad():
            pi = call.probabilities().detach()  # [N, E]
            log = pi.clamp_min(1e-20).log()
            inside = ids < site.num_experts
            chosen = log.gather(1, ids.clamp_max(site.num_experts - 1))  # [N, K]
            used = inside & (weights != 0)
            confidence = -(chosen * used).sum(1) / used.sum(1).clamp_min(1)  # [N]
            entropy = -(pi * log).sum(1)  # [N]
            valid = rows.valid.to(pi.device)
            shape = (rows.batch, rows.length)
            hits = torch.zeros_like(pi).scatter_add(1, ids.clamp_max(site.num_experts - 1), used.to(pi.dtype))
            sums = {
                "tokens": valid.sum(1),
                "confidence": (confidence.view(shape) * valid).sum(1),
                "entropy": (entropy.view(shape) * valid).sum(1),
                "usage": (hits * valid.flatten()[:, None]).view(*shape, -1).sum(1),
            }
            for name, found in sums.items():
                kept: dict[int, Tensor] = getattr(self, name)
                kept[site.index] = kept[site.index] + found if site.index in kept else found


@contextmanager
def summarise(session: Session) -> Iterator[RoutingSummary]:
    """Watch the forwards inside the block."""
    summary = RoutingSummary()
    session.observers.append(summary.observe)
    try:
        yield summary
    finally:
        session.observers.remove(summary.observe)


def changes(
    before: RoutingSummary, after: RoutingSummary, sequence: int, names: list[str], most: int = 3
) -> list[dict[str, Any]]:
    """Experts gained and lost by a sequence in each layer, as shares of its tokens, largest first.

    Layers below a replayed tail are left out: nothing changed there, and not all of the text was read again.
    """
    found = []
    for layer in sorted(after.usage):
        if int(after.tokens[layer][sequence]) != int(before.tokens[layer][sequence]):
            continue
        shift = after.share(layer, sequence) - before.share(layer, sequence)
        order = shift.argsort(descending=True).tolist()
        gained = [(e, round(float(shift[e]), 4)) for e in order[:most] if shift[e] > 0]
        lost = [(e, round(float(shift[e]), 4)) for e in reversed(order[-most:]) if shift[e] < 0]
        if gained or lost:
            found.append({"layer": names[layer], "gained": gained, "lost": lost})
    return found
