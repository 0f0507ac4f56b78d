"""Of which task is a prompt, and by what part of it is that told?

Legend: `B` sequences, `P` positions, `G` accepted tasks, `L` MoE layers, `E` experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from ttrouting.context import Context
from ttrouting.spans import last_match, tokens_from
from ttrouting.strategies._asking import texts_of, token_rows
from ttrouting.target import Target

if TYPE_CHECKING:
    from ttrouting.strategies.task_delta import TaskDelta

NEGLIGIBLE = 0.01  # a task that is less probable adds nothing, and is not told


@dataclass(frozen=True)
class Recognised:
    """Of one sequence.

    Attributes:
        probabilities: by task, the largest first, without those that are negligible.
        similarity: cosine to the nearest reference.
    """

    probabilities: dict[str, float]
    similarity: float

    @property
    def task(self) -> str:
        """The most probable one."""
        return next(iter(self.probabilities))


def question_starts(options: TaskDelta, target: Target, context: Context) -> list[int]:
    """Position of the token from which on each prompt is compared with references; 0: all of it."""
    if options.question is None:
        return [0] * context.ids.shape[0]
    found = [last_match(row, options.question, target.tokenizer) for row in token_rows(context)]
    return [start or 0 for start in found]


def compared_tokens(starts: list[int], target: Target, context: Context) -> Tensor:
    """`[B, P]` bool by position: the tokens whose mean hidden state is compared."""
    return tokens_from(token_rows(context), starts, target.tokenizer).to(context.ids.device)


def compared_texts(starts: list[int], target: Target, context: Context) -> list[str]:
    """The same as texts, for a set's own embedder."""
    parts = [row[start:] for row, start in zip(token_rows(context), starts, strict=True)]
    return texts_of(parts, target.tokenizer)


def recognise(options: TaskDelta, query: NDArray[Any]) -> list[Recognised]:
    """What the set's classifier says of each raw embedding `[B, D]`, and how near the nearest reference is."""
    references, bank = options.references, options.bank
    # none is dropped as a leak: of a reference that is the question itself only the likeness is used
    nearest = references.search(query, 1, use="all", max_similarity=1.0, index=options.index).similarity[:, 0]
    names, found = list(bank.tasks), []
    for row, similarity in zip(bank.classifier.probabilities(references.compared(query)), nearest, strict=True):
        order = (-row).argsort(kind="stable")
        kept = [i for rank, i in enumerate(order.tolist()) if rank == 0 or row[i] >= NEGLIGIBLE]
        found.append(Recognised({names[i]: float(row[i]) for i in kept}, float(similarity)))
    return found


def mean_deltas(options: TaskDelta, recognised: list[Recognised], like: Tensor) -> Tensor:
    """`sum_g p_g delta_g` as `like [B, L, E]`; a task without a confirmed delta adds nothing."""
    bank = options.bank
    shares = [[one.probabilities.get(task.task, 0.0) for task in bank.accepted] for one in recognised]  # [B, G]
    return torch.einsum("bg,gle->ble", like.new_tensor(shares), torch.from_numpy(bank.values).to(like))


def refusal(options: TaskDelta, recognised: Recognised, no_harm: bool) -> str:
    """Why a sequence keeps its base routing whatever the deltas would do; empty if it does not."""
    bank, name = options.bank, recognised.task
    probability, task = recognised.probabilities[name], bank.tasks[name]
    least = bank.familiar if options.min_similarity is None else options.min_similarity
    if recognised.similarity < least:
        return f"skipped: {recognised.similarity:.2f} similar to the nearest reference, {least:.2f} is needed"
    if probability < options.min_probability:
        return f"skipped: the task is not certain, {name} has a probability of {probability:.2f}"
    # the delta of a less probable task alone is no better confirmed for this prompt than none
    others = any(one.task in recognised.probabilities for one in bank.accepted) and not no_harm
    if task.row < 0 and not others:
        return f"skipped: no delta for {name} ({task.outcome})"
    return ""


def verdict(options: TaskDelta, kl: float, no_harm: bool) -> str:
    """What becomes of a delta whose next-token distribution is this far from base, in nats."""
    if not isfinite(kl):
        return "rolled back: the adapted next-token distribution is no number"
    if no_harm and kl > options.kl_limit:
        return f"rolled back: next-token KL {kl:.2f} over {options.kl_limit:g}"
    return "accepted"


def told(options: TaskDelta, recognised: Recognised) -> dict[str, Any]:
    """What was recognised as plain values, for reports."""
    tasks = options.bank.tasks
    found = [
        {"task": task, "probability": round(probability, 4), "delta": tasks[task].outcome}
        for task, probability in recognised.probabilities.items()
    ]
    return {"tasks": found, "similarity": round(recognised.similarity, 4)}
