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
    """Filled by `summarise`; one entry a layer, padding left out.

    Attributes:
        confidence: `[B]` each, `-(1/K) sum_j log p_j` over the chosen experts, mean over tokens
            (arXiv 2510.14853).
        entropy: `[B]` each, mean entropy of `pi` in nats.
        usage: `[B, E]` each, share of tokens that chose the expert.
    """

    confidence: dict[int, Tensor] = field(default_factory=dict)
    entropy: dict[int, Tensor] = field(default_factory=dict)
    usage: dict[int, Tensor] = field(default_factory=dict)

    def stacked(self, name: str, device: torch.device) -> Tensor:
        """`[B, L]` of `confidence` or `entropy`."""
        values: dict[int, Tensor] = getattr(self, name)
        return torch.stack([values[i].to(device) for i in sorted(values)], 1)

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
            count = valid.sum(1).clamp_min(1)
            shape = (rows.batch, rows.length)
            self.confidence[site.index] = (confidence.view(shape) * valid).sum(1) / count
            self.entropy[site.index] = (entropy.view(shape) * valid).sum(1) / count
            hits = torch.zeros_like(pi).scatter_add(1, ids.clamp_max(site.num_experts - 1), used.to(pi.dtype))
            per_row = (hits * valid.flatten()[:, None]).view(*shape, -1).sum(1)
            self.usage[site.index] = per_row / count[:, None]


@contextmanager
def summarise(session: Session) -> Iterator[RoutingSummary]:
    """Watch the forwards inside the block; the last one counts."""
    summary = RoutingSummary()
    session.observers.append(summary.observe)
    try:
        yield summary
    finally:
        session.observers.remove(summary.observe)


def changes(
    before: RoutingSummary, after: RoutingSummary, sequence: int, names: list[str], most: int = 3
) -> list[dict[str, Any]]:
    """Experts gained and lost by a sequence in each layer, as shares of its tokens, largest first."""
    found = []
    for layer in sorted(after.usage):
        shift = (after.usage[layer][sequence] - before.usage[layer][sequence].to(after.usage[layer])).cpu()
        order = shift.argsort(descending=True).tolist()
        gained = [(e, round(float(shift[e]), 4)) for e in order[:most] if shift[e] > 0]
        lost = [(e, round(float(shift[e]), 4)) for e in reversed(order[-most:]) if shift[e] < 0]
        if gained or lost:
            found.append({"layer": names[layer], "gained": gained, "lost": lost})
    return found
