"""SCMoE: contrast the model's strong routing with a weak routing of itself (arXiv 2405.14507).

Legend: `B` sequences, `N` tokens of a forward, `E` experts, `K` per token, `V` vocabulary.
Both routings are rows of one forward: the strong rows first, the weak ones after them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import log
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ttrouting.context import Context
from ttrouting.errors import ConfigError, UnsupportedModelError, did_you_mean
from ttrouting.evaluation.statistics import ALPHA, fair_coin_tail
from ttrouting.head import CHUNK, check_head
from ttrouting.keyed import keyed_uniform
from ttrouting.objective import MIN_LOSS_TOKENS
from ttrouting.rows import Rows
from ttrouting.session import Session
from ttrouting.sites import Site
from ttrouting.spans import check_loss_on, narrow_targets
from ttrouting.strategy import DecodingRun, DecodingStrategy, in_range
from ttrouting.taps import Call
from ttrouting.target import Target

# Below the mask a token keeps its strong logit, this much lower: probability 0 in fp32 beside any token
# above the mask, yet in the strong order if a processor bans all of those.
BELOW = 1000.0


@dataclass(frozen=True)
class WeakRouting:
    """`rank:r` (only the expert of rank r, counted from 1), `top:n`, or `random`."""

    kind: str
    count: int = 1

    @classmethod
    def parse(cls, value: str) -> WeakRouting:
        """From text.

        Raises:
            ConfigError: unknown kind or a count below 1.
        """
        kind, _, count = value.partition(":") if isinstance(value, str) else ("", "", "")
        if kind not in ("rank", "top", "random"):
            raise ConfigError(f"scmoe.weak cannot be {value!r}.{did_you_mean(str(kind), ('rank', 'top', 'random'))}")
        if kind == "random":
            if count:
                raise ConfigError(f"scmoe.weak='random' takes no count, got {value!r}.")
            return cls(kind)
        if not count.isdigit() or int(count) < 1:
            raise ConfigError(f"scmoe.weak needs a whole number of at least 1 as in '{kind}:2', got {value!r}.")
        return cls(kind, int(count))


@dataclass(frozen=True)
class SCMoE(DecodingStrategy):
    """`z = (1 + beta) z_strong - beta z_weak` on tokens with `z_strong >= log(alpha) + max z_strong`.

    The weak stream has its own KV cache, prompt included. The end of a sequence is never banned.

    With `no_harm` the prompt is read once before it is answered, and its own tokens are predicted with and without
    contrast. Unless contrast turns so many more of the `judge_on` tokens right than wrong that a sign test has
    p < 0.05, or where there are under 16 of them, the sequence is decoded without it; and step by step beta is halved
    where the distribution moves too far.

    Args:
        alpha: plausibility threshold in (0, 1].
        beta: contrast strength, 0 or more; 0 changes nothing and runs no second row.
        weak: `rank:r` (default `rank:2`), `top:n` (the first n by choice score) or `random` (one expert).
            Weights are what the family would give: their usual sum where it renormalises, raw scores where
            it does not.
        kl_limit: with `no_harm`, beta is halved per step until KL(contrasted || strong), in nats, is within.
        judge_on: tokens of the prompt that `no_harm` looks at, as in Rerouting's `loss_on`: `all`, a regular
            expression whose match (or first group) counts, or `assistant`. The last two need a tokenizer. None: the
            prompt is not read beforehand, and the KL limit is all that `no_harm` does.
        seed: for `random`.
    """

    name: ClassVar[str] = "scmoe"
    summary: ClassVar[str] = "contrast strong with weak routing; two rows in every forward"
    scored_as: ClassVar[str] = "log-likelihoods are contrasted without the plausibility mask, and normalised"
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "beta": (0.1, 0.3, 0.5, 0.7, 0.9),
        "weak": ("rank:2", "random"),
    }

    alpha: float = 0.1
    beta: float = 0.5
    weak: str = "rank:2"
    kl_limit: float = 2.0
    judge_on: str | None = "all"
    seed: int = 0

    def __post_init__(self) -> None:
        in_range(self.name, "alpha", self.alpha, 0, 1, open_low=True)
        in_range(self.name, "beta", self.beta, 0, 100)
        in_range(self.name, "kl_limit", self.kl_limit, 0, open_low=True)
        in_range(self.name, "seed", self.seed, 0, whole=True)
        WeakRouting.parse(self.weak)
        if self.judge_on is not None:
            check_loss_on(self.judge_on, option="scmoe.judge_on")

    @property
    def identity(self) -> bool:
        """Without contrast nothing changes."""
        return self.beta == 0

    def check(self, target: Target) -> None:
        """The weak experts must exist, and their weight must be known; a pattern needs a tokenizer."""
        if self.judge_on is not None and target.no_harm and not self.identity:
            check_loss_on(self.judge_on, target.tokenizer, option="scmoe.judge_on")
            check_head(target)
        weak = WeakRouting.parse(self.weak)
        for site in target.sites:
            limit = site.num_experts if site.scoring != "other" and site.chooses else site.top_k
            if weak.kind == "top":
                limit = site.top_k
            if weak.kind != "random" and weak.count > limit:
                raise ConfigError(
                    f"scmoe.weak={self.weak!r} needs {weak.count} experts, {site.name} offers {limit}. "
                    f"Use '{weak.kind}:{limit}' or less."
                )
            if weak.kind == "random" and (site.scoring == "other" or not site.chooses):
                raise UnsupportedModelError(
                    f"scmoe.weak='random' needs a weight for any expert, and {site.name} has no rule for one that "
                    "was not chosen. Use 'rank:2'."
                )

    def start(self, session: Session) -> DecodingRun:
        """Counters of zero for each sequence."""
        return SCMoERun(self, session)


class Trial(NamedTuple):
    """Contrast on a prompt's own tokens: how many were looked at, how many it turned right, how many wrong."""

    tokens: int
    won: int
    lost: int

    @property
    def p_value(self) -> float:
        """Of the one-sided sign test: so few lost, or fewer, of those that changed, by chance."""
        return fair_coin_tail(self.lost, self.won + self.lost)

    @property
    def passed(self) -> bool:
        """Whether contrast may be used."""
        return self.tokens >= MIN_LOSS_TOKENS and self.p_value < ALPHA

    @property
    def words(self) -> str:
        """Why it may not."""
        if self.tokens < MIN_LOSS_TOKENS:
            return f"skipped: {self.tokens} tokens to judge by, {MIN_LOSS_TOKENS} are needed"
        return f"rolled back: on the prompt {self.won} tokens right for {self.lost} wrong, p = {self.p_value:.2g}"


