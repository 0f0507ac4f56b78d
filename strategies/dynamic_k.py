"""Dynamic-k: fewer experts where the router is confident (arXiv 2403.07652 and relatives).

Legend: `N` tokens of a forward, `E` experts, `K` per token, `L` layers.
A cost method: published retrofits lose accuracy when they drop much. A dropped expert gets weight 0 and is not
computed (`ttrouting.kernels`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from math import sqrt
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ttrouting.context import Context
from ttrouting.errors import ConfigError
from ttrouting.objective import divergence, token_losses
from ttrouting.rows import Rows
from ttrouting.session import Session
from ttrouting.sites import Site
from ttrouting.strategy import RoutingRun, RoutingStrategy, in_range, one_of, same_model
from ttrouting.taps import Call
from ttrouting.target import Target
from ttrouting.usage import UsageMeter

RULES = ("top_p", "relative", "sensitivity", "entropy")
DEFAULT_P = {"top_p": 0.8, "entropy": 0.75}
DEFAULT_K_MIN = {"entropy": 2}


@dataclass(frozen=True)
class Calibration:
    """What `ttr.calibrate` saw on its text.

    Attributes:
        mean_k: experts per token, mean over tokens and layers; k_low: its 5th percentile over texts.
        kl: mean KL(base || dynamic) of the next token, over the texts' tokens, in nats; kl_high: its 95th percentile.
        tokens: how many tokens. fingerprint: of which model.
    """

    mean_k: float
    k_low: float
    kl: float
    kl_high: float
    tokens: int
    fingerprint: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: a value is missing, unknown or no number.
        """
        known = [field.name for field in fields(cls)]
        if sorted(data) != sorted(known):
            raise ConfigError(f"dynamic_k.calibration holds {sorted(data)}, it needs {sorted(known)}.")
        for name in known[:-1]:
            in_range("dynamic_k.calibration", name, data[name])
        return cls(**data)


