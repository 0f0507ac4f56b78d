"""Which tasks of a reference set does a delta on router logits help, which delta, and of which task is a question?

    deltas = fit_tasks(model, tokenizer, ReferenceSet.open("sets/train"))

For every task one delta is fitted to the answers of its references (`ttrouting/shared_fit.py`), and judged by
references that neither the fit nor the choice of its step has seen. What they do not confirm is not kept. From all
references a classifier learns to tell the tasks apart.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ttrouting.errors import ArtefactError, ConfigError
from ttrouting.evaluation.statistics import ALPHA, sign_flip_p
from ttrouting.refsets.builder import made
from ttrouting.refsets.company import embedded, in_company
from ttrouting.refsets.familiar import least_similarity
from ttrouting.refsets.records import Record, others_than
from ttrouting.refsets.reference_set import ReferenceSet
from ttrouting.refsets.task_classifier import Fitted, fit_classifier
from ttrouting.refsets.task_deltas import TaskDeltas, TaskFit, write_task_deltas
from ttrouting.shared_fit import Part, fit_shared_delta, shared_rule
from ttrouting.sites import find_sites
from ttrouting.target import Target

ENOUGH = 0.97  # share of held-out references answered right, from which on nothing is wrong that could be mended
MIN_REFERENCES = 24  # of a task: of fewer, fewer than six would judge
MOST_REFERENCES = 400  # that are read: 60 steps see the pairs to fit eight times, and a hundred judge
HELD_OUT = 0.25
IN_COMPANY = 48  # references of a task that the classifier also sees in longer texts, twice each
MOST_OTHERS = 6  # solved references before them


def fit_tasks(
    model: Any,
    tokenizer: Any,
    refset: ReferenceSet,
    out: str | os.PathLike[str] | None = None,
    *,
    shots: int = 0,
    steps: int = 60,
    lr: float = 0.05,
    layers: str = "all",
    batch_size: int = 32,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> TaskDeltas:
    """Fit a delta to each task of a set, keep those that held-out references confirm, and write them.

    A delta is accepted if the mean loss of held-out references falls, one-sided p of the paired sign-flip test is
    below 0.05, and no smaller share of them is answered right. Where the model answers 0.97 of them anyway nothing is
    fitted.

    Args:
        model, tokenizer: those that the set was built with. refset: with labels of tasks, and with references that
            the model answers wrongly (`keep="all"`).
        out: folder of the two files, the set's own if None.
        shots: solved references of the same task in front of every second prompt, so that deltas serve such prompts.
        steps, lr, layers, batch_size, seed: as in `ttrouting.shared_fit.fit_shared_delta`.
        progress: called with what is going on.

    Raises:
        ConfigError: an option out of range, a set without labels, prompts too long for the model's context.
        ArtefactError: the set is damaged or another model's, or the folder cannot be written.
        NotMoEError, UnsupportedModelError, UnsupportedCallError: as in `fit_shared_delta`.
    """
    say = progress or (lambda _: None)
    if isinstance(shots, bool) or not isinstance(shots, int) or not 0 <= shots <= 100:
        raise ConfigError(f"shots must be a whole number from 0 to 100, got {shots!r}.")
    folder = refset.path if out is None else Path(out).expanduser()
    _check_writable(folder)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"fit_tasks needs a loaded model that is not adapted, got {model!r}.")
    target = Target(model, find_sites(model), tokenizer)
    refset.check_model(target.fingerprint)
    records = [refset.record(i) for i in range(len(refset))]
    tasks: dict[str, list[int]] = {}
    for number, record in enumerate(records):
        tasks.setdefault(record.task, []).append(number)
    if list(tasks) == [""]:
        raise ConfigError(f"{refset.path} labels no tasks. Build it with a task, such as --task '{{subject}}'.")
    options: dict[str, Any] = {
        "steps": steps,
        "lr": lr,
        "layers": layers,
        "batch_size": batch_size,
        "held_out": HELD_OUT,
        "seed": seed,
        "enough": ENOUGH,
    }
    wanted = max(MIN_REFERENCES, shots + 1)
    fits: list[TaskFit] = []
    deltas: list[NDArray[np.float32]] = []
    used: dict[str, list[int]] = {}
    for number, (task, own) in enumerate(sorted(tasks.items()), 1):
        label = f"task {number} of {len(tasks)}, {task or 'without a label'}"
        say(label)
        draw = random.Random(f"{seed}|{task}")
        used[task] = draw.sample(own, MOST_REFERENCES) if len(own) > MOST_REFERENCES else own
        if len(own) < wanted:
            fits.append(TaskFit(task, len(own), "too few", f"{wanted} are needed"))
            continue
        pairs = _pairs([records[i] for i in used[task]], shots, seed)
        found = fit_shared_delta(model, tokenizer, pairs, progress=partial(_tell, say, label), **options)
        outcome, reason, p_value = judge(found.held, found.step)
        row = -1
        if outcome == "accepted":
            row = len(deltas)
            deltas.append(found.delta.float().numpy())
        facts = (len(found.held.numbers), *_shares_and_losses(found.held), p_value, found.step)
        fits.append(TaskFit(task, len(own), outcome, reason, row, *facts))
    values = np.stack(deltas) if deltas else np.zeros((0, refset.layers, refset.experts), np.float32)
    head = common_head([record.prompt for record in records])
    say("which task a question is of")
    known = _classifier(target, refset, records, used, head, batch_size, seed)
    say("how similar references are to each other")
    manifest = {
        "fingerprint": refset.fingerprint,
        "refset": refset.identity,
        "model": refset.manifest.get("model"),
        "first": shared_rule(layers).lowest(refset.layers),
        "head": head,
        "familiar": least_similarity(target, refset, records, head, batch_size, seed) if deltas else 0.0,
        "classifier": {"penalty": known.penalty, "right": known.right, "loss": known.loss},
        "options": {**options, "shots": shots},
        "provenance": made(),
    }
    return write_task_deltas(folder, values, known.classifier, fits, manifest)


def _classifier(
    target: Target,
    refset: ReferenceSet,
    records: Sequence[Record],
    used: Mapping[str, Sequence[int]],
    head: str,
    batch_size: int,
    seed: int,
) -> Fitted:
    """Fitted to references alone and, where the model embeds and finds questions in longer texts, in such.

    Args:
        used: numbers of references, by task in the order of classes.
    """
    draw, classes = random.Random(f"{seed}|company"), {task: row for row, task in enumerate(used)}
    numbers = [number for own in used.values() for number in own]
    vectors = refset.vectors(numbers)
    if refset.embedder_name == "model" and head:
        texts: list[list[int]] = []
        for own in used.values():
            for number in draw.sample(own, min(IN_COMPANY, len(own))):
                for pool in (own, range(len(records))):  # as examples of its task, and as in a chat
                    count = min(draw.randint(1, MOST_OTHERS), len(pool) - 1)
                    before = others_than(pool.index(number), len(pool), count, draw)
                    texts.append(in_company(target, records[number], [records[pool[i]] for i in before]))
                    numbers.append(number)
        vectors = np.concatenate([vectors, refset.compared(embedded(target, texts, head, batch_size))])
    labels = np.array([classes[records[number].task] for number in numbers])
    return fit_classifier(vectors, labels, np.array(numbers), len(classes))


def judge(held: Part, step: int) -> tuple[str, str, float]:
    """Outcome, reason in words and one-sided p value of a delta, by references that were held out."""
    before, after = held.before, held.after
    if before.share_right >= ENOUGH:
        return "not needed", "nothing is wrong", 1.0
    if step == 0:
        return "rejected", "no step lowered the loss", 1.0
    change = [b - a for a, b in zip(before.losses, after.losses, strict=True)]
    two_sided = sign_flip_p(change)  # the flips' distribution is symmetric: half of it lies on either side
    p_value = two_sided / 2 if sum(change) < 0 else 1 - two_sided / 2
    told = f"held-out loss {before.loss:.3f} -> {after.loss:.3f}"
    if p_value >= ALPHA:
        return "rejected", f"{told}, p = {p_value:.2g}", p_value
    if after.share_right < before.share_right:
        return "rejected", f"fewer are right: {before.share_right:.0%} -> {after.share_right:.0%}", p_value
    return "accepted", f"{told}, p = {p_value:.2g}", p_value


def _check_writable(folder: Path) -> None:
    """Raise `ArtefactError` before the work where its result could not be written."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ArtefactError(f"Cannot write in {folder}. Choose another folder for the deltas: out (--out DIR).")


