"""Which deltas were fitted to the tasks of a reference set, and what is in their two files?

    deltas = TaskDeltas.open("sets/train", refset)
    deltas.tasks["reverse/letters"].outcome, deltas.values[deltas.tasks["reverse/letters"].row]
    deltas.classifier.probabilities(refset.compared(embeddings))  # of the tasks, in their order

`deltas.json` says of each task what came of the fit and names the tensor file, which is called by its content: a kill
between the two leaves the old pair whole. The files belong to one model and to the data of one set.

Legend: `G` accepted tasks, `L` MoE layers, `E` experts, `T` tasks, `D` embedding dimension.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from ttrouting.errors import ArtefactError
from ttrouting.refsets.draft import safely
from ttrouting.refsets.manifest import Manifest, check_hash, inside, read_signed, write_file, write_manifest
from ttrouting.refsets.reference_set import ReferenceSet
from ttrouting.refsets.task_classifier import TaskClassifier

SCHEMA = 2
KIND = "task deltas"
DELTAS = "deltas.json"
AGAIN = "Fit the deltas again: ttrouting refset fit."
OUTCOMES = ("accepted", "rejected", "not needed", "too few")
_TENSORS = re.compile(r"deltas-[0-9a-f]{16}\.safetensors")


@dataclass(frozen=True)
class TaskFit:
    """What came of one task.

    Attributes:
        task: its label in the set. references: how many it has.
        outcome: `accepted`; `rejected`: held-out references did not confirm the delta; `not needed`: the model
            answers them; `too few` references to fit and to judge. reason: in words.
        row: of its delta among the accepted ones; -1 for the others.
        held: how many references were held out. right_before, right_after: share of them answered right.
        loss_before, loss_after: mean loss of their answers in nats. p_value: one-sided, that it did not fall.
        step: of the descent, after which the delta was taken. Numbers are 0 (p 1) where nothing was fitted.
    """

    task: str
    references: int
    outcome: str
    reason: str
    row: int = -1
    held: int = 0
    right_before: float = 0.0
    right_after: float = 0.0
    loss_before: float = 0.0
    loss_after: float = 0.0
    p_value: float = 1.0
    step: int = 0


class TaskDeltas:
    """Deltas by task. Made by `open`, or by `ttrouting.refsets.fitting.fit_tasks`.

    Attributes:
        path: the folder. manifest: what its manifest says. values: `[G, L, E]` fp32. tasks: by label.
        classifier: tells a question's task, by their order.
    """

    def __init__(
        self, path: Path, manifest: Manifest, values: NDArray[np.float32], classifier: TaskClassifier
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.values = values
        self.classifier = classifier
        self.tasks = {facts["task"]: TaskFit(**facts) for facts in manifest["tasks"]}

    @property
    def first(self) -> int:
        """Index of the lowest layer that was fitted."""
        return int(self.manifest["first"])

    @property
    def head(self) -> str:
        """What every prompt of the set begins with, and holds nowhere else; empty if there is nothing."""
        return str(self.manifest["head"])

    @property
    def familiar(self) -> float:
        """Cosine to the nearest reference that a question needs, for the set to know its task (`familiar.py`)."""
        return float(self.manifest["familiar"])

    @property
    def accepted(self) -> list[TaskFit]:
        """Tasks with a delta, in the order of `values`."""
        return sorted((t for t in self.tasks.values() if t.row >= 0), key=lambda t: t.row)

    @classmethod
    def open(cls, folder: str | os.PathLike[str], refset: ReferenceSet) -> TaskDeltas:
        """The deltas in a folder, which must be those of this set.

        Raises:
            ArtefactError: missing, damaged, of another schema, or fitted on other data or another model.
        """
        path = Path(folder).expanduser()
        file = path / DELTAS
        manifest = read_signed(file, KIND, SCHEMA, AGAIN)
        if manifest is None:
            raise ArtefactError(
                f"{path} holds no {DELTAS}. Fit deltas to the set's tasks: ttrouting refset fit {refset.path}."
            )
        lacking = _lacking(manifest)
        if lacking:
            raise ArtefactError(f"{file} lacks {lacking}. {AGAIN}")
        for what, own, theirs in (
            ("the data of another reference set", manifest["refset"], refset.identity),
            ("another model", manifest["fingerprint"], refset.fingerprint),
        ):
            if own != theirs:
                raise ArtefactError(
                    f"{file} was fitted on {what} ({own[:12]}) than {refset.path} holds ({theirs[:12]}). {AGAIN}"
                )
        if manifest["first"] >= refset.layers:
            raise ArtefactError(f"{file} begins at layer {manifest['first']} of {refset.layers}. {AGAIN}")
        sizes = (refset.layers, refset.experts, refset.dimension)
        return cls(path, manifest, *_read_tensors(path, manifest, *sizes))


def write_task_deltas(
    folder: Path,
    values: NDArray[np.float32],
    classifier: TaskClassifier,
    tasks: list[TaskFit],
    facts: dict[str, Any],
) -> TaskDeltas:
    """Write both files, the old ones stay until the new ones are whole.

    Args:
        values: `[G, L, E]`, by the tasks' rows. classifier: of the tasks, in their order. facts: the rest of the
            manifest: fingerprint, refset, first, head, familiar, and what is for people.

    Raises:
        ArtefactError: the folder cannot be written.
    """
    tensors = {"delta": values, "classifier.weight": classifier.weight, "classifier.bias": classifier.bias}
    data = safetensors.numpy.save({k: np.ascontiguousarray(v, dtype=np.float32) for k, v in tensors.items()})
    sha = hashlib.sha256(data).hexdigest()
    name = f"deltas-{sha[:16]}.safetensors"
    manifest = {
        **facts,
        "schema": SCHEMA,
        "kind": KIND,
        "tasks": [asdict(task) for task in tasks],
        "files": {name: {"sha256": sha, "bytes": len(data)}},
    }
    with safely(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / name, data)
        write_manifest(folder / DELTAS, manifest)  # from here on these are the deltas
        for old in folder.iterdir():
            if _TENSORS.fullmatch(old.name) and old.name != name:
                old.unlink()
    return TaskDeltas(folder, manifest, np.asarray(values, dtype=np.float32), classifier)


def _read_tensors(
    folder: Path, manifest: Manifest, layers: int, experts: int, dimension: int
) -> tuple[NDArray[np.float32], TaskClassifier]:
    (name,) = manifest["files"]
    check_hash(folder, manifest, name)
    file = inside(folder, name)
    try:
        arrays = safetensors.numpy.load(file.read_bytes())
    except (SafetensorError, OSError, KeyError) as error:
        raise ArtefactError(f"{file} is no safetensors file of deltas: {error}. {AGAIN}") from None
    tasks = manifest["tasks"]
    shapes = {
        "delta": (sum(task["row"] >= 0 for task in tasks), layers, experts),
        "classifier.weight": (len(tasks), dimension),
        "classifier.bias": (len(tasks),),
    }
    for key, shape in shapes.items():
        values = arrays.get(key)
        if values is None or values.dtype != np.float32 or values.shape != shape:
            raise ArtefactError(f"{file} should hold {key}, fp32 {list(shape)}. {AGAIN}")
        if not np.isfinite(values).all():
            raise ArtefactError(f"{file} holds numbers of {key} that are not finite. {AGAIN}")
    classifier = TaskClassifier(arrays["classifier.weight"], arrays["classifier.bias"])
    return arrays["delta"], classifier


def _lacking(manifest: Manifest) -> str:
    """The first part that is not there or of another type, or nothing."""
    kinds = {"fingerprint": str, "refset": str, "head": str, "familiar": float, "first": int, "tasks": list}
    for key, kind in kinds.items():
        if type(manifest.get(key)) is not kind:
            return key
    if not -1 <= manifest["familiar"] <= 1:
        return "a cosine"
    if not isinstance(manifest.get("files"), dict) or len(manifest["files"]) != 1:
        return "its one tensor file"
    fields = {name: type(value) for name, value in asdict(TaskFit("", 0, "", "")).items()}
    for facts in manifest["tasks"]:
        if not isinstance(facts, dict) or {k: type(v) for k, v in facts.items()} != fields:
            return "the facts of a task"
        numbers = [value for value in facts.values() if isinstance(value, float)]
        if facts["outcome"] not in OUTCOMES or not all(map(isfinite, numbers)):
            return f"what came of {facts['task']!r}"
    if len({facts["task"] for facts in manifest["tasks"]}) != len(manifest["tasks"]):
        return "one entry for each task"
    rows = sorted(facts["row"] for facts in manifest["tasks"] if facts["row"] >= 0)
    taken = sum(facts["outcome"] == "accepted" for facts in manifest["tasks"])
    if rows != list(range(taken)) or any((f["outcome"] == "accepted") != (f["row"] >= 0) for f in manifest["tasks"]):
        return "a row for each accepted task"
    if manifest["first"] < 0:
        return "the lowest layer"
    return ""
