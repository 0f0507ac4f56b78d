"""How do the fields of a record become a prompt and an answer?

A template is text with placeholders: `{question}` a field, `{meta.topic}` a field inside a field, `{choices[0]}` an
item of a list, `{choices[label]}` the item whose number (or key) another field holds. `{{` and `}}` are braces.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ttrouting.errors import ConfigError, did_you_mean

_PARTS = re.compile(r"(?P<double>\{\{|\}\})|\{(?P<path>[^{}]*)\}|(?P<brace>[{}])")
_NAME = r"[^\s.\[\]{}](?:[^.\[\]{}]*[^\s.\[\]{}])?"
_PATH = re.compile(rf"{_NAME}(\.{_NAME}|\[{_NAME}\])*")
_STEP = re.compile(r"\.?([^.\[\]]+)|\[([^\[\]]+)\]")


class FieldFault(Exception):
    """A record has not what a template asks for; the text says what.

    Attributes:
        unknown: whether the very field is missing, as when it is misspelt.
    """

    def __init__(self, reason: str, unknown: bool = False) -> None:
        super().__init__(reason)
        self.unknown = unknown


class Template:
    """A parsed template.

    Args:
        text: the template. name: the option that it was given for, for messages.

    Raises:
        ConfigError: a brace that is not closed, or a placeholder that is none.
    """

    def __init__(self, text: str, name: str) -> None:
        self.text = text
        self.literals = [""]  # the text before, between and after the placeholders
        self.paths: list[str] = []
        end = 0
        for match in _PARTS.finditer(text):
            self.literals[-1] += text[end : match.start()]
            end = match.end()
            if match["double"]:
                self.literals[-1] += match["double"][0]
            elif match["brace"] or not _PATH.fullmatch(match["path"]):
                found = match["brace"] or match[0]
                raise ConfigError(
                    f"The template {name} {text!r} has {found!r} at character {match.start()}. A placeholder is "
                    "{field}, {field.inner}, {list[0]} or {list[field]}; a brace itself is {{ or }}."
                )
            else:
                self.paths.append(match["path"])
                self.literals.append("")
        self.literals[-1] += text[end:]

    def render(self, fields: Mapping[str, Any]) -> str:
        """The text of one record.

        Raises:
            FieldFault: a field is missing, null, or no text and no number.
        """
        return self.fill([as_text(lookup(fields, path), path) for path in self.paths])

    def fill(self, values: list[str]) -> str:
        """The template with these values in its placeholders."""
        return "".join(a + b for a, b in zip(self.literals, [*values, ""], strict=True))


def check_path(path: str, name: str) -> None:
    """Refuse what is no path to a field; `name` is the option that it was given for."""
    if not _PATH.fullmatch(path):
        raise ConfigError(f"{name} names a field of the records, such as choices or question.choices; got {path!r}.")


def lookup(fields: Mapping[str, Any], path: str) -> Any:
    """What stands in a record under a path.

    Raises:
        FieldFault: nothing does.
    """
    if path in fields:  # also a name with dots
        return fields[path]
    value: Any = fields
    for match in _STEP.finditer(path):
        plain, bracket = match[1], match[2]
        if plain is not None:
            value = _field(value, plain, path)
            continue
        key: Any = int(bracket) if re.fullmatch(r"-?\d+", bracket) else _field(fields, bracket, path)
        if isinstance(value, list) and isinstance(key, int) and not isinstance(key, bool):
            if not 0 <= key < len(value):
                raise FieldFault(f"{{{path}}} asks for item {key} of {len(value)}")
            value = value[key]
        elif isinstance(value, Mapping) and isinstance(key, str):
            value = _field(value, key, path)
        else:
            raise FieldFault(f"{{{path}}} asks for item {key!r} of {_kind(value)}")
    return value


def as_text(value: Any, path: str) -> str:
    """A value as the text that it stands for: text as it is, numbers and truth values as Python writes them.

    Raises:
        FieldFault: it is null, a list or an object.
    """
    if isinstance(value, (str, int, float)):
        return str(value)
    what = _kind(value)
    more = f"; name one item, as in {{{path}[0]}} or {{{path}[label]}}" if what == "a list" else ""
    raise FieldFault(f"{{{path}}} is {what}, not text or a number{more}")


def _field(value: Any, name: str, path: str) -> Any:
    if not isinstance(value, Mapping):
        raise FieldFault(f"{{{path}}} asks for {name!r} in {_kind(value)}")
    if name not in value:
        raise FieldFault(f"{{{path}}}: there is no field {name!r}.{did_you_mean(name, map(str, value))}", True)
    return value[name]


def _kind(value: Any) -> str:
    words = {type(None): "null", list: "a list", dict: "an object", str: "text"}
    return words.get(type(value), f"of type {type(value).__name__}")