def contrast(strong: Tensor, weak: Tensor, alpha: float, beta: float | Tensor, mask: bool = True) -> Tensor:
    """The contrasted logits `[..., V]` by the paper's formula, -inf below the threshold.

    `mask=False` leaves every token in, for log-likelihoods.
    """
    mixed = (1 + beta) * strong - beta * weak
    if not mask:
        return mixed
    plausible = strong >= log(alpha) + strong.amax(-1, keepdim=True)
    return mixed.masked_fill(~plausible, float("-inf"))


def mix(
    strong: Tensor, weak: Tensor, log_alpha: float | Tensor, beta: float | Tensor, kl_limit: float | Tensor | None
) -> tuple[Tensor, float | Tensor]:
    """The contrasted logits `[..., V]` to decode from, and the beta that was used.

    Args:
        log_alpha, beta, kl_limit: numbers, or tensors `[..., 1]`. kl_limit None: beta is used as it is.
    """
    plausible = strong >= log_alpha + strong.amax(-1, keepdim=True)
    if kl_limit is not None:
        beta = within_limit(strong, weak, plausible, beta, kl_limit)
    mixed = (1 + beta) * strong - beta * weak
    floor = torch.where(plausible, mixed, float("inf")).amin(-1, keepdim=True)
    below = strong - strong.amax(-1, keepdim=True) + floor - BELOW
    return torch.where(plausible, mixed, below), beta


