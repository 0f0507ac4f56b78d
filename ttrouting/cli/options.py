"""Which options do several subcommands share?"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ttrouting.cli.models import POCKET

DEBUG = "ttrouting.debug"


class Dtype(StrEnum):
    """What a model's weights are loaded as; `auto` is what its files say, fp32 for the pocket model."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT64 = "float64"


def _remember_debug(ctx: typer.Context, value: bool) -> bool:
    ctx.meta[DEBUG] = value  # shared with the group, which catches the errors
    return value


def _option(*names: str, **settings: Any) -> Any:
    return typer.Option(*names, **settings)


ModelName = Annotated[
    str,
    _option(
        "--model",
        "-m",
        metavar="NAME_OR_PATH",
        help=f"A folder or a hub name. '{POCKET}' is the small model in this package, no download.",
    ),
]
DtypeName = Annotated[Dtype, _option("--dtype", help="Of the loaded weights.")]
Device = Annotated[
    str,
    _option(
        "--device", metavar="DEVICE", help="auto (an accelerator if there is one), cpu, cuda:1 ..., or map: spread."
    ),
]
Adapt = Annotated[
    list[str] | None,
    _option("--adapt", "-a", metavar="NAME,...", help="Strategies by name; see 'ttrouting strategies'."),
]
Settings = Annotated[
    list[str] | None,
    _option(
        "--set",
        "-s",
        metavar="NAME.OPTION=VALUE",
        help="An option of a strategy, such as scmoe.beta=0.3; VALUE is JSON or plain text.",
    ),
]
Load = Annotated[
    list[Path] | None,
    _option("--load", metavar="DIR", help="Strategies that ttr.save or 'ttrouting calibrate --out' wrote."),
]
NoHarm = Annotated[
    bool, _option("--no-harm/--no-no-harm", help="Roll adaptations back that do not help on held-back tokens.")
]
Files = Annotated[
    list[Path] | None,
    _option("--file", "-f", metavar="FILE", help="Read a text from a file (one last line end is dropped)."),
]
Escapes = Annotated[bool, _option("--escapes", "-e", help=r"Read \n, \t and \\ in texts given as arguments.")]
Json = Annotated[bool, _option("--json", help="The result as one JSON object on stdout; notes stay on stderr.")]
Debug = Annotated[
    bool, _option("--debug", callback=_remember_debug, is_eager=True, help="Show the traceback of an error.")
]