def _shares_and_losses(held: Part) -> tuple[float, float, float, float]:
    before, after = held.before, held.after
    return before.share_right, after.share_right, before.loss, after.loss


def _tell(say: Callable[[str], None], label: str, step: int, loss: float) -> None:
    say(f"{label}: step {step}, loss {loss:.3f}")


def common_head(prompts: Sequence[str]) -> str:
    """What all prompts begin with, if none of them holds it a second time; else nothing.

    Then its last occurrence in a longer text, with solved examples or turns before it, is where the question begins.
    """
    low, high = min(prompts), max(prompts)  # what these share, all between them share
    same = takewhile(lambda pair: pair[0] == pair[1], zip(low, high, strict=False))
    head = "".join(letter for letter, _ in same)
    return head if head.strip() and all(prompt.count(head) == 1 for prompt in prompts) else ""


def _pairs(records: Sequence[Record], shots: int, seed: int) -> list[tuple[str, str]]:
    """Prompts with answers; every second prompt stands after `shots` other solved references of the task."""
    draw = random.Random(f"{seed}|shots")
    pairs = []
    for number, record in enumerate(records):
        front = ""
        if shots and number % 2:
            front = "".join(records[i].solved for i in others_than(number, len(records), shots, draw))
        pairs.append((front + record.prompt, record.answer))
    return pairs
