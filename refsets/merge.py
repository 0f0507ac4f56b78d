"""How do the shards of a set become one? Record by record, each prompt with its answer once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ttrouting.errors import ArtefactError, ConfigError
from ttrouting.refsets.arrays import ArrayFile
from ttrouting.refsets.builder import made
from ttrouting.refsets.draft import safely
from ttrouting.refsets.manifest import EMBEDDINGS, KIND, MANIFEST, OFFSETS, PATHWAYS, RECORDS, SCHEMA, write_manifest
from ttrouting.refsets.recipe import Counts
from ttrouting.refsets.records import Record, pair_digest
from ttrouting.refsets.reference_set import ReferenceSet
from ttrouting.refsets.writing import (
    CENTRED_ARRAYS,
    EMBEDDING_ARRAYS,
    OFFSET_ARRAYS,
    PATHWAY_ARRAYS,
    Block,
    write_set,
)

ROWS = 4096  # records in memory at a time


def merge_sets(
    parts: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    progress: Callable[[str], None] | None = None,
) -> ReferenceSet:
    """Join sets of one model and one embedder. Of equal prompts with equal answers the first is kept.

    The new set appears at once, when it is whole; a kill leaves nothing under its name. The mean and the scale of
    embeddings are computed anew.

    Args:
        parts: folders of finished sets, in the order of the records. out: a folder that does not exist yet.
        progress: called with what is going on.

    Raises:
        ConfigError: fewer than two parts, or parts that do not belong together; the text says what differs.
        ArtefactError: a part is damaged; out exists or cannot be written.
    """
    say = progress or (lambda _: None)
    folder = Path(out).expanduser()
    if len(parts) < 2:
        raise ConfigError(f"merge joins two sets or more, got {len(parts)}.")
    if folder.exists():
        raise ArtefactError(f"{folder} exists. Choose another path for the joined set.")
    sets = [ReferenceSet.open(part) for part in parts]
    for other in sets[1:]:
        _check_together(sets[0], other)
    keep: list[NDArray[np.bool_]] = []
    seen: set[int] = set()
    for part in sets:
        say(f"checking {part.path}")
        part.verify()
        keep.append(_first_ones(part, seen))
    say(f"writing {len(seen)} records to {folder}")
    sizes = (sets[0].dimension, sets[0].layers, sets[0].experts)
    draft = folder.with_name(f".{folder.name}.merging")
    with safely(folder):
        shutil.rmtree(draft, ignore_errors=True)  # of a merge that was killed
        draft.mkdir(parents=True)
        blocks = (block for part, mask in zip(sets, keep, strict=True) for block in _blocks(part, mask))
        files = write_set(draft, blocks, len(seen), sizes, sets[0].embedder_name == "model")
        write_manifest(draft / MANIFEST, {**_manifest(sets, keep), "files": files})
        draft.rename(folder)
    return ReferenceSet.open(folder)


def _check_together(one: ReferenceSet, other: ReferenceSet) -> None:
    for what in ("fingerprint", "embedder_name", "dimension", "layers", "experts"):
        here, there = getattr(one, what), getattr(other, what)
        if here != there:
            told = "of another model" if what == "fingerprint" else "not alike"
            raise ConfigError(
                f"{one.path} and {other.path} are {told}: {what.replace('_', ' ')} {here} and {there}. Join sets "
                "that were built with the same model and the same embedder."
            )


def _first_ones(part: ReferenceSet, seen: set[int]) -> NDArray[np.bool_]:
    """`[N]` records whose prompt and answer are new; adds them to `seen`."""
    keep = np.zeros(len(part), dtype=np.bool_)
    number = 0
    for block in _blocks(part, np.ones(len(part), dtype=np.bool_)):
        for line in _lines(block):
            record = Record.parse(line, f"Record {number} of {part.path / RECORDS}")
            digest = pair_digest(record.prompt, record.answer)
            keep[number] = digest not in seen
            seen.add(digest)
            number += 1
    return keep


def _blocks(part: ReferenceSet, keep: NDArray[np.bool_]) -> Iterator[Block]:
    """The records of a set that are kept, `ROWS` at a time; read, not mapped, so that nothing stays in memory."""
    centred = part.embedder_name == "model"
    offsets = ArrayFile(part.path / OFFSETS, OFFSET_ARRAYS)
    embeddings = ArrayFile(part.path / EMBEDDINGS, CENTRED_ARRAYS if centred else EMBEDDING_ARRAYS)
    pathways = ArrayFile(part.path / PATHWAYS, PATHWAY_ARRAYS)
    with (part.path / RECORDS).open("rb") as records:
        for start in range(0, len(part), ROWS):
            mask = keep[start : start + ROWS]
            stop = start + len(mask)
            lengths = np.diff(offsets.read("offsets", start, stop + 1))
            if (lengths < 0).any():
                raise ArtefactError(f"{part.path / OFFSETS} does not rise. Build the set again.")
            text = np.frombuffer(records.read(int(lengths.sum())), np.uint8)
            yield Block(
                text[np.repeat(mask, lengths)],
                lengths[mask],
                offsets.read("correct", start, stop)[mask],
                embeddings.read("embeddings", start, stop)[mask],
                pathways.read("omega", start, stop)[mask],
            )


def _lines(block: Block) -> Iterator[bytes]:
    text, end = block.text.tobytes(), 0
    for length in block.lengths:
        end += int(length)
        yield text[end - int(length) : end]


def _manifest(sets: Sequence[ReferenceSet], keep: Sequence[NDArray[np.bool_]]) -> dict[str, Any]:
    """All of a manifest but its files."""
    first = sets[0].manifest
    counts = Counts()
    for field in fields(Counts):
        if field.type == "int":
            setattr(counts, field.name, sum(part.manifest["counts"].get(field.name, 0) for part in sets))
    kept = sum(int(mask.sum()) for mask in keep)
    counts.duplicates += counts.records - kept
    counts.records = kept
    counts.correct = sum(int((part.correct & mask).sum()) for part, mask in zip(sets, keep, strict=True))
    merged = [
        {"name": part.path.name, **{k: part.manifest[k] for k in ("sha256", "counts", "provenance")}} for part in sets
    ]
    return {
        "schema": SCHEMA,
        "kind": KIND,
        **{name: first[name] for name in ("fingerprint", "model", "sites", "embedder")},
        "counts": asdict(counts),
        "provenance": {"merged": merged, **made()},
    }
