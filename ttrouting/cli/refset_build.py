"""`ttrouting refset build`: which options has a build, and what is said while it runs and after it?"""

from __future__ import annotations

import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from time import perf_counter
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from ttrouting.cli.models import POCKET, downloads, load_model
from ttrouting.cli.options import Debug, Device, Dtype, DtypeName, Escapes, Json, ModelName
from ttrouting.cli.output import Output
from ttrouting.cli.texts import unescape
from ttrouting.refsets import Progress, ReferenceSet, build
from ttrouting.refsets.builder import MODEL
from ttrouting.refsets.embedders import as_embedder
from ttrouting.refsets.manifest import MANIFEST
from ttrouting.refsets.recipe import Recipe
from ttrouting.refsets.sources import open_source


class JudgeName(StrEnum):
    """How an answer is judged."""

    EXACT = "exact"
    CHOICE = "choice"
    REGEX = "regex"


class Keep(StrEnum):
    """Which records stay in a set."""

    SUCCESSFUL = "successful"
    ALL = "all"


class ChoiceScore(StrEnum):
    """By what choices are compared."""

    PER_BYTE = "per_byte"
    SUM = "sum"


SetName = Annotated[str, typer.Argument(metavar="SET", help="A set's folder, or 'pocket': the set in this package.")]
EmbedderName = Annotated[
    str,
    typer.Option(
        "--embedder",
        metavar="NAME",
        help="'model' (its own hidden states), or a sentence-transformers name or folder.",
    ),
]


def command(
    *,
    data: Annotated[str, typer.Option(metavar="FILE_OR_NAME", help="A JSONL file, or a set's name on the hub.")],
    prompt: Annotated[str, typer.Option(metavar="TEMPLATE", help="What the model gets, such as 'Q: {question}'.")],
    answer: Annotated[str, typer.Option(metavar="TEMPLATE", help="How it should go on, such as ' {answer}'.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The set; a build that was stopped goes on.")],
    model: ModelName = POCKET,
    source: Annotated[str, typer.Option(metavar="TEMPLATE", help="A label for people.")] = "",
    task: Annotated[str, typer.Option(metavar="TEMPLATE", help="A label for people.")] = "",
    judge: Annotated[
        JudgeName,
        typer.Option(help="Greedy text is the answer; it is the likeliest choice; a pattern finds the same."),
    ] = JudgeName.EXACT,
    choices: Annotated[
        str | None, typer.Option(metavar="FIELD", help="For choice: the list that the answer is one of.")
    ] = None,
    choice_score: Annotated[
        ChoiceScore, typer.Option(help="For choice: log-likelihood per byte, or its sum.")
    ] = ChoiceScore.PER_BYTE,
    pattern: Annotated[
        str | None, typer.Option(metavar="REGEX", help="For regex: its first group, or all of it.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="For regex: tokens to generate at most.")] = 256,
    keep: Annotated[Keep, typer.Option(help="Records answered correctly, or all, with a flag.")] = Keep.SUCCESSFUL,
    embedder: EmbedderName = MODEL,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts in one forward.")] = 16,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many records from the start.")] = None,
    shard: Annotated[str, typer.Option(metavar="I/N", help="Only the i-th of every n records.")] = "1/1",
    subset: Annotated[str | None, typer.Option(help="Of a set on the hub.")] = None,
    split: Annotated[str | None, typer.Option(help="Of a set on the hub; train if not given.")] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Drop what a build with other options left here.")
    ] = False,
    escapes: Escapes = False,
    dtype: DtypeName = Dtype.AUTO,
    device: Device = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Ask a model the records of a file and keep those that it answers correctly.

    Templates name fields: {question}, {meta.topic}, {choices[0]}, {choices[label]}; {{ and }} are braces. The same
    command goes on after an interruption, at whatever moment it came.

    Example: ttrouting refset build -e --data a.jsonl --prompt "Q: {question}\\nA:" --answer " {answer}\\n" --out set
    """
    output = Output(as_json)
    texts = {"prompt": prompt, "answer": answer, "source": source, "task": task}
    if escapes:
        texts = {name: unescape(text) for name, text in texts.items()}
    elif any("\\n" in text for text in texts.values()):
        output.note(r"A template holds \n as two characters. Add --escapes if it is meant to be a line end.")
    recipe = Recipe(
        **texts,
        judge=judge.value,
        choices=choices,
        choice_score=choice_score.value,
        pattern=pattern,
        max_new_tokens=max_new_tokens,
        keep=keep.value,
        limit=limit,
        shard=shard,
    )
    finished = (out / MANIFEST).exists()
    tool = embedder if embedder == MODEL else as_embedder(embedder)
    with output.waiting(f"reading {data}") as say:
        found = open_source(data, subset=subset, split=split, limit=limit)
        say(f"loading {model}")
    with output.waiting(f"loading {model}", downloads(model)) as say:
        loaded, tokenizer = load_model(model, dtype.value, device)
        say(f"reading {found.name}")
        refset = build(
            loaded,
            tokenizer,
            found,
            out,
            embedder=tool,
            batch_size=batch_size,
            name=Path(model).name,
            restart=restart,
            progress=_progress(found.name, say),
            **recipe.to_dict(),
        )
    if finished:
        output.note(f"{out} was finished before. Nothing was done.")
    tell(output, refset)
    output.note(f'Search it: ttrouting refset search {out} "TEXT"')


def _progress(name: str, say: Callable[[str], None]) -> Callable[[Progress], None]:
    """Tell how far a build is: often where a line is redrawn, now and then where each is a new one."""
    began, said = perf_counter(), 0.0
    pause = 0.2 if sys.stderr.isatty() else 10.0

    def tell(at: Progress) -> None:
        nonlocal said, began
        now = perf_counter()
        if at.read == at.before:  # nothing is done yet: what went before is no rate
            began = now
        elif now - said < pause:
            return
        said = now
        rate = (at.read - at.before) / max(now - began, 1e-9)
        left = f", {rate:.1f}/s, {_duration((at.of - at.read) / rate)} left" if rate else ""
        say(f"{name}: {at.read} of {at.of} records read, {at.records} kept{left}")

    return tell


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def tell(output: Output, refset: ReferenceSet) -> None:
    """The summary of a set."""
    manifest = refset.manifest
    counts, made = manifest["counts"], manifest["provenance"]
    size = sum(facts["bytes"] for facts in manifest["files"].values())
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column()
    rows = {
        "set": str(refset.path),
        "records": f"{counts['records']} of {counts['read']} read; {counts['correct']} answered correctly",
        "left out": ", ".join(
            f"{counts.get(name, 0)} {told}"
            for name, told in (("bad", "unusable"), ("duplicates", "repeated"), ("too_long", "too long"))
        ),
        "model": f"{manifest.get('model')}  fingerprint {refset.fingerprint[:12]}",
        "sites": f"{refset.layers} MoE layers of {refset.experts} experts",
        "embedder": f"{refset.embedder_name}  dimension {refset.dimension}",
        "data": str(made.get("data", f"{len(made.get('merged', []))} sets joined")),
        "made": f"{made.get('created')}  {' '.join(f'{k} {v}' for k, v in made.get('versions', {}).items())}",
        "size": f"{size / 1e6:.1f} MB in {len(manifest['files'])} files",
    }
    for name, value in rows.items():
        table.add_row(name, Text(value))
    output.show(table)
    if counts.get("first_bad"):
        output.note(f"The first unusable record: {counts['first_bad']}")
    output.data({"path": str(refset.path), **manifest})
