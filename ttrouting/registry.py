"""Every strategy by name: those of this package and those of installed plugins."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from importlib.metadata import entry_points

from ttrouting.errors import ConfigError, did_you_mean
from ttrouting.strategy import DecodingStrategy, RoutingStrategy, Strategy

ENTRY_POINT_GROUP = "ttrouting.strategies"


@dataclass(frozen=True)
class StrategyInfo:
    """One registered strategy.

    Attributes:
        name: what users type. kind: `"routing"` or `"decoding"`. cls: the config dataclass.
        summary: one line. source: the package that brings it.
    """

    name: str
    kind: str
    cls: type[Strategy]
    summary: str
    source: str


def _info(cls: type[Strategy], source: str) -> StrategyInfo:
    if not (isinstance(cls, type) and issubclass(cls, (RoutingStrategy, DecodingStrategy)) and cls.name):
        raise ConfigError(
            f"{source} registers {cls!r} as a strategy, which is not a named subclass of RoutingStrategy or "
            "DecodingStrategy. Fix or uninstall that plugin."
        )
    kind = "decoding" if issubclass(cls, DecodingStrategy) else "routing"
    return StrategyInfo(cls.name, kind, cls, cls.summary, source)


def _built_in() -> list[StrategyInfo]:
    import ttrouting.strategies as package

    found = []
    for module_info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{module_info.name}")
        found += [
            _info(value, "ttrouting")
            for value in vars(module).values()
            if isinstance(value, type) and issubclass(value, Strategy) and value.__module__ == module.__name__
        ]
    return found


def _plugins() -> list[StrategyInfo]:
    return [
        _info(point.load(), point.dist.name if point.dist else point.value)
        for point in entry_points(group=ENTRY_POINT_GROUP)
    ]


def list_strategies() -> list[StrategyInfo]:
    """Everything that `get_strategy` knows, by name; a plugin cannot replace a built-in one.

    Raises:
        ConfigError: two packages register the same name, or a plugin registers something else.
    """
    found: dict[str, StrategyInfo] = {}
    for info in [*_built_in(), *_plugins()]:
        if info.name in found:
            raise ConfigError(
                f"Two strategies are called {info.name!r}: one from {found[info.name].source}, one from "
                f"{info.source}. Uninstall one of them."
            )
        found[info.name] = info
    return [found[name] for name in sorted(found)]


def get_strategy(name: str) -> type[Strategy]:
    """The config class of a strategy by the name that users type.

    Raises:
        ConfigError: unknown name, with the closest known one.
    """
    known = {info.name: info.cls for info in list_strategies()}
    key = name.strip().lower().replace("-", "_")
    if key not in known:
        raise ConfigError(f"No strategy {name!r}.{did_you_mean(key, known)}")
    return known[key]
