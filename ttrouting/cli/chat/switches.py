"""Which strategies are on, with which options? Those that were turned off keep theirs for the next time."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ttrouting.cli.settings import typed_options
from ttrouting.errors import ConfigError, did_you_mean
from ttrouting.registry import get_strategy
from ttrouting.strategy import Strategy, in_range, one_of

CONTINUE, FRESH = "continue", "fresh"


@dataclass(frozen=True)
class Settings:
    """What is not a strategy's: sampling, no-harm, and what a turn begins from.

    Attributes:
        max_new_tokens, temperature, top_p, seed: as in `ttrouting generate`; greedy unless one of the two is given.
        no_harm: as in `ttr.adapt`.
        adaptation: `continue`: a turn goes on from what the turn before learned; `fresh`: from nothing.
    """

    name: ClassVar[str] = "chat"

    max_new_tokens: int = 256
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0
    no_harm: bool = True
    adaptation: str = CONTINUE

    def __post_init__(self) -> None:
        in_range(self.name, "max_new_tokens", self.max_new_tokens, 1, whole=True)
        in_range(self.name, "seed", self.seed, 0, whole=True)
        if self.temperature is not None:
            in_range(self.name, "temperature", self.temperature, 0)
        if self.top_p is not None:
            in_range(self.name, "top_p", self.top_p, 0, 1)
        one_of(self.name, "adaptation", self.adaptation, (CONTINUE, FRESH))

    def changed(self, option: str, text: str) -> Settings:
        """With another value, as it was typed."""
        change: dict[str, Any] = typed_options(Settings, {option: text})
        return dataclasses.replace(self, **change)

    @property
    def greedy(self) -> bool:
        """Whether the same text comes out again."""
        return not self.temperature and self.top_p is None


@dataclass(frozen=True)
class Switches:
    """Strategies that are on, and those that were.

    Attributes:
        on: as they are handed to `ttr.adapt`. kept: what is off, by name.
    """

    on: tuple[Strategy, ...] = ()
    kept: Mapping[str, tuple[Strategy, ...]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Of those that are on, each once."""
        return list(dict.fromkeys(s.name for s in self.on))

    def turned_on(self, name: str) -> Switches:
        """With this strategy, as it was when it was turned off, or with its defaults.

        Raises:
            ConfigError: unknown, on already, or it needs options that cannot be typed.
        """
        kind = get_strategy(name)
        if kind.name in self.names:
            raise ConfigError(f"{kind.name} is on already. Change an option: /set {kind.name}.OPTION VALUE.")
        new = self.kept.get(kind.name) or (kind(),)
        return Switches((*self.on, *new), {k: v for k, v in self.kept.items() if k != kind.name})

    def turned_off(self, name: str) -> Switches:
        """Without this strategy.

        Raises:
            ConfigError: unknown, or it is not on.
        """
        kind = get_strategy(name)
        if kind.name not in self.names:
            known = f" On: {', '.join(self.names)}." if self.on else " Nothing is on."
            raise ConfigError(f"{kind.name} is not on.{known}")
        old = tuple(s for s in self.on if s.name == kind.name)
        return Switches(tuple(s for s in self.on if s.name != kind.name), {**self.kept, kind.name: old})

    def changed(self, name: str, option: str, text: str) -> Switches:
        """With another value of an option, as it was typed; also of a strategy that is off.

        Raises:
            ConfigError: no such strategy or option, or no such value.
        """
        kind = get_strategy(name)
        new: dict[str, Any] = typed_options(kind, {option: text})

        def replaced(found: Sequence[Strategy]) -> tuple[Strategy, ...]:
            return tuple(dataclasses.replace(s, **new) if s.name == kind.name else s for s in found)

        if kind.name in self.names:
            return Switches(replaced(self.on), self.kept)
        kept = replaced(self.kept[kind.name]) if kind.name in self.kept else (kind(**new),)
        return Switches(self.on, {**self.kept, kind.name: kept})


def option_names(kind: Any) -> list[str]:
    """The options of a strategy, or of the chat, as `/set` takes them."""
    return [f.name for f in dataclasses.fields(kind)]


def changed_options(strategy: Strategy) -> str:
    """Options that are not the defaults, for people."""
    try:
        usual = type(strategy)().to_dict()
    except ConfigError:  # one that has no defaults
        usual = {}
    changed = {k: v for k, v in strategy.to_dict().items() if k != "strategy" and (k not in usual or usual[k] != v)}
    given = [f"{name} {list(value.shape)}" for name, value in strategy.tensors().items()]
    return ", ".join([*(f"{name}={value}" for name, value in changed.items()), *given])


def split_setting(text: str) -> tuple[str, str | None, str]:
    """`scmoe.beta 0.3` or `temperature=0.7` as `(option, strategy, value)`; the strategy is None for the chat's own.

    Raises:
        ConfigError: a part is missing, or the chat has no such setting.
    """
    parts = re.fullmatch(r"([^\s=]+)(?:\s*=\s*|\s+)(.*\S)\s*", text, re.DOTALL)
    if parts is None:
        raise ConfigError("/set takes a name and a value, for example /set scmoe.beta 0.3 or /set temperature 0.7.")
    path, value = parts.groups()
    name, dot, option = path.partition(".")
    if dot:
        return option.replace("-", "_"), name, value
    own, known = name.replace("-", "_"), option_names(Settings)
    if own not in known:
        raise ConfigError(f"There is no setting {name!r}.{did_you_mean(own, known)} A strategy's: scmoe.beta.")
    return own, None, value
