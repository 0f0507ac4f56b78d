"""`ttrouting refset`: what is in a reference set, is it whole, what is near a text, and how are shards joined?

Building is in `refset_build.py`, fitting deltas to its tasks in `refset_fit.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from ttrouting.cli import refset_build, refset_fit
from ttrouting.cli.models import POCKET, load_model
from ttrouting.cli.options import Debug, Device, Dtype, DtypeName, Escapes, Json, ModelName
from ttrouting.cli.output import Output
from ttrouting.cli.refset_build import EmbedderName, Keep, SetName, tell
from ttrouting.cli.texts import unescape
from ttrouting.errors import ConfigError
from ttrouting.refsets import ReferenceSet, merge_sets, resolve
from ttrouting.refsets.builder import MODEL
from ttrouting.refsets.embedders import as_embedder
from ttrouting.refsets.neighbours import LEAKAGE

SHOWN = 64  # characters of a prompt in a table

group = typer.Typer(
    help="Build, fit, join, check and search reference sets: questions with how the model was routed at them.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

group.command("build")(refset_build.command)
group.command("fit")(refset_fit.command)


@group.command("info")
def info_command(refset: SetName, as_json: Json = False, debug: Debug = False) -> None:
    """Show what is in a set: its model, embedder, counts and files."""
    tell(Output(as_json), ReferenceSet.open(resolve(refset)))


@group.command("verify")
def verify_command(refset: SetName, as_json: Json = False, debug: Debug = False) -> None:
    """Hash every file of a set and compare with its manifest."""
    output = Output(as_json)
    found = ReferenceSet.open(resolve(refset))
    with output.waiting(f"hashing {found.path}"):
        found.verify()
    names = sorted(found.manifest["files"])
    output.text(f"{found.path}: {len(names)} files are what the manifest says ({', '.join(names)})")
    output.data({"path": str(found.path), "verified": names})


@group.command("merge")
def merge_command(
    *,
    parts: Annotated[list[str], typer.Argument(metavar="SET...", help="Finished sets, such as shards.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The joined set; must not exist yet.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Join sets of one model and one embedder; of equal prompts with equal answers the first is kept."""
    output = Output(as_json)
    with output.waiting("joining") as say:
        found = merge_sets([resolve(part) for part in parts], out, say)
    tell(output, found)


@group.command("search")
def search_command(
    refset: SetName,
    text: Annotated[str, typer.Argument(help="What the model would get: the prompt of a question.")],
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="How many neighbours.")] = 5,
    use: Annotated[Keep, typer.Option(help="Records answered correctly, or all.")] = Keep.SUCCESSFUL,
    max_similarity: Annotated[float, typer.Option(help="Leave out what is more similar: leakage.")] = LEAKAGE,
    eps: Annotated[float | None, typer.Option(help="Only references within this distance.")] = None,
    index: Annotated[str, typer.Option(help="flat, hnsw, ivfpq, or auto: by size.")] = "auto",
    model: ModelName = POCKET,
    embedder: EmbedderName = MODEL,
    escapes: Escapes = False,
    dtype: DtypeName = Dtype.AUTO,
    device: Device = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show the references that are nearest to a text.

    A set that another embedder made needs that one: --embedder NAME.

    Example: ttrouting refset search pocket -e "Q: 12+30\\nA:"
    """
    output = Output(as_json)
    text = unescape(text) if escapes else text
    found = ReferenceSet.open(resolve(refset))
    with output.waiting(f"searching {found.path}") as say:
        query = _embed(found, text, embedder, model, (dtype.value, device), say)
        began = perf_counter()
        near = found.search(query, k, use=use.value, max_similarity=max_similarity, eps=eps, index=index)
        milliseconds = 1000 * (perf_counter() - began)
    rows = [
        {"number": int(number), "similarity": float(similarity), "distance": float(distance)}
        | asdict(found.record(number))
        for number, similarity, distance in zip(near.index[0], near.similarity[0], near.distance[0], strict=True)
        if number >= 0
    ]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("similarity", "distance", "task", "end of the prompt", "answer", "right"):
        table.add_column(column, justify="right" if column in ("similarity", "distance") else "left")
    for row in rows:
        near_by = f"{row['similarity']:.3f}", f"{row['distance']:.3f}"
        right = output.marks[0 if row["correct"] else 1]
        table.add_row(*near_by, *(Text(_tail(str(row[part]))) for part in ("task", "prompt", "answer")), right)
    output.show(table)
    output.note(f"{len(rows)} of {len(found)} references, {milliseconds:.0f} ms with hashing what was read.")
    output.data({"path": str(found.path), "text": text, "neighbours": rows, "milliseconds": milliseconds})


def _embed(
    found: ReferenceSet, text: str, embedder: str, model: str, load: tuple[str, str], say: Callable[[str], None]
) -> Any:
    """The raw embedding `[1, D]` of a text as the set's own embedder makes it."""
    # a manifest may not choose what is loaded: the names come from the command line
    if (embedder == MODEL) != (found.embedder_name == MODEL):
        raise ConfigError(
            f"{found.path} was embedded by {found.embedder_name!r}, and the text would be by {embedder!r}. Give the "
            "same with --embedder; a set that a function embedded is searched in Python."
        )
    if embedder != MODEL:
        tool = as_embedder(embedder)
        if tool.name != found.embedder_name:
            raise ConfigError(f"{found.path} was embedded by {found.embedder_name!r}, not {tool.name!r}.")
        return tool.embed([text])
    from ttrouting.pathways import encode, read_prompts
    from ttrouting.sites import find_sites, text_config
    from ttrouting.target import Target

    say(f"loading {model}")
    loaded, tokenizer = load_model(model, *load)
    target = Target(loaded, find_sites(loaded), tokenizer)
    found.check_model(target.fingerprint)
    (ids,), _ = encode(tokenizer, [text], [""])
    limit = getattr(text_config(loaded.config), "max_position_embeddings", None)
    if not ids or (limit is not None and len(ids) > limit):
        raise ConfigError(f"The text has {len(ids)} tokens; give it 1 to {limit}.")
    return read_prompts(target, [ids])[1].cpu().numpy()


def _tail(text: str) -> str:
    """The end of a text on one line."""
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else f"...{line[3 - SHOWN :]}"
