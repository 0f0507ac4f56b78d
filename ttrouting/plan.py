"""Strategies and sites, resolved and checked together before anything is touched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ttrouting.errors import CompositionError, ConfigError
from ttrouting.registry import get_strategy
from ttrouting.strategy import DecodingStrategy, RoutingStrategy, Strategy
from ttrouting.target import Target


@dataclass(frozen=True, eq=False)
class Plan:
    """What one adapted model does.

    Attributes:
        target: the model. routing: in the order in which they edit. decoding: at most one.
    """

    target: Target
    routing: tuple[RoutingStrategy, ...]
    decoding: DecodingStrategy | None

    @property
    def active(self) -> bool:
        """Whether anything is to be installed at all."""
        return bool(self.routing) or self.decoding is not None

    @property
    def interval(self) -> int | None:
        """Generated tokens between two adaptations; the smallest that any strategy asks for."""
        asked = [s.interval for s in self.routing if s.interval is not None]
        return min(asked) if asked else None


def make_plan(target: Target, strategies: Strategy | str | Sequence[Strategy | str]) -> Plan:
    """Check each strategy against the model and all of them against each other.

    Raises:
        ConfigError: not a strategy. CompositionError: two decoding strategies, or two of a unique one.
        Whatever a strategy's own `check` raises.
    """
    if isinstance(strategies, str) or not isinstance(strategies, Sequence):
        strategies = [strategies]
    given = [_as_strategy(s) for s in strategies]
    decoding = [s for s in given if isinstance(s, DecodingStrategy)]
    if len(decoding) > 1:
        names = " and ".join(s.name for s in decoding)
        raise CompositionError(
            f"{names} are both decoding strategies, and each wants to combine the logits. Keep one of them."
        )
    routing = [s for s in given if isinstance(s, RoutingStrategy)]
    for one in routing:
        if one.unique and sum(s.name == one.name for s in routing) > 1:
            raise CompositionError(
                f"{one.name} is given more than once; its copies would undo each other. Keep one of them."
            )
    for strategy in given:
        strategy.check(target)
    live = sorted((s for s in routing if not s.identity), key=lambda s: s.order)  # stable
    return Plan(target, tuple(live), next((s for s in decoding if not s.identity), None))


def _as_strategy(value: Any) -> Strategy:
    if isinstance(value, str):
        return get_strategy(value)()
    if isinstance(value, type) and issubclass(value, Strategy):
        raise ConfigError(f"{value.__name__} is a class. Pass an instance: {value.__name__}().")
    if not isinstance(value, (RoutingStrategy, DecodingStrategy)):
        raise ConfigError(
            f"{value!r} is not a strategy. Pass instances such as ttr.Rerouting(), or names from "
            "ttr.list_strategies()."
        )
    return value
