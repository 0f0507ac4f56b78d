"""Reference sets: questions that a model was asked, how it was routed at them, and finding those near a new one.

    refset = build(model, tokenizer, "train.jsonl", "sets/train", prompt="Q: {question}\\nA:", answer=" {answer}\\n")
    refset = ReferenceSet.open(resolve("pocket"))

    deltas = fit_tasks(model, tokenizer, refset)  # for TaskDelta

`manifest.py` and `writing.py` say what is in a set's folder, `recipe.py` which options a build has.
"""

from __future__ import annotations

import os
from pathlib import Path

from ttrouting.refsets.builder import Progress, build
from ttrouting.refsets.fitting import fit_tasks
from ttrouting.refsets.merge import merge_sets
from ttrouting.refsets.neighbours import Neighbours
from ttrouting.refsets.records import Record
from ttrouting.refsets.reference_set import ReferenceSet
from ttrouting.refsets.task_deltas import TaskDeltas, TaskFit

__all__ = [
    "Neighbours",
    "Progress",
    "Record",
    "ReferenceSet",
    "TaskDeltas",
    "TaskFit",
    "build",
    "fit_tasks",
    "merge_sets",
    "resolve",
]

SHIPPED = Path(__file__).parent / "shipped"


def resolve(name: str | os.PathLike[str]) -> Path:
    """The folder of a set: `"pocket"` is the one that ships with this package, everything else a path."""
    return SHIPPED / "pocket" if name == "pocket" else Path(name)
