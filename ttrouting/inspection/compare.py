"""What differs between two traces of the same tokens: experts gained and lost, layer by layer.

Legend: `T` tokens, `L` layers, `E` experts, `K` columns of experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ttrouting.errors import ConfigError
from ttrouting.trace import NO_EXPERT, RoutingTrace

Pair = tuple[float, float]


@dataclass(frozen=True)
class LayerChange:
    """One layer. Shares are of all tokens; pairs are (base, adapted).

    Attributes:
        index, name: of the layer. changed: share of tokens with another set of experts.
        gained, lost: mean number of experts a token gained, and lost.
        experts_gained, experts_lost: `(expert, share of tokens that gained or lost it)`, largest first.
        k: mean experts a token. entropy: mean of the router in nats; None if unknown.
    """

    index: int
    name: str
    changed: float
    gained: float
    lost: float
    experts_gained: list[tuple[int, float]]
    experts_lost: list[tuple[int, float]]
    k: Pair
    entropy: Pair | None


@dataclass(frozen=True, eq=False)
class Difference:
    """Attributes:
    gained: `[T, L, K]` bool, entries of the adapted ids that base lacks there.
    lost: `[T, L, K]` bool, entries of the base ids that the adapted trace lacks there.
    """

    base: RoutingTrace
    adapted: RoutingTrace
    gained: Tensor
    lost: Tensor

    @property
    def changed(self) -> Tensor:
        """`[T, L]` bool, where the set of experts differs."""
        return self.gained.any(-1) | self.lost.any(-1)

    def layers(self) -> list[LayerChange]:
        """All layers, the most changed first; equal ones in the order of the model."""
        found = [self._layer(i) for i in range(len(self.base.layers))]
        return sorted(found, key=lambda c: (-(c.gained + c.lost), c.index))

    def _layer(self, i: int) -> LayerChange:
        base, adapted = self.base, self.adapted
        before, after = (None if t.entropy is None else float(t.entropy[:, i].mean()) for t in (base, adapted))
        return LayerChange(
            i,
            base.layers[i],
            float(self.changed[:, i].float().mean()),
            float(self.gained[:, i].sum(-1).float().mean()),
            float(self.lost[:, i].sum(-1).float().mean()),
            _shares(adapted, self.gained, i),
            _shares(base, self.lost, i),
            (float(base.k[:, i].float().mean()), float(adapted.k[:, i].float().mean())),
            None if before is None or after is None else (before, after),
        )


def compare(base: RoutingTrace, adapted: RoutingTrace) -> Difference:
    """What the adapted trace has and base has not, and the other way round.

    Raises:
        ConfigError: other tokens, layers, or number of experts.
    """
    for name in ("num_experts", "layers", "tokens"):
        before, after = getattr(base, name), getattr(adapted, name)
        if before != after:
            told = (
                f"{before} and {after}" if name == "num_experts" else f"{len(before)} and {len(after)}, or other ones"
            )
            raise ConfigError(
                f"These traces differ in their {name} ({told}), so token cannot be compared with token. "
                "Trace the same text on the same model."
            )
    return Difference(base, adapted, _absent(adapted.ids, base.ids), _absent(base.ids, adapted.ids))


def _absent(ids: Tensor, others: Tensor) -> Tensor:
    """`[T, L, K]` bool: experts among `ids` that are not among `others` at the same place."""
    found = torch.zeros_like(ids, dtype=torch.bool)
    for column in range(others.shape[-1]):  # a table of all pairs would hold K times as much
        found |= ids == others[..., column : column + 1]
    return ~found & (ids != NO_EXPERT)


def _shares(trace: RoutingTrace, chosen: Tensor, layer: int) -> list[tuple[int, float]]:
    counts = torch.bincount(trace.ids[:, layer][chosen[:, layer]].long(), minlength=trace.num_experts)
    order = counts.argsort(descending=True, stable=True)[: int((counts > 0).sum())].tolist()
    return [(expert, int(counts[expert]) / len(trace.tokens)) for expert in order]