@dataclass(frozen=True)
class DynamicK(RoutingStrategy):
    """Drop the least of the chosen experts, token by token, never more than `K` kept.

    Rules, over the chosen experts in falling order of probability `pi` (sigmoid scores are divided by
    their sum over all experts):
        `top_p`: keep the fewest whose raw `pi` sum to p. `relative`: drop where `w_j < beta w_1`.
        `sensitivity`: drop where `w_j < sqrt(threshold / H_l)`. `entropy`: all `K` where the normalised
        Tsallis entropy of `pi` is above tau, else `top_p`.

    Args:
        rule: one of the four. p: share of probability in (0, 1]; default 0.8, 0.75 under `entropy`.
        beta: for `relative`, in [0, 1]. threshold: for `sensitivity`. sensitivity: `H_l` for each layer, from
            `ttr.calibrate`. tau, q: for `entropy`.
        k_min: experts that stay whatever the rule says; default 1, 2 under `entropy`.
        renormalize: `family` (kept weights sum to what all K did, where the family renormalises), `always`, `never`.
        gate: drop only where the largest `pi` is at least this; None drops wherever the rule says.
        calibration: what calibration saw; with `no_harm` a prompt that loses far more keeps all `K`: under 0.9
            of `k_low` experts per token, or a KL over twice `kl_high`.
    """

    name: ClassVar[str] = "dynamic_k"
    summary: ClassVar[str] = "fewer experts where the router is confident; a cost method, accuracy may fall"
    order: ClassVar[int] = 50
    unique: ClassVar[bool] = True
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {"p": (0.5, 0.6, 0.7, 0.8, 0.9)}

    rule: str = "top_p"
    p: float | None = None
    beta: float = 0.5
    threshold: float = 0.005
    sensitivity: tuple[float, ...] | None = None
    tau: float = 0.9
    q: float = 1.1
    k_min: int | None = None
    renormalize: str = "family"
    gate: float | None = None
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        one_of(self.name, "rule", self.rule, RULES)
        if self.p is None:
            object.__setattr__(self, "p", DEFAULT_P.get(self.rule, 1.0))
        if self.k_min is None:
            object.__setattr__(self, "k_min", DEFAULT_K_MIN.get(self.rule, 1))
        in_range(self.name, "p", self.share, 0, 1, open_low=True)
        in_range(self.name, "beta", self.beta, 0, 1)
        in_range(self.name, "threshold", self.threshold, 0)
        in_range(self.name, "tau", self.tau, 0, 1)
        in_range(self.name, "q", self.q, 0, open_low=True)
        in_range(self.name, "k_min", self.floor, 1, whole=True)
        one_of(self.name, "renormalize", self.renormalize, ("family", "always", "never"))
        if self.gate is not None:
            in_range(self.name, "gate", self.gate, 0, 1)
        if not isinstance(self.sensitivity, tuple | None):
            raise ConfigError(f"{self.name}.sensitivity must be a number for each layer, got {self.sensitivity!r}.")
        if not isinstance(self.calibration, Calibration | None):
            raise ConfigError(f"{self.name}.calibration must come from ttr.calibrate, got {self.calibration!r}.")
        for value in self.sensitivity or ():
            in_range(self.name, "sensitivity", value, 0, open_low=True)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> Self:
        """As in `Strategy`, with the calibration and the sensitivities as JSON has them."""
        options = dict(data)
        if isinstance(options.get("sensitivity"), list):
            options["sensitivity"] = tuple(options["sensitivity"])
        if isinstance(options.get("calibration"), Mapping):
            options["calibration"] = Calibration.from_dict(options["calibration"])
        return super().from_dict(options, tensors)

    @property
    def share(self) -> float:
        """`p`, after defaults."""
        return 1.0 if self.p is None else self.p

    @property
    def floor(self) -> int:
        """`k_min`, after defaults."""
        return 1 if self.k_min is None else self.k_min

    @property
    def identity(self) -> bool:
        """Options that keep every expert."""
        nothing = {
            "top_p": self.p == 1,
            "entropy": self.p == 1,
            "relative": self.beta == 0,
            "sensitivity": self.threshold == 0,
        }
        return nothing[self.rule]

    def check(self, target: Target) -> None:
        """`sensitivity` needs one value a layer; a calibration belongs to one model."""
        if self.rule == "sensitivity" and (self.sensitivity is None or len(self.sensitivity) != len(target.sites)):
            found = "none" if self.sensitivity is None else len(self.sensitivity)
            raise ConfigError(
                f"dynamic_k.rule='sensitivity' needs a value for each of {len(target.sites)} layers, got {found}. "
                "Let ttr.calibrate(model, tokenizer, texts, mean_k=..., rule='sensitivity') make them."
            )
        if self.calibration is not None:
            same_model(self, self.calibration.fingerprint, target)

    def start(self, session: Session) -> RoutingRun:
        """Every sequence starts with the rule on."""
        return DynamicKRun(self, session)

    def keep(self, site: Site, pi: Tensor, weights: Tensor, all_pi: Tensor) -> Tensor:
        """Which of the chosen experts stay, `[N, K]` bool.

        Args:
            pi: `[N, K]` probabilities of the chosen experts, any order. weights: `[N, K]` their weights.
            all_pi: `[N, E]` probabilities of all experts.
        """
        return self.limits(site.index).keep(pi, weights, all_pi)

    def limits(self, layer: int) -> Limits:
        """The rule at one layer as numbers."""
        cut = None
        if self.rule == "sensitivity":
            cut = sqrt(self.threshold / (self.sensitivity or ())[layer])  # `check` has seen one for each layer
        ranked = self.rule in ("top_p", "entropy")
        return Limits(
            floor=self.floor,
            p=self.share if ranked else None,
            tau=self.tau if self.rule == "entropy" else None,
            q=self.q,
            beta=self.beta if self.rule == "relative" else None,
            cut=cut,
            gate=self.gate,
        )


@dataclass(frozen=True, eq=False)
class Limits:
    """Every rule as numbers, or as tensors `[N, 1]` where each token has its own; None is never asked.

    Attributes:
        floor: experts that stay. p: share of probability. tau, q: entropy above which all stay. beta: share of the
            largest weight. cut: smallest weight. gate: drop only where the largest `pi` is at least this.
    """

    floor: int | Tensor
    p: float | Tensor | None = None
    tau: float | Tensor | None = None
    q: float | Tensor = 1.1
    beta: float | Tensor | None = None
    cut: float | Tensor | None = None
    gate: float | Tensor | None = None

    def keep(self, pi: Tensor, weights: Tensor, all_pi: Tensor) -> Tensor:
        """Which of the chosen experts stay, `[N, K]` bool, by `pi [N, K]`, `weights [N, K]`, `all_pi [N, E]`."""
        order = pi.argsort(dim=-1, descending=True, stable=True)
        place = order.argsort(-1)  # [N, K] rank of each column, 0 = most probable
        kept = torch.ones_like(pi, dtype=torch.bool)
        if self.p is not None:
            ranked = pi.gather(1, order)
            before = ranked.cumsum(-1) - ranked  # probability of all better ones
            # p = 1 keeps everything, also where rounding lets the sum reach 1 early
            kept = (before < self.p).gather(1, place) | (self.p == 1)
        if self.tau is not None:
            kept = kept | (tsallis(all_pi, self.q)[:, None] > self.tau)
        if self.beta is not None:
            kept = kept & (weights >= self.beta * weights.amax(-1, keepdim=True))
        if self.cut is not None:
            kept = kept & (weights >= self.cut)
        if self.gate is not None:
            kept = kept | (all_pi.amax(-1, keepdim=True) < self.gate)
        return kept | (place < self.floor)


