"""Rerouting: small vectors on router logits, optimised on the prompt itself (arXiv 2510.14853).

Legend: `B` sequences, `T` tokens, `L` MoE layers, `E` experts, `N` tokens of a forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any, ClassVar

import torch
from torch import Tensor

from ttrouting.context import Context
from ttrouting.descent import OPTIMIZERS, descend
from ttrouting.errors import ConfigError, UnsupportedModelError
from ttrouting.gradients import check_gradients
from ttrouting.head import check_head
from ttrouting.layers import LayerRule
from ttrouting.objective import MIN_LOSS_TOKENS, divergence, mean_loss, split_targets
from ttrouting.opening import Opening
from ttrouting.rows import Rows
from ttrouting.session import Session
from ttrouting.sites import Site
from ttrouting.spans import check_loss_on, narrow_targets
from ttrouting.strategy import RoutingRun, RoutingStrategy, in_range, one_of, overrides, restored_delta
from ttrouting.summary import RoutingSummary, changes, summarise
from ttrouting.tail import Tail
from ttrouting.target import Target


@dataclass(frozen=True)
class Rerouting(RoutingStrategy):
    """Add `delta[l] in R^E` to the router logits of each layer, optimised on the context.

    The loss is next-token cross-entropy of the text so far, in nats. One delta for each sequence, shared by
    its tokens, zero at its start. With `no_harm` the last max(8, T/4) loss tokens are held back, and a
    sequence whose loss does not fall there keeps its base routing.

    Args:
        steps: optimiser steps per adaptation. lr: step size (paper: 5 and 0.05).
        interval: generated tokens between adaptations (paper: 128), or None for the prompt only.
        optimizer: `adam` or `sgd` (the paper does not say; Adam matches its figures).
        layers: which layers: `highest:R` | `lowest:R` | `entropy:R` | `random:R` | `last:N` | `all` | `soft`. By
            default the upper half: each step then runs half of the model (paper: `highest:0.5`).
        refresh_kv: after an adaptation at an interval, compute the KV cache anew under the new delta; False
            keeps the old entries.
        loss_on: `all`, a regular expression whose match (or first group) counts, such as `"A: .*"`, or
            `assistant` for the assistant turns of the chat template. Both need a tokenizer.
        kl_limit: largest KL(adapted || base) of the next token, in nats, that `no_harm` accepts.
        seed: for `layers="random:R"`.
        recompute: keep the activations of one layer instead of all that are run, and compute them again in the
            backward pass: one more forward of these layers a step, bounded memory.
    """

    name: ClassVar[str] = "rerouting"
    summary: ClassVar[str] = "optimise router logits on the prompt; about 3 forwards a step at prefill, decode free"
    order: ClassVar[int] = 40
    unique: ClassVar[bool] = True
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "steps": (5, 10, 20),
        "lr": (0.02, 0.05, 0.1),
        "layers": ("last:0.5", "all"),
    }
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {  # the share of layers and the optimiser are not published; see the options
            "steps": 5,
            "lr": 0.05,
            "interval": 128,
            "optimizer": "adam",
            "layers": "highest:0.5",
            "loss_on": "all",
        }
    }

    steps: int = 5
    lr: float = 0.05
    interval: int | None = 128
    optimizer: str = "adam"
    layers: str = "last:0.5"
    refresh_kv: bool = True
    loss_on: str = "all"
    kl_limit: float = 5.0
    seed: int = 0
    recompute: bool = False

    def __post_init__(self) -> None:
        in_range(self.name, "steps", self.steps, 0, 10_000, whole=True)
        in_range(self.name, "lr", self.lr, 0, 100)
        if self.interval is not None:
            in_range(self.name, "interval", self.interval, 1, whole=True)
        one_of(self.name, "optimizer", self.optimizer, OPTIMIZERS)
        in_range(self.name, "kl_limit", self.kl_limit, 0, open_low=True)
        for option in ("refresh_kv", "recompute"):
            if not isinstance(getattr(self, option), bool):
                raise ConfigError(f"rerouting.{option} must be True or False, got {getattr(self, option)!r}.")
        in_range(self.name, "seed", self.seed, 0, whole=True)
        check_loss_on(self.loss_on)
        object.__setattr__(self, "layers", str(LayerRule.parse(self.layers)))

    @property
    def identity(self) -> bool:
        """No step, no change."""
        return self.steps == 0 or self.lr == 0

    def check(self, target: Target) -> None:
        """The model must give logits and gradients; a pattern needs a tokenizer."""
        if not getattr(target.model, "can_generate", lambda: False)():
            raise UnsupportedModelError(
                f"rerouting needs next-token logits, and {type(target.model).__name__} has no causal language-model "
                "head. Load the ...ForCausalLM class."
            )
        check_loss_on(self.loss_on, target.tokenizer)
        if not self.identity:
            check_gradients(self.name, target)
            check_head(target)

    def start(self, session: Session) -> RoutingRun:
        """Deltas of zero for each sequence."""
        return ReroutingRun(self, session)


class ReroutingRun(RoutingRun):
    """Deltas of the sequences of one call, and what became of them."""

    strategy: Rerouting

    def __init__(self, strategy: Rerouting, session: Session) -> None:
        super().__init__(strategy, session)
        widest = max(s.num_experts for s in session.sites)
        dtype = torch.float64 if session.sites[0].edit_dtype == torch.float64 else torch.float32
        self.delta = torch.zeros(
            session.sequences, len(session.sites), widest, dtype=dtype, device=session.keys.device
        )
        self.history: list[list[dict[str, Any]]] = [[] for _ in range(session.sequences)]
        self.rule = LayerRule.parse(strategy.layers)
        self.layers: Tensor | None = None  # [B, L], how strongly each is updated; chosen at the first adaptation
        self._tail: Tail | None = None  # while decoding is followed

    # --- tap --------------------------------------------------------------------------------------

    def edit_logits(self, site: Site, logits: Tensor, rows: Rows) -> Tensor:
        """`z + delta`, before the family's scoring."""
        delta = self.delta[:, site.index, : site.num_experts].to(logits)
        return logits + rows.per_token(delta, logits.device)

    # --- life -------------------------------------------------------------------------------------

    def prepare(self, context: Context) -> None:
        """Phase 1 on the prompt."""
        tail, session = self._optimise(context, torch.ones_like(context.mask[:, 0])), self.session
        alone = all(run is self or not overrides(run, "adapt") for run in session.runs)
        if tail is not None and session.hands_over and alone and self.strategy.interval is not None:
            session.follow(tail)
            self._tail = tail

    def adapt(self, context: Context, active: Tensor) -> bool:
        """Phase 1 again on the longer text, carrying delta. Layers below those that change are not run again."""
        before, refresh = self.delta, self.strategy.refresh_kv
        if self._tail is not None:
            text = context.head().ids
            with self._tail.catch_up(*text.shape) as caught_up:
                if caught_up:
                    self._optimise(context, active, self._tail)
                    return False  # the cache was filled on the way
            self._tail = None
        self._optimise(context, active)
        return refresh and not torch.equal(before, self.delta)

    def expand(self, repeats: int) -> None:
        self.delta = self.delta.repeat_interleave(repeats, 0)
        if self.layers is not None:
            self.layers = self.layers.repeat_interleave(repeats, 0)
        self.history = [[dict(h) for h in past] for past in self.history for _ in range(repeats)]

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.delta = restored_delta(self.strategy.name, state, self.delta)

    def state(self) -> dict[str, Tensor]:
        return {"delta": self.delta.clone()}

    def report(self, sequence: int) -> dict[str, Any]:
        past = self.history[sequence]
        if not past:
            return {"outcome": "not adapted"}
        accepted = sum(phase["outcome"] == "accepted" for phase in past)
        outcome = past[0]["outcome"] if len(past) == 1 else f"accepted {accepted} of {len(past)} adaptations"
        return {**past[0], "outcome": outcome, "adaptations": past}

    # --- optimisation ------------------------------------------------------------------------------

    def _optimise(self, context: Context, active: Tensor, decoding: Tail | None = None) -> Tail | None:
        """One phase; `decoding`: the layers above what decoding has read already. Returns the layers that it ran."""
        options, session = self.strategy, self.session
        no_harm = session.plan.target.no_harm
        targets = narrow_targets(context, options.loss_on, session.plan.target.tokenizer)
        context = replace(context, targets=targets)
        fit, judge = split_targets(targets, no_harm)
        enough = targets.sum(1) >= (MIN_LOSS_TOKENS if no_harm else 1)  # [B]
        wanted = active & enough
        if not bool(wanted.any()):
            self._note(context, active, enough, None)
            return None
        old = self.delta
        tail = decoding or session.tail(self.rule.lowest(len(session.sites)), options.recompute)
        opening = Opening(session, context, tail, decoding is not None)
        with summarise(session) as base:
            losses, log_before = opening.begin()
        if self.layers is None:
            self.layers = self._layer_weights(base)
        if decoding is None:
            tail.climb(int(self.layers.any(0).nonzero()[0]))
        weights = self.layers * wanted[:, None]  # [B, L]
        fill = decoding is None or options.refresh_kv
        delta, curve = self._descend(opening, fit, old, weights)
        self.delta = delta
        with summarise(session) as adapted:
            losses_after, log_after = opening.end(fill)
        kl = divergence(log_after, log_before)  # [B]
        judge_before, judge_after = mean_loss(losses, judge), mean_loss(losses_after, judge)
        fine = (torch.isfinite(losses_after) | ~targets).all(1) & torch.isfinite(kl)
        if no_harm:
            fine &= (judge_after < judge_before) & (kl <= options.kl_limit)
        accepted = wanted & fine
        self.delta = torch.where(accepted[:, None, None], delta, old)
        if not bool(accepted.any()):
            opening.undo()
        elif not bool(accepted.all()):
            opening.end(fill)  # what some rows took back is in the cache
        facts = {
            "loss_before": mean_loss(losses, fit),
            "loss_after": mean_loss(losses_after, fit),
            "kl": kl,
        }
        if no_harm:
            facts |= {"held_back_before": judge_before, "held_back_after": judge_after}
        self._note(context, active, enough, (facts, accepted, weights, curve, base, adapted))
        return tail

    def _layer_weights(self, summary: RoutingSummary) -> Tensor:
        device = self.delta.device
        confidence, entropy = (summary.means(n, device) for n in ("confidence", "entropy"))
        return self.rule.weights(confidence, entropy, self.session.keys, self.strategy.seed).to(self.delta)

    def _descend(self, opening: Opening, fit: Tensor, start: Tensor, weights: Tensor) -> tuple[Tensor, list[Tensor]]:
        """`steps` steps from `start [B, L, E]`; layers move by `weights [B, L]`. Returns the loss curve too."""

        def loss(delta: Tensor) -> Tensor:
            self.delta = delta
            return mean_loss(opening.losses(), fit)

        rates = [self.strategy.lr] * self.strategy.steps
        try:
            return descend(loss, start, rates, weights[:, :, None], self.strategy.optimizer)
        finally:
            self.delta = start

    def _note(self, context: Context, active: Tensor, enough: Tensor, result: Any) -> None:
        """Write down what happened to each sequence that was asked to adapt."""
        counts = context.targets.sum(1).tolist()
        names = [s.name for s in self.session.sites]
        for i, (is_active, has_enough) in enumerate(zip(active.tolist(), enough.tolist(), strict=True)):
            if not is_active:
                continue
            phase: dict[str, Any] = {"tokens": int(context.mask[i].sum()), "loss_tokens": counts[i]}
            if not has_enough:
                phase["outcome"] = f"skipped: {counts[i]} loss tokens, {MIN_LOSS_TOKENS} are needed"
                self.history[i].append(phase)
                continue
            facts, accepted, weights, curve, base, adapted = result
            phase |= {name: float(values[i]) for name, values in facts.items()}
            phase["outcome"] = "accepted" if bool(accepted[i]) else self._why(phase)
            phase["layers"] = [names[j] for j in weights[i].nonzero().flatten().tolist()]
            phase["curve"] = [float(values[i]) for values in curve]
            phase["experts"] = changes(base, adapted, i, names) if bool(accepted[i]) else []
            self.history[i].append(phase)

    def _why(self, phase: dict[str, Any]) -> str:
        if not isfinite(phase["loss_after"]) or not isfinite(phase["kl"]):
            return "rolled back: the adapted loss is no number"
        before, after = phase["held_back_before"], phase["held_back_after"]
        if not after < before:
            return f"rolled back: held-back loss {before:.3f} -> {after:.3f}"
        return f"rolled back: next-token KL {phase['kl']:.2f} over {self.strategy.kl_limit:g}"