def within_limit(
    strong: Tensor, weak: Tensor, plausible: Tensor, wanted: float | Tensor, kl_limit: float | Tensor
) -> Tensor:
    """`[..., 1]`: the largest of beta, beta/2, ... 0 whose KL from the strong logits is within the limit."""
    log_strong = strong.log_softmax(-1)
    chosen = torch.zeros_like(strong[..., :1])
    for beta in (wanted / 8, wanted / 4, wanted / 2, wanted):
        mixed = ((1 + beta) * strong - beta * weak).masked_fill(~plausible, float("-inf"))
        log_mixed = mixed.log_softmax(-1)
        gap = torch.where(plausible, log_mixed - log_strong, 0.0)
        kl = (log_mixed.exp() * gap).sum(-1, keepdim=True)
        chosen = torch.where(kl <= kl_limit, beta, chosen)
    return chosen


class SCMoERun(DecodingRun):
    """One call: routes the weak rows and mixes the logits."""

    strategy: SCMoE

    def __init__(self, strategy: SCMoE, session: Session) -> None:
        super().__init__(strategy, session)
        self.weak = WeakRouting.parse(strategy.weak)
        self.steps: Tensor | None = None  # [B] decoding steps of live sequences
        self.limited: Tensor | None = None  # [B] of these, with beta reduced
        self.trials: list[Trial] | None = None  # of each sequence; None: nothing was tried, and all are contrasted
        self.on: Tensor | None = None  # [B] bool, sequences that are contrasted; None: all

    # --- life --------------------------------------------------------------------------------------

    def prepare(self, context: Context) -> None:
        """With `no_harm`: does contrast predict the prompt's own tokens better?"""
        target, judge_on = self.session.plan.target, self.strategy.judge_on
        if not target.no_harm or judge_on is None:
            return
        targets = narrow_targets(context, judge_on, target.tokenizer)  # [B, T]
        wanted = targets.any(0).nonzero().flatten()  # [P] columns
        won = torch.zeros(len(targets), dtype=torch.int64, device=targets.device)
        lost = won.clone()
        if len(wanted):
            hidden, head = self.session.read_streams(context)
            for columns in wanted.split(max(1, CHUNK // len(hidden))):
                logits = head(hidden[:, (columns - 1).to(hidden.device)]).to(context.ids.device)  # [2 B, C, V]
                strong = logits[: len(targets)].argmax(-1)
                mixed = self._mix(logits.view(2, len(targets), *logits.shape[1:]))[0].argmax(-1)
                labels, counts = context.ids[:, columns], targets[:, columns]
                won += ((mixed == labels) & (strong != labels) & counts).sum(1)
                lost += ((mixed != labels) & (strong == labels) & counts).sum(1)
        counts = torch.stack([targets.sum(1), won, lost], 1)  # [B, 3]
        self.trials = [Trial(*one) for one in counts.tolist()]
        self.on = torch.tensor([trial.passed for trial in self.trials], device=targets.device)

    def expand(self, repeats: int) -> None:
        if self.trials is not None and self.on is not None:
            self.trials = [trial for trial in self.trials for _ in range(repeats)]
            self.on = self.on.repeat_interleave(repeats)

    # --- routing -----------------------------------------------------------------------------------

    def route(self, site: Site, call: Call, ids: Tensor, weights: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Strong rows as they are; weak rows get the weak experts, padded with weight 0."""
        half = rows.tokens // rows.streams
        chosen = self._experts(site, call, rows)[half:]  # [N/2, n]
        weight = self._weights(site, call, chosen, half).to(weights)
        missing = ids.shape[1] - chosen.shape[1]
        if missing > 0:
            chosen = torch.cat([chosen, chosen[:, :1].expand(-1, missing)], 1)
            weight = torch.cat([weight, weight.new_zeros(weight.shape[0], missing)], 1)
        return torch.cat([ids[:half], chosen], 0), torch.cat([weights[:half], weight], 0)

    def _experts(self, site: Site, call: Call, rows: Rows) -> Tensor:
        """`[N, n]` experts of a weak routing for every token."""
        if site.chooses:
            order = call.ranking().argsort(dim=-1, descending=True, stable=True)  # [N, E]
        else:  # a fixed table: rank what it gave by weight
            ids, weights = call.chosen()
            order = ids.gather(1, weights.argsort(dim=-1, descending=True, stable=True))  # [N, K]
        if self.weak.kind == "rank":
            return order[:, self.weak.count - 1 : self.weak.count]
        if self.weak.kind == "top":
            return order[:, : self.weak.count]
        allowed = (call.ranking() > float("-inf")).sum(-1)  # [N]
        key = rows.per_token(self.session.keys, order.device)
        position = rows.position.flatten().to(order.device)
        draw = keyed_uniform(self.strategy.seed, key, site.index, position)
        return order.gather(1, (draw * allowed).long()[:, None])

    def _weights(self, site: Site, call: Call, chosen: Tensor, half: int) -> Tensor:
        """The family's weight of weak experts, `[N/2, n]`."""
        own_ids, own = (t[half:] for t in call.chosen())  # [N/2, K]
        if site.scoring == "other" or not site.chooses:
            same = chosen[:, :, None] == own_ids[:, None, :]  # [N/2, n, K]
            return (same * own[:, None, :]).sum(-1)
        scores = call.raw_scores()[half:].gather(1, chosen)  # [N/2, n]
        scale = site.expert_scale
        if not site.renormalises:
            weight = scores * site.rule.scaling
        else:
            plain = own if scale is None else own / scale.to(own)[own_ids]
            weight = scores / scores.sum(-1, keepdim=True).clamp_min(1e-20) * plain.sum(-1, keepdim=True)
        return weight if scale is None else weight * scale.to(weight)[chosen]

    # --- logits -------------------------------------------------------------------------------------

    def combine(self, logits: Tensor) -> Tensor:
        """`[2, B, S, V]` -> `[B, S, V]` fp32."""
        mixed, beta = self._mix(logits)
        on = self.on
        if on is not None and on.shape[0] == mixed.shape[0]:
            on = on.to(mixed.device)[:, None, None]
            mixed = torch.where(on, mixed, logits[0].to(mixed))
        if isinstance(beta, Tensor) and self.session.decides and self.session.live.shape[0] == mixed.shape[0]:
            live = self.session.live.to(beta.device)
            self._count(beta[:, -1:, 0], live[:, None])
        return mixed

    def _mix(self, logits: Tensor) -> tuple[Tensor, float | Tensor]:
        """`[2, B, S, V]` -> `[B, S, V]` fp32, and the beta that was used."""
        options = self.strategy
        strong, weak = logits.to(torch.promote_types(logits.dtype, torch.float32)).unbind(0)
        no_harm = self.session.plan.target.no_harm
        return mix(strong, weak, log(options.alpha), options.beta, options.kl_limit if no_harm else None)

    def score(self, logits: Tensor, scored: Tensor) -> Tensor:
        """`[2, B, S, V]` -> `[B, S, V]` fp32 without the mask: each token keeps a finite log-probability.

        With `no_harm` beta is limited at each position all the same, by the KL of what is scored.
        """
        options = self.strategy
        strong, weak = logits.to(torch.promote_types(logits.dtype, torch.float32)).unbind(0)
        beta: Tensor | float = options.beta
        if self.session.plan.target.no_harm:
            everything = torch.ones_like(strong, dtype=torch.bool)
            beta = within_limit(strong, weak, everything, options.beta, options.kl_limit)
            self._count(beta[..., 0], scored.to(beta.device))
            if self.on is not None:
                beta = beta * self.on.to(beta)[:, None, None]
        return contrast(strong, weak, options.alpha, beta, mask=False)

    def _count(self, chosen: Tensor, counts: Tensor) -> None:
        """Add up steps and those with a reduced beta; `chosen [B, S]`, `counts [B, S]` bool."""
        reduced = (chosen < self.strategy.beta) & counts
        steps, limited = counts.sum(1), reduced.sum(1)
        self.steps = steps if self.steps is None else self.steps + steps
        self.limited = limited if self.limited is None else self.limited + limited

    def report(self, sequence: int) -> dict[str, Any]:
        facts: dict[str, Any] = {"outcome": "applied", "streams": self.strategy.streams}
        if self.trials is not None:
            trial = self.trials[sequence]
            facts |= {"judged_tokens": trial.tokens, "turned_right": trial.won, "turned_wrong": trial.lost}
            if not trial.passed:
                return {**facts, "outcome": trial.words}
        if self.steps is not None and self.limited is not None:
            steps, limited = int(self.steps[sequence]), int(self.limited[sequence])
            facts |= {"steps": steps, "limited_steps": limited}
            if limited:
                facts["outcome"] = f"beta reduced at {limited} of {steps} steps"
        return facts
