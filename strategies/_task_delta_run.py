"""Task deltas during one call: a prompt is read, its task recognised, the task's delta added, and kept if it may be.

Legend: `B` sequences, `L` MoE layers, `E` experts, `N` tokens, `D` embedding dimension.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from ttrouting.clock import Clock
from ttrouting.context import Context
from ttrouting.objective import divergence
from ttrouting.opening import Opening
from ttrouting.pathways import recording
from ttrouting.rows import Rows
from ttrouting.session import Session
from ttrouting.sites import Site
from ttrouting.strategies._task_recognition import (
    Recognised,
    compared_texts,
    compared_tokens,
    mean_deltas,
    question_starts,
    recognise,
    refusal,
    told,
    verdict,
)
from ttrouting.strategy import RoutingRun, restored_delta
from ttrouting.summary import RoutingSummary, changes, summarise

if TYPE_CHECKING:
    from ttrouting.strategies.task_delta import TaskDelta


class TaskDeltaRun(RoutingRun):
    """Deltas of the sequences of one call.

    Attributes:
        delta: `[B, L, E]`, 0 for sequences that keep their base routing.
    """

    strategy: TaskDelta

    def __init__(self, strategy: TaskDelta, session: Session) -> None:
        super().__init__(strategy, session)
        sites = session.sites
        dtype = torch.float64 if sites[0].edit_dtype == torch.float64 else torch.float32
        widest = max(s.num_experts for s in sites)
        self.delta = torch.zeros(session.sequences, len(sites), widest, dtype=dtype, device=session.keys.device)
        self.first = strategy.bank.first
        self.facts: list[dict[str, Any]] = [{} for _ in range(session.sequences)]

    # --- tap --------------------------------------------------------------------------------------

    def edit_logits(self, site: Site, logits: Tensor, rows: Rows) -> Tensor:
        """`z + delta`, before the family's scoring."""
        if site.index < self.first:
            return logits
        delta = self.delta[:, site.index, : site.num_experts].to(logits)
        return logits + rows.per_token(delta, logits.device)

    # --- life -------------------------------------------------------------------------------------

    def prepare(self, context: Context) -> None:
        """Read the prompt, recognise its task, read it again under the task's delta."""
        session, clock = self.session, Clock()
        self.delta = torch.zeros_like(self.delta)
        opening = Opening(
            session, replace(context, targets=torch.zeros_like(context.targets)), session.tail(self.first)
        )
        with summarise(session) as base:
            query, log_before = self._embedding(context, opening)
        clock.lap("read")
        recognised = recognise(self.strategy, query)
        no_harm = session.plan.target.no_harm
        outcomes = [refusal(self.strategy, one, no_harm) for one in recognised]
        wanted = torch.tensor([not outcome for outcome in outcomes], device=self.delta.device)  # [B]
        clock.lap("recognise")
        adapted, kl = None, [0.0] * len(recognised)
        if bool(wanted.any()):
            self.delta = torch.where(wanted[:, None, None], mean_deltas(self.strategy, recognised, self.delta), 0)
            with summarise(session) as adapted:
                _, log_after = opening.end()
            kl = divergence(log_after, log_before).tolist()
            outcomes = [outcome or verdict(self.strategy, kl[i], no_harm) for i, outcome in enumerate(outcomes)]
            accepted = torch.tensor([outcome == "accepted" for outcome in outcomes], device=self.delta.device)
            self.delta = torch.where(accepted[:, None, None], self.delta, 0)
            if bool(accepted.any()) and not torch.equal(accepted, wanted):
                opening.end()  # rows that took their delta back have its entries in the cache
        if "accepted" not in outcomes:
            opening.undo()
        clock.lap("judge")
        for i, (one, outcome) in enumerate(zip(recognised, outcomes, strict=True)):
            self.facts[i] = self._note(i, one, outcome, kl[i], base, adapted) | {"milliseconds": clock.milliseconds}

    def expand(self, repeats: int) -> None:
        self.delta = self.delta.repeat_interleave(repeats, 0)
        self.facts = [dict(facts) for facts in self.facts for _ in range(repeats)]

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.delta = restored_delta(self.strategy.name, state, self.delta)

    def state(self) -> dict[str, Tensor]:
        return {"delta": self.delta.clone()}

    def report(self, sequence: int) -> dict[str, Any]:
        return self.facts[sequence] or {"outcome": "not adapted"}

    # --- what is compared -------------------------------------------------------------------------

    def _embedding(self, context: Context, opening: Opening) -> tuple[NDArray[Any], Tensor]:
        """Embeddings `[B, D]` of what is compared, and log-probabilities `[B, V]` of each next token."""
        options, target = self.strategy, self.session.plan.target
        starts = question_starts(options, target, context)
        if options.embeds is not None:
            return options.embeds.embed(compared_texts(starts, target, context)), opening.begin()[1]
        over = compared_tokens(starts, target, context)
        with recording(self.session, context.mask.sum(1) - 1, over) as recorder:
            _, log_before = opening.begin()
        return recorder.pooled().double().cpu().numpy(), log_before

    def _note(
        self,
        i: int,
        recognised: Recognised,
        outcome: str,
        kl: float,
        base: RoutingSummary,
        adapted: RoutingSummary | None,
    ) -> dict[str, Any]:
        """What happened to a sequence, as plain values."""
        names = [site.name for site in self.session.sites]
        moved = outcome == "accepted" and adapted is not None
        return {
            "outcome": outcome,
            **told(self.strategy, recognised),
            "kl": kl,
            "layers": names[self.first :] if moved else [],
            "experts": changes(base, adapted, i, names) if moved and adapted is not None else [],
        }
