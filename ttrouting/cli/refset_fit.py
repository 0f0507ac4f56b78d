"""`ttrouting refset fit`: for which tasks of a reference set is a delta fitted and confirmed, and what does it do?"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from ttrouting.cli.models import POCKET, downloads, load_model
from ttrouting.cli.options import Debug, Device, Dtype, DtypeName, Json, ModelName
from ttrouting.cli.output import Output
from ttrouting.cli.refset_build import SetName
from ttrouting.refsets import ReferenceSet, TaskDeltas, fit_tasks, resolve
from ttrouting.shared_fit import shared_rule


def command(
    *,
    refset: SetName,
    model: ModelName = POCKET,
    shots: Annotated[
        int, typer.Option(min=0, help="Solved references in front of every second prompt, to serve such prompts.")
    ] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the descent at most.")] = 60,
    lr: Annotated[float, typer.Option(help="Step size of Adam.")] = 0.05,
    layers: Annotated[str, typer.Option(metavar="RULE", help="all, or last:N.")] = "all",
    batch_size: Annotated[int, typer.Option(min=1, help="References in one forward.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Of the parts to fit and to judge by.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where the deltas go; for --set task_delta.deltas=DIR.  [default: the set]"),
    ] = None,
    dtype: DtypeName = Dtype.AUTO,
    device: Device = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fit a delta on router logits to each task of a set, for --adapt task_delta.

    A delta is kept where references that were held out confirm it: their loss falls (one-sided p < 0.05) and no
    smaller share of them is right. The set needs tasks and wrong answers too: refset build --task ... --keep all.

    Example: ttrouting refset fit my_set --model NAME
    """
    output = Output(as_json)
    shared_rule(layers)  # a wrong one is told before a model is loaded
    found = ReferenceSet.open(resolve(refset))
    with output.waiting(f"loading {model}", downloads(model)) as say:
        loaded, tokenizer = load_model(model, dtype.value, device)
        deltas = fit_tasks(
            loaded,
            tokenizer,
            found,
            out,
            shots=shots,
            steps=steps,
            lr=lr,
            layers=layers,
            batch_size=batch_size,
            seed=seed,
            progress=_seldom(say),
        )
    output.show(_table(deltas))
    fits = list(deltas.tasks.values())
    output.note(f"{len(deltas.accepted)} of {len(fits)} tasks have a delta, in {deltas.path}.")
    known = deltas.manifest["classifier"]
    output.note(f"Of questions that it has not seen the classifier knows the task of {100 * known['right']:.1f} %.")
    if all(fit.outcome == "not needed" for fit in fits) and found.manifest["counts"]["correct"] == len(found):
        output.note(
            "This set holds right answers only. Build it with --keep all, so that there is something to mend."
        )
    output.data(
        {
            "path": str(deltas.path),
            "refset": str(found.path),
            "accepted": [fit.task for fit in deltas.accepted],
            "tasks": [asdict(fit) for fit in fits],
            "options": deltas.manifest["options"],
            "head": deltas.head,
            "classifier": known,
        }
    )


def _seldom(say: Callable[[str], None]) -> Callable[[str], None]:
    """Pass on what is said often where a line is redrawn, now and then where each is a new one."""
    said, pause = -1e9, 0.2 if sys.stderr.isatty() else 10.0

    def pass_on(text: str) -> None:
        nonlocal said
        now = perf_counter()
        if now - said >= pause:
            said = now
            say(text)

    return pass_on


def _table(deltas: TaskDeltas) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("task", "references", "held out", "right", "loss", "p", "step", "outcome"):
        table.add_column(column, justify="left" if column in ("task", "outcome") else "right")
    for fit in deltas.tasks.values():
        looked_at = fit.held > 0
        fitted = looked_at and fit.step > 0
        table.add_row(
            Text(fit.task),
            str(fit.references),
            str(fit.held) if looked_at else "",
            _change(fit.right_before, fit.right_after, fitted, ".2f") if looked_at else "",
            _change(fit.loss_before, fit.loss_after, fitted, ".3f") if looked_at else "",
            f"{fit.p_value:.2g}" if fitted else "",
            str(fit.step) if fitted else "",
            Text(fit.outcome if fit.outcome == "accepted" else f"{fit.outcome}: {fit.reason}"),
        )
    return table


def _change(before: float, after: float, fitted: bool, form: str) -> str:
    return f"{before:{form}} -> {after:{form}}" if fitted else f"{before:{form}}"
