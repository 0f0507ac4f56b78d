"""`ttrouting strategies`: which strategies are installed, and which options has one of them?"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Annotated, Any

import typer
from rich.table import Table

from ttrouting.cli.options import Debug, Json
from ttrouting.cli.output import Output
from ttrouting.errors import ConfigError
from ttrouting.registry import StrategyInfo, get_strategy, list_strategies


def command(
    name: Annotated[str | None, typer.Argument(help="Show the options of this strategy.", show_default=False)] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the installed strategies, or the options of one."""
    output = Output(as_json)
    found = list_strategies()
    if name is None:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("name", "kind", "from", "what it does, and its cost"):
            table.add_column(column, no_wrap=column in ("name", "kind"))
        for info in found:
            table.add_row(info.name, info.kind, info.source, info.summary)
        output.show(table)
        output.data({"strategies": [_facts(info) for info in found]})
        return
    info = next(i for i in found if i.cls is get_strategy(name))
    output.text(f"{info.name} ({info.kind}, from {info.source}): {info.summary}\n\n{inspect.getdoc(info.cls)}\n")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("option", "type", "default"):
        table.add_column(column)
    for option in _options(info):
        table.add_row(option["name"], option["type"], repr(option["default"]))
    output.show(table)
    for preset, options in info.cls.presets.items():
        told = ", ".join(f"{option}={value!r}" for option, value in options.items())
        output.text(f"\npreset={preset}: {told}")
    output.data(_facts(info))


def _facts(info: StrategyInfo) -> dict[str, Any]:
    return {
        "name": info.name,
        "kind": info.kind,
        "source": info.source,
        "summary": info.summary,
        "options": _options(info),
        "presets": {name: dict(options) for name, options in info.cls.presets.items()},
    }


def _options(info: StrategyInfo) -> list[dict[str, Any]]:
    """Each option with its declared type and the default that the strategy starts with."""
    try:
        made: Any = info.cls()
    except ConfigError:  # an option without a default that works, such as a mask
        made = None
    options = []
    for field in dataclasses.fields(info.cls):
        default = None if field.default is dataclasses.MISSING else field.default
        value = getattr(made, field.name, default)
        options.append({"name": field.name, "type": str(field.type), "default": value})
    return options
