"""Write a strategy: options in a frozen dataclass, and a run that holds what changes during one call.

    python demos/write_strategy.py

This one spreads a sequence's tokens over more experts: the more an expert was used so far, the lower its logit. In a
package of your own, name the class in pyproject.toml; from then on every command and `--set` knows it:

    [project.entry-points."ttrouting.strategies"]
    spread_load = "my_package:SpreadLoad"

Legend: `B` sequences, `N` tokens of a forward, `L` MoE layers, `E` experts, `K` per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

import ttrouting as ttr
from ttrouting.rows import Rows
from ttrouting.session import Session
from ttrouting.sites import Site
from ttrouting.strategy import in_range
from ttrouting.taps import Call


@dataclass(frozen=True)
class SpreadLoad(ttr.RoutingStrategy):
    """Subtract `strength` times an expert's share of the sequence's tokens so far from its router logit.

    Args:
        strength: in logits, for an expert that every token used; 0 changes nothing.
    """

    name: ClassVar[str] = "spread_load"
    summary: ClassVar[str] = "spread a sequence over more experts; costs one subtraction a layer"

    strength: float = 1.0

    def __post_init__(self) -> None:
        in_range(self.name, "strength", self.strength, 0)

    @property
    def identity(self) -> bool:
        return self.strength == 0

    def start(self, session: Session) -> ttr.RoutingRun:
        return Run(self, session)


class Run(ttr.RoutingRun):
    """Counts how often each sequence used each expert. A prompt is read in one go, so it is routed as it is."""

    strategy: SpreadLoad

    def __init__(self, strategy: SpreadLoad, session: Session) -> None:
        super().__init__(strategy, session)
        widest = max(site.num_experts for site in session.sites)
        self.used = torch.zeros(session.sequences, len(session.sites), widest)  # [B, L, E], never padding

    def edit_logits(self, site: Site, logits: Tensor, rows: Rows) -> Tensor:
        used = self.used[:, site.index, : site.num_experts]  # [B, E]
        share = site.top_k * used / used.sum(-1, keepdim=True).clamp_min(1)
        return logits - self.strategy.strength * rows.per_token(share.to(logits), logits.device)  # [N, E]

    def edit_selection(
        self, site: Site, call: Call, ids: Tensor, weights: Tensor, rows: Rows
    ) -> tuple[Tensor, Tensor]:
        chosen = ids.cpu()  # [N, K]; the layers of one model may be on several devices
        sequence = rows.sequence[rows.token_row].cpu()[:, None].expand_as(chosen)
        counted = rows.valid.flatten().cpu()[:, None].expand_as(chosen).to(self.used)
        self.used[:, site.index].index_put_((sequence, chosen), counted, accumulate=True)
        return ids, weights

    def expand(self, repeats: int) -> None:
        self.used = self.used.repeat_interleave(repeats, 0)

    def report(self, sequence: int) -> dict[str, Any]:
        used = self.used[sequence]
        return {"outcome": "applied", "busiest": float((used / used.sum(-1, keepdim=True)).max())}


def main() -> None:
    model, tokenizer = ttr.load_pocket()
    inputs = tokenizer("Q: 12+30\nA:", return_tensors="pt")
    for strength in (0.01, 1.0, 10.0):
        with ttr.adapt(model, SpreadLoad(strength)) as adapted:
            adapted.generate(**inputs, max_new_tokens=40, min_new_tokens=40, do_sample=False)
            busiest = adapted.report.sequences[0].strategies["spread_load"]["busiest"]
        print(f"strength {strength:5}: the busiest expert of any layer has {busiest:.0%} of its layer's tokens")


if __name__ == "__main__":
    main()
