"""Given tensors: a delta on router logits, a mask over experts, the same for every token.

Legend: `B` sequences, `L` MoE layers, `E` experts, `N` tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from ttrouting.errors import ConfigError
from ttrouting.masking import check_keeps_enough, mask_scores, mask_selection
from ttrouting.rows import Rows
from ttrouting.session import Session
from ttrouting.sites import Site
from ttrouting.strategy import RoutingRun, RoutingStrategy, finite, same_model
from ttrouting.taps import Call
from ttrouting.target import Target


@dataclass(frozen=True, eq=False)
class StaticRouting(RoutingStrategy):
    """Apply given tensors.

    Args:
        delta: `[L, E]` for every sequence, or `[B, L, E]` for each; added to router logits before scoring.
        mask: `[L, E]` or `[B, L, E]` bool; experts that are False are never chosen. At least `K` a layer.
        fingerprint: the model it was made on, if known; checked then.
    """

    name: ClassVar[str] = "static_routing"
    summary: ClassVar[str] = "apply a given delta or mask; costs one addition a layer"
    order: ClassVar[int] = 10

    delta: Tensor | None = None
    mask: Tensor | None = None
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        for option, value in (("delta", self.delta), ("mask", self.mask)):
            if value is None:
                continue
            if not isinstance(value, Tensor) or value.dim() not in (2, 3):
                shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ConfigError(f"static_routing.{option} must be [L, E] or [B, L, E], got {shape}.")
        if self.delta is not None:
            finite(self.name, "delta", self.delta)
        if self.mask is not None and self.mask.dtype != torch.bool:
            raise ConfigError(f"static_routing.mask must be bool, got {self.mask.dtype}. Use mask.bool().")

    @property
    def identity(self) -> bool:
        """Without tensors nothing is to be done; a delta of zeros is applied all the same."""
        return self.delta is None and self.mask is None

    def check(self, target: Target) -> None:
        """Shapes against the model's sites."""
        same_model(self, self.fingerprint, target)
        layers = len(target.sites)
        widest = max(s.num_experts for s in target.sites)
        for option, value in (("delta", self.delta), ("mask", self.mask)):
            if value is not None and tuple(value.shape[-2:]) != (layers, widest):
                raise ConfigError(
                    f"static_routing.{option} has shape {tuple(value.shape)}; this model needs [{layers}, {widest}] "
                    f"or [B, {layers}, {widest}] (layers, experts)."
                )
        if self.mask is not None:
            check_keeps_enough(self.name, self.mask, target.sites)

    def start(self, session: Session) -> RoutingRun:
        """Taps only for the tensors that are given."""
        for option, value in (("delta", self.delta), ("mask", self.mask)):
            if value is not None and value.dim() == 3 and value.shape[0] != session.sequences:
                raise ConfigError(
                    f"static_routing.{option} has {value.shape[0]} sequences, the call has {session.sequences}."
                )
        kinds = {(True, False): _DeltaRun, (False, True): _MaskRun}
        return kinds.get((self.delta is not None, self.mask is not None), _BothRun)(self, session)


class _StaticRun(RoutingRun):
    strategy: StaticRouting

    def __init__(self, strategy: StaticRouting, session: Session) -> None:
        super().__init__(strategy, session)
        self.delta = self._per_sequence(strategy.delta)  # [B, L, E]
        self.mask = self._per_sequence(strategy.mask)  # [B, L, E]

    def _per_sequence(self, value: Tensor | None) -> Tensor | None:
        if value is None or value.dim() == 3:
            return value
        return value.expand(self.session.sequences, -1, -1)

    def expand(self, repeats: int) -> None:
        if self.delta is not None:
            self.delta = self.delta.repeat_interleave(repeats, 0)
        if self.mask is not None:
            self.mask = self.mask.repeat_interleave(repeats, 0)


class _DeltaRun(_StaticRun):
    def edit_logits(self, site: Site, logits: Tensor, rows: Rows) -> Tensor:
        delta = cast(Tensor, self.delta)[:, site.index, : site.num_experts].to(logits)
        return logits + rows.per_token(delta, logits.device)


class _MaskRun(_StaticRun):
    def _kept(self, site: Site, rows: Rows, device: torch.device) -> Tensor:
        return rows.per_token(cast(Tensor, self.mask)[:, site.index, : site.num_experts], device)  # [N, E]

    def edit_scores(self, site: Site, scores: Tensor, rows: Rows) -> Tensor:
        return mask_scores(scores, self._kept(site, rows, scores.device))

    def edit_selection(
        self, site: Site, call: Call, ids: Tensor, weights: Tensor, rows: Rows
    ) -> tuple[Tensor, Tensor]:
        return mask_selection(site, ids, weights, self._kept(site, rows, ids.device))


class _BothRun(_DeltaRun, _MaskRun):
    pass
