"""Expert masks from a few demonstrations (EASY-EP, arXiv 2504.06792).

Legend: `L` MoE layers, `E` experts, `K` per token, `N` tokens of a forward, `M` experts kept in a layer.
Off its domain a mask destroys quality: it belongs to a request, never to a process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor

from ttrouting.demonstrations import expert_scores
from ttrouting.errors import ConfigError
from ttrouting.masking import MASKED, check_keeps_enough, mask_scores, mask_selection
from ttrouting.rows import Rows
from ttrouting.session import Session
from ttrouting.sites import Site, find_sites
from ttrouting.strategy import RoutingRun, RoutingStrategy, in_range, one_of, same_model
from ttrouting.taps import Call
from ttrouting.target import Target


@dataclass(frozen=True, eq=False)
class ExpertMask(RoutingStrategy):
    """Let routers choose among some experts only.

    Args:
        mask: `[L, E]` bool, True for experts that stay; at least `K` a layer.
        at: `choice` masks the scores that the choice is made by and keeps the scale of the weights;
            `logits` masks before scoring, so that probability moves to the experts that stay.
        fingerprint: the model it was made on.
    """

    name: ClassVar[str] = "expert_mask"
    summary: ClassVar[str] = "only experts that a few demonstrations use; free, harmful off their domain"
    order: ClassVar[int] = 20
    unique: ClassVar[bool] = True

    mask: Tensor | None = None
    at: str = "choice"
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        one_of(self.name, "at", self.at, ("choice", "logits"))
        if not isinstance(self.mask, Tensor) or self.mask.dim() != 2 or self.mask.dtype != torch.bool:
            found = (
                f"{tuple(self.mask.shape)} {self.mask.dtype}" if isinstance(self.mask, Tensor) else repr(self.mask)
            )
            raise ConfigError(
                f"expert_mask.mask must be a bool tensor [layers, experts], got {found}. "
                "Make one with ExpertMask.from_demonstrations(model, tokenizer, texts, keep=...)."
            )

    @classmethod
    def from_demonstrations(
        cls, model: Any, tokenizer: Any, texts: Sequence[str], keep: float = 0.5, at: str = "choice"
    ) -> Self:
        """Score experts on texts (input plus the model's own output; the paper uses 25) and keep the best.

        The score of expert i is `sum_t s_t g_it ||e_i(h_t)||`, `s_t = 1 - cos(h_t, h_t + sum_i g_i e_i)`, with
        `g` its weight and `h_t` the input of the experts. Forward only, no gradient.

        Args:
            keep: experts kept in each layer, as a count (int) or a share (float in (0, 1]).

        Raises:
            ConfigError: no text, or fewer experts kept than the model chooses per token.
        """
        if not texts:
            raise ConfigError("ExpertMask.from_demonstrations needs at least one text; the paper uses 25.")
        sites = find_sites(model)
        target = Target(model, sites)
        scores = expert_scores(target, tokenizer, texts)  # [L, E]
        mask = torch.zeros_like(scores, dtype=torch.bool)
        for site in sites:
            count = _count(keep, site.num_experts)
            best = scores[site.index, : site.num_experts].topk(min(count, site.num_experts)).indices
            mask[site.index, best] = True
            if not site.chooses:
                mask[site.index, : site.num_experts] = True
        check_keeps_enough(cls.name, mask, sites)
        return cls(mask, at, target.fingerprint)

    @property
    def identity(self) -> bool:
        """A full mask changes nothing."""
        return self.mask is not None and bool(self.mask.all())

    def check(self, target: Target) -> None:
        """Shape, model, and at least `K` experts a layer."""
        same_model(self, self.fingerprint, target)
        need = (len(target.sites), max(s.num_experts for s in target.sites))
        if self.mask is None or tuple(self.mask.shape) != need:
            found = None if self.mask is None else tuple(self.mask.shape)
            raise ConfigError(f"expert_mask.mask has shape {found}; this model needs {need} (layers, experts).")
        check_keeps_enough(self.name, self.mask, target.sites)

    def start(self, session: Session) -> RoutingRun:
        """The mask has no state."""
        return _ChoiceRun(self, session) if self.at == "choice" else _LogitsRun(self, session)


def _count(keep: float, experts: int) -> int:
    if isinstance(keep, int) and not isinstance(keep, bool):
        in_range("expert_mask", "keep", keep, 1)
        return keep
    in_range("expert_mask", "keep", keep, 0, 1, open_low=True)
    return max(1, round(keep * experts))


class _MaskRun(RoutingRun):
    strategy: ExpertMask

    def kept(self, site: Site, like: Tensor) -> Tensor:
        """`[1, E]` bool on the right device."""
        return cast(Tensor, self.strategy.mask)[site.index, : site.num_experts].to(like.device)[None]

    def edit_selection(
        self, site: Site, call: Call, ids: Tensor, weights: Tensor, rows: Rows
    ) -> tuple[Tensor, Tensor]:
        """A masked expert that a group limit let through gets no weight."""
        return mask_selection(site, ids, weights, self.kept(site, ids).expand(ids.shape[0], -1))


class _ChoiceRun(_MaskRun):
    def edit_scores(self, site: Site, scores: Tensor, rows: Rows) -> Tensor:
        return mask_scores(scores, self.kept(site, scores))


class _LogitsRun(_MaskRun):
    def edit_logits(self, site: Site, logits: Tensor, rows: Rows) -> Tensor:
        return torch.where(self.kept(site, logits), logits, MASKED)

    def edit_scores(self, site: Site, scores: Tensor, rows: Rows) -> Tensor:
        # a correction bias or a group limit could still lift a masked expert over the others
        return mask_scores(scores, self.kept(site, scores))
