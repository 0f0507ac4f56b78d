"""The two kinds of strategy: what a routing strategy and a decoding strategy must provide.

Legend: `B` sequences, `S` tokens of one forward, `N = B * S`, `L` MoE layers, `E` experts, `K` per token.

A strategy is a frozen dataclass of options. For each call it starts a *run*, which holds everything
that changes, one row for each sequence. Third parties register theirs as an entry point in the group
`ttrouting.strategies`; nothing here has to change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from ttrouting.errors import ConfigError, UnsupportedCallError, UnsupportedModelError, did_you_mean

if TYPE_CHECKING:
    from ttrouting.context import Context
    from ttrouting.rows import Rows
    from ttrouting.session import Session
    from ttrouting.sites import Site
    from ttrouting.taps import Call
    from ttrouting.target import Target


@dataclasses.dataclass(frozen=True)
class Strategy:
    """Options of a strategy. Subclass `RoutingStrategy` or `DecodingStrategy`, not this.

    Class attributes:
        name: what users type, lower case with underscores.
        summary: one line for tables, cost included.
        search: values of options that `ttrouting tune` tries, by option; empty if it has to be told.
        presets: options under a name, such as `paper`: those that its publication used. Only a way to write options
            down: what is kept and shown are the options themselves.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    @classmethod
    def preset_options(cls, name: str) -> dict[str, Any]:
        """The options of a preset.

        Raises:
            ConfigError: this strategy has no preset of that name.
        """
        if name not in cls.presets:
            known = did_you_mean(name, cls.presets) if cls.presets else " It has none: leave it out."
            raise ConfigError(f"{cls.name} has no preset {name!r}.{known}")
        return dict(cls.presets[name])

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """`Rerouting.preset("paper", steps=10)`: the options of a preset, some of them changed.

        Raises:
            ConfigError: unknown preset, or an option out of range.
        """
        return cls(**{**cls.preset_options(name), **changes})

    def check(self, target: Target) -> None:
        """Raise a typed error if this strategy cannot work on this model. Nothing is touched yet."""

    @property
    def identity(self) -> bool:
        """True if these options change nothing at all: no hook is installed for them."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """`{"strategy": name, **options}`, ready for JSON. Tensors are left to `tensors()`."""
        options = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                continue
            if dataclasses.is_dataclass(value) and not isinstance(value, type):
                value = value.to_dict() if hasattr(value, "to_dict") else dataclasses.asdict(value)
            options[field.name] = list(value) if isinstance(value, tuple) else value
        return {"strategy": self.name, **options}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> Self:
        """The inverse of `to_dict` and `tensors`.

        Raises:
            ConfigError: an option is unknown (with the closest known one) or out of range.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        options = {k: v for k, v in data.items() if k != "strategy"}
        for name in (*options, *(tensors or {})):
            if name not in known:
                raise ConfigError(f"{cls.name} has no option {name!r}.{did_you_mean(name, known)}")
        return cls(**{**options, **(tensors or {})})

    def tensors(self) -> dict[str, Tensor]:
        """The tensors among the options, by option name."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {k: v for k, v in values.items() if isinstance(v, Tensor)}


@dataclasses.dataclass(frozen=True)
class RoutingStrategy(Strategy):
    """Edits routing. Any number compose: edits happen in `order`, low to high, then as given.

    Class attributes:
        order: 10 given deltas, 15 tasks' deltas, 20 masks, 30 neighbours, 40 optimised deltas, 50 fewer experts.
        unique: refuse two of the same strategy in one plan.
    """

    order: ClassVar[int] = 25
    unique: ClassVar[bool] = False

    def start(self, session: Session) -> RoutingRun:
        """A run for the sequences of one call."""
        raise NotImplementedError

    @property
    def interval(self) -> int | None:
        """Generated tokens between two adaptations, or None for once, at the prompt."""
        return None


class RoutingRun:
    """One routing strategy during one call. Override the taps you need; the others cost nothing.

    All state has a row for each sequence and follows `expand` when sequences are repeated.
    """

    def __init__(self, strategy: RoutingStrategy, session: Session) -> None:
        self.strategy = strategy
        self.session = session

    # --- taps: each is called for each site of each forward -------------------------------------

    def edit_logits(self, site: Site, logits: Tensor, rows: Rows) -> Tensor:
        """Router logits before the family's scoring, `[N, E]` in `site.edit_dtype`."""
        return logits

    def edit_scores(self, site: Site, scores: Tensor, rows: Rows) -> Tensor:
        """Scores handed to the router's last top-k, after bias and groups, `[N, E]`."""
        return scores

    def edit_selection(
        self, site: Site, call: Call, ids: Tensor, weights: Tensor, rows: Rows
    ) -> tuple[Tensor, Tensor]:
        """Chosen experts and weights, both `[N, K']`; any number of columns may be returned."""
        return ids, weights

    # --- life of a call ---------------------------------------------------------------------------

    def prepare(self, context: Context) -> None:
        """Called once, before decoding, with the prompts as given."""

    def adapt(self, context: Context, active: Tensor) -> bool:
        """Called every `interval` tokens with the text so far; `active [B]` bool. True: refill the KV cache."""
        return False

    def expand(self, repeats: int) -> None:
        """Repeat each sequence's state `repeats` times (beams, returned sequences)."""

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what an earlier call learned."""

    def state(self) -> dict[str, Tensor]:
        """What was learned, one row for each sequence; empty if nothing is learned."""
        return {}

    def report(self, sequence: int) -> dict[str, Any]:
        """What happened to one sequence, as plain values."""
        return {}


@dataclasses.dataclass(frozen=True)
class DecodingStrategy(Strategy):
    """Runs several routings of the same sequence and combines their logits. At most one in a plan.

    Class attributes:
        streams: rows for each sequence. scored_as: what has to be said beside log-likelihoods, if they are combined
            in another way than while decoding (see `DecodingRun.score`).
    """

    streams: ClassVar[int] = 2
    scored_as: ClassVar[str] = ""

    def start(self, session: Session) -> DecodingRun:
        """A run for the sequences of one call."""
        raise NotImplementedError


class DecodingRun:
    """One decoding strategy during one call: `streams` rows for each sequence, in one forward."""

    def __init__(self, strategy: DecodingStrategy, session: Session) -> None:
        self.strategy = strategy
        self.session = session

    def route(self, site: Site, call: Call, ids: Tensor, weights: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Selection `[N, K']` in which the rows of streams 1.. have their own experts."""
        raise NotImplementedError

    def prepare(self, context: Context) -> None:
        """Look at the prompts before they are answered; may read them. No gradient, taps live."""

    def expand(self, repeats: int) -> None:
        """Each sequence becomes `repeats` neighbouring ones: repeat what is kept for sequences."""

    def combine(self, logits: Tensor) -> Tensor:
        """`[streams, B, S, V]` logits -> `[B, S, V]`."""
        raise NotImplementedError

    def score(self, logits: Tensor, scored: Tensor) -> Tensor:
        """As `combine`, for log-likelihoods of given tokens; `scored [B, S]` bool are the positions that count."""
        return self.combine(logits)

    def report(self, sequence: int) -> dict[str, Any]:
        """What happened to one sequence, as plain values."""
        return {}


