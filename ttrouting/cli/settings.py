"""How do `--adapt`, `--set` and `--load` become strategies?"""

from __future__ import annotations

import dataclasses
import json
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, Union, cast, get_args, get_origin, get_type_hints

from ttrouting.artefacts import load
from ttrouting.errors import ConfigError, did_you_mean
from ttrouting.registry import get_strategy
from ttrouting.state import AdaptationState
from ttrouting.strategy import Strategy

EXAMPLE = "--set scmoe.beta=0.3"

_WORDS = {"true": True, "false": False, "none": None, "null": None}


class Named(Protocol):
    """What messages call options by."""

    name: ClassVar[str]


def make_strategies(
    adapt: Sequence[str] = (), settings: Sequence[str] = (), folders: Sequence[Path] = ()
) -> list[Strategy]:
    """Strategies as the command line names them: those of `folders` first, then those of `adapt`.

    Raises:
        ConfigError: an unknown strategy or option, a value of the wrong type or out of range.
        ArtefactError: a folder that holds no strategies.
    """
    saved: list[Strategy] = []
    for folder in folders:
        found = load(folder)
        if isinstance(found, AdaptationState):
            raise ConfigError(f"{folder} holds the state of a run, not strategies. Give a folder with strategies.")
        saved += found
    kinds = [get_strategy(name) for names in adapt for name in names.split(",") if name.strip()]
    options = read_settings(settings)
    known = [s.name for s in saved] + [kind.name for kind in kinds]
    for name in options:
        get_strategy(name)  # a misspelt name is told as such
        if name not in known:
            raise ConfigError(f"--set {name}.{next(iter(options[name]))}: {name} is not used. Add --adapt {name}.")
    changed = [
        dataclasses.replace(s, **_preset_and_typed(type(s), options[s.name])) if s.name in options else s
        for s in saved
    ]
    return changed + [kind(**_preset_and_typed(kind, options.get(kind.name, {}))) for kind in kinds]


def read_settings(settings: Sequence[str]) -> dict[str, dict[str, str]]:
    """`name.option=value` as `{name: {option: text}}`; the last one wins.

    Raises:
        ConfigError: a part is missing.
    """
    found: dict[str, dict[str, str]] = {}
    for setting in settings:
        path, equals, value = setting.partition("=")
        name, dot, option = path.strip().partition(".")
        if not (equals and dot and name and option):
            raise ConfigError(f"--set takes strategy.option=value, for example {EXAMPLE}; got {setting!r}.")
        found.setdefault(name.lower().replace("-", "_"), {})[option.replace("-", "_")] = value
    return found


def _preset_and_typed(kind: type[Strategy], texts: Mapping[str, str]) -> dict[str, Any]:
    """As `typed_options`, over the options of `preset=NAME` where that is among them."""
    own = {option: text for option, text in texts.items() if option != "preset"}
    return {**(kind.preset_options(texts["preset"]) if "preset" in texts else {}), **typed_options(kind, own)}


def typed_options(kind: type[Named], texts: Mapping[str, str]) -> dict[str, Any]:
    """Options of a strategy, or of another dataclass with a name, from text, by the types that it declares.

    Raises:
        ConfigError: an option is unknown, or its text is of another type.
    """
    known = [f.name for f in dataclasses.fields(cast(Any, kind))]
    for option in texts:
        if option not in known:
            raise ConfigError(f"{kind.name} has no option {option!r}.{did_you_mean(option, known)}")
    hints = _hints(kind)
    return {option: _value(kind.name, option, text, hints.get(option, Any)) for option, text in texts.items()}


def _hints(kind: type[Named]) -> dict[str, Any]:
    try:
        return get_type_hints(kind)
    except NameError:  # a plugin may import the names of its types for type checkers only
        return {}


def _value(name: str, option: str, text: str, hint: Any) -> Any:
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    value = _parse(text)
    if any(_fits(value, kind) for kind in kinds):
        return value
    if str in kinds:  # loss_on=5 is a pattern
        return text
    words = " or ".join(w for kind in kinds if (w := _WORD.get(get_origin(kind) or kind)))
    if not words.replace("none", ""):
        raise ConfigError(f"{name}.{option} cannot be given as text. Make the strategy in Python and use --load.")
    raise ConfigError(f"{name}.{option} must be {words}, got {text!r}.")


_WORD = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    tuple: "a list",
    list: "a list",
    types.NoneType: "none",
}


def _parse(text: str) -> Any:
    """JSON where it is JSON, Python's spelling of true, false and none, else the text."""
    if text.strip().lower() in _WORDS:
        return _WORDS[text.strip().lower()]
    try:
        return json.loads(text)
    except ValueError:
        return text


def _fits(value: Any, kind: Any) -> bool:
    if kind is Any:
        return True
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if get_origin(kind) in (tuple, list):
        inner = [k for k in get_args(kind) if k is not ...]
        return isinstance(value, list) and all(_fits(v, inner[0]) for v in value)
    return isinstance(kind, type) and kind in (bool, str, types.NoneType, dict) and isinstance(value, kind)