def tsallis(pi: Tensor, q: float | Tensor) -> Tensor:
    """Tsallis entropy of `pi [N, E]` divided by its value at the uniform distribution: `[N]` in [0, 1].

    `q`: one number, or one for each token `[N, 1]`.
    """
    if isinstance(q, Tensor):
        apart = torch.where(q == 1, 2.0, q)  # any other number: what comes of it is not taken
        general = (1 - pi.clamp_min(0).pow(apart).sum(-1)) / (1 - pi.shape[-1] ** (1 - apart))[:, 0]
        return torch.where(q[:, 0] == 1, tsallis(pi, 1), general)
    if q == 1:
        log_experts = torch.log(torch.tensor(float(pi.shape[-1])))
        return -(pi * pi.clamp_min(1e-20).log()).sum(-1) / log_experts
    most = (1 - pi.shape[-1] ** (1 - q)) / (q - 1)
    return (1 - pi.clamp_min(0).pow(q).sum(-1)) / (q - 1) / most


class DynamicKRun(RoutingRun):
    """One call. Counting is the session's; here only which sequences have the rule on."""

    strategy: DynamicK

    def __init__(self, strategy: DynamicK, session: Session) -> None:
        super().__init__(strategy, session)
        self.on = torch.ones(session.sequences, dtype=torch.bool, device=session.keys.device)  # [B]
        self.seen: list[dict[str, float]] = []

    def edit_selection(
        self, site: Site, call: Call, ids: Tensor, weights: Tensor, rows: Rows
    ) -> tuple[Tensor, Tensor]:
        """Weight 0 for what the rule drops; what stays is rescaled where the family renormalises."""
        all_pi = call.probabilities().to(weights)  # [N, E]
        pi = all_pi.gather(1, ids.clamp_max(site.num_experts - 1))  # [N, K]
        kept = self.strategy.keep(site, pi, weights, all_pi)
        kept = kept | ~rows.per_token(self.on, kept.device)[:, None]
        thinned = weights * kept
        how = self.strategy.renormalize
        if how == "always" or (how == "family" and site.renormalises):
            factor = weights.sum(-1, keepdim=True) / thinned.sum(-1, keepdim=True).clamp_min(1e-20)
            # rows that keep everything keep their bits
            thinned = torch.where(kept.all(-1, keepdim=True), weights, thinned * factor)
        return ids, thinned

    def prepare(self, context: Context) -> None:
        """With `no_harm` and a calibration: full K for prompts that lose far more than its texts did."""
        session, seen = self.session, self.strategy.calibration
        if seen is None or not session.plan.target.no_harm:
            return
        context = replace(context, targets=torch.zeros_like(context.targets))  # the next token's is all that counts
        with session.without(self):
            _, base = token_losses(session, context)
        meter = UsageMeter(session)
        with meter.counting():
            _, thinned = token_losses(session, context)
        kl = divergence(base, thinned)  # [B]
        for i, value in enumerate(kl.tolist()):
            layers = meter.per_layer(i)
            facts = {
                "kl": value,
                "kl_limit": 2 * seen.kl_high,
                "mean_k": sum(layers) / len(layers),
                "k_limit": 0.9 * seen.k_low,
            }
            self.on[i] = facts["kl"] <= facts["kl_limit"] and facts["mean_k"] >= facts["k_limit"]
            self.seen.append(facts)

    def expand(self, repeats: int) -> None:
        self.on = self.on.repeat_interleave(repeats)
        self.seen = [facts for facts in self.seen for _ in range(repeats)]

    def report(self, sequence: int) -> dict[str, Any]:
        facts: dict[str, Any] = {"outcome": "applied"}
        if self.seen:
            facts |= self.seen[sequence]
            if facts["kl"] > facts["kl_limit"]:
                facts["outcome"] = f"rolled back: next-token KL {facts['kl']:.3f} over {facts['kl_limit']:.3f}"
            elif not bool(self.on[sequence]):
                facts["outcome"] = (
                    f"rolled back: {facts['mean_k']:.2f} experts per token, under {facts['k_limit']:.2f}"
                )
        return facts
