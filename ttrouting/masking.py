"""Keep a router from choosing some experts, whatever its family scores with."""

from __future__ import annotations

import torch
from torch import Tensor

from ttrouting.errors import ConfigError
from ttrouting.sites import Site

MASKED = -1e9  # as a logit: finite, because softmax chains and soft-caps turn -inf into NaN


def check_keeps_enough(name: str, mask: Tensor, sites: list[Site]) -> None:
    """Raise unless each layer keeps at least `K` experts and chooses by score at all.

    Args:
        mask: `[L, E]` or `[B, L, E]` bool.
    """
    for site in sites:
        kept = mask[..., site.index, : site.num_experts].sum(-1)
        if not site.chooses and int(kept.min()) < site.num_experts:
            raise ConfigError(
                f"{name}.mask removes experts in {site.name}, whose experts are fixed by token id. "
                "Keep all experts of that layer."
            )
        if int(kept.min()) < site.top_k:
            raise ConfigError(
                f"{name}.mask keeps {int(kept.min())} experts in {site.name}, which chooses {site.top_k} per token. "
                f"Keep at least {site.top_k}."
            )


def mask_scores(scores: Tensor, kept: Tensor) -> Tensor:
    """Choice scores `[N, E]` under which only `kept [N, E]` experts win.

    Experts that are kept but excluded by a group limit (-inf) still beat masked ones: a mask is absolute,
    a group limit is not.
    """
    lowest = torch.finfo(scores.dtype).min
    return torch.where(kept, scores.clamp_min(lowest), float("-inf"))


def mask_selection(site: Site, ids: Tensor, weights: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Drop the weight of a masked expert that got through all the same (Zaya maps ids after its choice)."""
    if site.real_experts < site.num_experts:  # ids are no longer choices there
        return ids, weights
    return ids, weights * kept.gather(1, ids)
