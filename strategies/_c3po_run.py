"""C3PO during one call: the prompt is read, neighbours are asked, a pathway is fitted, and kept if it helps.

Legend: `B` sequences, `m` texts with answers each, `R = B * m` rows, `L` MoE layers, `E` experts, `N` tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import isfinite
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ttrouting.clock import Clock
from ttrouting.context import Context
from ttrouting.descent import descend
from ttrouting.errors import UnsupportedCallError
from ttrouting.objective import divergence, mean_loss, token_losses
from ttrouting.opening import Opening
from ttrouting.pathways import recording
from ttrouting.rows import Rows
from ttrouting.scoring import SMALLEST, logits_of
from ttrouting.session import Session
from ttrouting.sites import Site
from ttrouting.strategies._neighbourhood import AnsweredTexts, Neighbourhood, ask, neighbours_texts, own_texts
from ttrouting.strategies._surrogates import core_experts, cosine_rates, mean_pathway, search_alpha
from ttrouting.strategy import RoutingRun, finite
from ttrouting.tail import Tail

if TYPE_CHECKING:
    from ttrouting.strategies.c3po import C3PO

END_RATE = 1e-5
RATES = {"last_prompt_token": 1e-2, "all": 0.1}  # first learning rates: on scores, on logits


class C3PORun(RoutingRun):
    """Overrides of the sequences of one call.

    Attributes:
        value: `[B, L, E]`, scores that stand in at one token, or (`scope="all"`) a delta on logits.
        on: `[B]` bool, which sequences have one. at: `[B]`, position of the token.
    """

    strategy: C3PO

    def __init__(self, strategy: C3PO, session: Session) -> None:
        super().__init__(strategy, session)
        sites, device = session.sites, session.keys.device
        self.sizes = [s.num_experts for s in sites]
        dtype = torch.float64 if sites[0].edit_dtype == torch.float64 else torch.float32
        self.value = torch.zeros(session.sequences, len(sites), max(self.sizes), dtype=dtype, device=device)
        self.on = torch.zeros(session.sequences, dtype=torch.bool, device=device)
        self.at = torch.zeros(session.sequences, dtype=torch.int64, device=device)
        self.first = strategy.first_layer(len(sites))
        self.facts: list[dict[str, Any]] = [{} for _ in range(session.sequences)]
        self._texts_at: Tensor | None = None  # [R], while texts with answers are read

    # --- tap --------------------------------------------------------------------------------------

    def edit_logits(self, site: Site, logits: Tensor, rows: Rows) -> Tensor:
        """At the one token the logits of the overriding scores; or `z + delta` at every token."""
        if site.index < self.first:
            return logits
        value = self.value[:, site.index, : site.num_experts].to(logits)  # [B, E]
        on = self.on.to(value.device)
        if self.strategy.scope == "all":
            return logits + rows.per_token(torch.where(on[:, None], value, 0), logits.device)
        at = self.at[rows.sequence] if self._texts_at is None else self._texts_at
        here = rows.valid & (rows.position == at[:, None]) & self.on[rows.sequence][:, None]  # [rows, S]
        override = rows.per_token(logits_of(site.scoring, value), logits.device)  # [N, E]
        return torch.where(here.flatten().to(logits.device)[:, None], override, logits)

    # --- life -------------------------------------------------------------------------------------

    def prepare(self, context: Context) -> None:
        """Read the prompt, ask the neighbours, fit, and keep what helps."""
        options, target = self.strategy, self.session.plan.target
        clock = Clock()
        self.at, self.on = context.mask.sum(1) - 1, torch.zeros_like(self.on)
        tail = self.session.tail(self.first)
        opening = Opening(self.session, replace(context, targets=torch.zeros_like(context.targets)), tail)
        with recording(self.session, self.at) as recorder:
            _, log_before = opening.begin()
        omega = recorder.omega().to(self.value)  # [B, L, E]
        clock.lap("read")
        near = None if options.labels is not None else ask(options, target, context, recorder, omega)
        clock.lap("retrieve")
        texts = None
        if options.labels is not None:
            texts = own_texts(options.labels, target, context, omega)
        elif near is not None and options.reads_answers(target):
            texts = neighbours_texts(near, target, context.ids.device)
        start = torch.zeros_like(omega) if options.scope == "all" else omega
        core = core_experts(omega, self.sizes, self.first, options.core_experts)
        self.on = torch.ones_like(self.on)
        answers = None if texts is None else _Answers(self, texts)
        before = None if answers is None else answers.losses(start)  # [B, m]
        clock.lap("neighbours")
        facts: dict[str, Any] = {}
        if near is not None and options.surrogate != "ngd":
            value, facts["alpha"] = self._mix(near, answers, omega, core)
        elif answers is not None:
            value, facts["curve"] = self._descend(answers, start, core)
        clock.lap("fit")
        if answers is not None and before is not None:
            after = answers.losses(value)
            facts |= {"loss_before": answers.weighted(before), "loss_after": answers.weighted(after)}
            if near is not None and target.no_harm:
                held = near.held.clamp_min(0)[:, None]
                facts["held_back_before"] = before.gather(1, held)[:, 0]
                facts["held_back_after"] = after.gather(1, held)[:, 0]
        self.value = value
        scope_all = options.scope == "all"
        log_after = opening.end()[1] if scope_all else opening.next_token()
        facts["kl"] = divergence(log_after, log_before)
        clock.lap("judge")
        self._judge(near, facts, clock.milliseconds)
        if not bool(self.on.any()):
            opening.undo()
        elif scope_all and not bool(self.on.all()):
            opening.end()  # rows that took their delta back have its entries in the cache

    def expand(self, repeats: int) -> None:
        self.value, self.on, self.at = (t.repeat_interleave(repeats, 0) for t in (self.value, self.on, self.at))
        self.facts = [dict(facts) for facts in self.facts for _ in range(repeats)]

    def restore(self, state: Mapping[str, Tensor]) -> None:
        if "value" not in state:
            return
        value = state["value"]
        if value.shape != self.value.shape:
            raise UnsupportedCallError(
                f"This state's pathways have shape {tuple(value.shape)}, the call needs {tuple(self.value.shape)} "
                "(sequences, layers, experts). Start without state."
            )
        finite(self.strategy.name, "state", value)
        self.value, self.on, self.at = value.to(self.value), state["on"].to(self.on), state["at"].to(self.at)

    def state(self) -> dict[str, Tensor]:
        return {"value": self.value.clone(), "on": self.on.clone(), "at": self.at.clone()}

    def report(self, sequence: int) -> dict[str, Any]:
        return self.facts[sequence] or {"outcome": "not adapted"}

    # --- surrogates -------------------------------------------------------------------------------

    def _descend(self, answers: _Answers, start: Tensor, core: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Neighbourhood gradient descent from `start [B, L, E]` on the entries in `core`; with its loss curve."""
        options = self.strategy
        first = RATES[options.scope] if options.lr is None else options.lr
        rates = cosine_rates(first, min(END_RATE, first), options.steps)
        project = self._to_scores if options.scope == "last_prompt_token" else None
        return descend(lambda v: answers.weighted(answers.losses(v)), start, rates, core.to(start), project=project)

    def _to_scores(self, value: Tensor) -> Tensor:
        """`[B, L, E]` in the range of scores: above 0, and below 1 for sigmoids. Beyond it there is no gradient."""
        highest = [1 - SMALLEST if s.scoring == "sigmoid" else float("inf") for s in self.session.sites]
        return torch.minimum(value.clamp_min(SMALLEST), value.new_tensor(highest)[:, None])

    def _mix(
        self, near: Neighbourhood, answers: _Answers | None, omega: Tensor, core: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Towards the neighbours' mean pathway, `w <- alpha w + (1 - alpha) w^`, on the entries in `core`."""
        options = self.strategy
        mean = torch.where(core, mean_pathway(near.weights, near.pathways(omega)), omega)

        def value(alpha: Tensor) -> Tensor:
            share = alpha[:, None, None]
            mixed = share * omega + (1 - share) * mean
            return mixed if options.scope == "last_prompt_token" else torch.where(core, self._delta(omega, mixed), 0)

        if options.alpha is not None or answers is None:
            alpha = omega.new_full(omega.shape[:1], 1.0 if options.alpha is None else options.alpha)
        else:
            alpha, _ = search_alpha(lambda a: answers.weighted(answers.losses(value(a))), omega)
        return value(alpha), alpha

    def _delta(self, own: Tensor, wanted: Tensor) -> Tensor:
        """`[B, L, E]`, what to add to logits so that scores `own` become `wanted`."""
        delta = torch.zeros_like(own)
        for site in self.session.sites[self.first :]:
            there, here = (logits_of(site.scoring, s[:, site.index, : site.num_experts]) for s in (wanted, own))
            delta[:, site.index, : site.num_experts] = there - here
        return delta

    # --- outcome ----------------------------------------------------------------------------------

    def _judge(self, near: Neighbourhood | None, facts: dict[str, Any], milliseconds: dict[str, float]) -> None:
        """Keep the pathways that help, and write down what happened to each sequence."""
        names = [s.name for s in self.session.sites[self.first :]]
        curve = facts.pop("curve", None)
        for i in range(len(self.facts)):
            note: dict[str, Any] = {name: float(values[i]) for name, values in facts.items()}
            note["outcome"] = self._outcome(near, i, note)
            note |= {"surrogate": self.strategy.surrogate, "layers": names, "milliseconds": milliseconds}
            if curve is not None:
                note["curve"] = [float(values[i]) for values in curve]
            if near is not None:
                note["neighbours"] = near.describe(i)
            self.facts[i] = note
        self.on = torch.tensor([f["outcome"] == "accepted" for f in self.facts], device=self.on.device)

    def _outcome(self, near: Neighbourhood | None, i: int, note: dict[str, Any]) -> str:
        numbers = (note["kl"], note.get("loss_after", 0.0), note.get("held_back_after", 0.0))
        if near is not None and not bool(near.weights[i].any()):
            return "skipped: too few references are near enough"
        if not all(isfinite(n) for n in numbers):
            return "rolled back: the adapted loss is no number"
        if near is None or not self.session.plan.target.no_harm:
            return "accepted"
        before, after = note["held_back_before"], note["held_back_after"]
        if not after < before:
            return f"rolled back: loss of the neighbour held back {before:.3f} -> {after:.3f}"
        if note["kl"] > self.strategy.kl_limit:
            return f"rolled back: next-token KL {note['kl']:.2f} over {self.strategy.kl_limit:g}"
        return "accepted"


class _Answers:
    """Losses of known answers, with a pathway put into the forwards of their texts."""

    def __init__(self, run: C3PORun, texts: AnsweredTexts) -> None:
        self._run, self._texts = run, texts
        self._tail: Tail | None = None  # captured by the first reading
        self.weighted = texts.weighted

    def losses(self, value: Tensor) -> Tensor:
        """Mean loss of each answer in nats, `[B, m]`, under `value [B, L, E]`. Differentiable from the second on."""
        run, texts, session = self._run, self._texts, self._run.session
        run.value, run._texts_at = value, texts.at
        try:
            if self._tail is None:
                self._tail = session.tail(run.first)
                with self._tail.capture():
                    losses, _ = token_losses(session, texts.context)
            else:
                losses, _ = token_losses(session, texts.context, self._tail)
        finally:
            run._texts_at = None
        return mean_loss(losses, texts.context.targets).view(texts.weights.shape).to(value)