def overrides(run: RoutingRun, tap: str) -> bool:
    """Whether a run really uses a tap, so that unused ones cost nothing."""
    return getattr(type(run), tap) is not getattr(RoutingRun, tap)


def in_range(
    strategy: str,
    option: str,
    value: float,
    low: float = -float("inf"),
    high: float = float("inf"),
    open_low: bool = False,
    whole: bool = False,
) -> None:
    """Raise `ConfigError` unless `low <= value <= high` (`low < value` if `open_low`); NaN never passes."""
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        raise ConfigError(f"{strategy}.{option} must be a {'whole ' if whole else ''}number, got {value!r}.")
    if not (low < value if open_low else low <= value) or not value <= high:
        left = "(" if open_low or low == -float("inf") else "["
        right = ")" if high == float("inf") else "]"
        raise ConfigError(f"{strategy}.{option} must be in {left}{low:g}, {high:g}{right}, got {value!r}.")


def one_of(strategy: str, option: str, value: object, known: tuple[str, ...]) -> None:
    """Raise `ConfigError` unless `value` is one of the known names."""
    if value not in known:
        raise ConfigError(f"{strategy}.{option} cannot be {value!r}.{did_you_mean(str(value), known)}")


def finite(strategy: str, option: str, tensor: Tensor) -> None:
    """Raise `ConfigError` on NaN or infinity."""
    if not torch.isfinite(tensor).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise ConfigError(
            f"{strategy}.{option} holds {bad} values that are NaN or infinite out of {tensor.numel()}. "
            "Check how the tensor was made."
        )


def restored_delta(strategy: str, state: Mapping[str, Tensor], now: Tensor) -> Tensor:
    """The delta `[B, L, E]` that an earlier call learned, in place of `now`; `now` itself where the state has none.

    Raises:
        UnsupportedCallError: it has another shape. ConfigError: it holds NaN or infinity.
    """
    delta = state.get("delta", now)
    if delta.shape != now.shape:
        raise UnsupportedCallError(
            f"This state's delta has shape {tuple(delta.shape)}, the call needs {tuple(now.shape)} "
            "(sequences, layers, experts). Start without state."
        )
    finite(strategy, "state", delta)
    return delta.to(now)


def same_model(strategy: Strategy, made_for: str | None, target: Target) -> None:
    """Raise unless an artefact with a model fingerprint meets that model."""
    if made_for is not None and made_for != target.fingerprint:
        raise UnsupportedModelError(
            f"This {strategy.name} was made for another model (fingerprint {made_for[:12]}, this model has "
            f"{target.fingerprint[:12]}). Make it again on this model."
        )
