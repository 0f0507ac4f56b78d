"""Which tasks do a prompt's neighbours vote for, and by what part of the prompt are they found?

Legend: `B` sequences, `P` positions, `k` neighbours, `G` accepted tasks, `L` MoE layers, `E` experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from ttrouting.context import Context
from ttrouting.refsets.kernels import weights as kernel_weights
from ttrouting.spans import last_match, tokens_from
from ttrouting.strategies._asking import texts_of, token_rows
from ttrouting.target import Target

if TYPE_CHECKING:
    from ttrouting.strategies.task_delta import TaskDelta


@dataclass(frozen=True)
class Vote:
    """Of one sequence.

    Attributes:
        shares: of the vote, by task, the largest first; they sum to 1. similarity: cosine to the nearest reference.
    """

    shares: dict[str, float]
    similarity: float

    @property
    def leader(self) -> str:
        """The task with the largest share."""
        return next(iter(self.shares))


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


def ask_votes(options: TaskDelta, query: NDArray[Any]) -> list[Vote]:
    """The votes of the k references nearest to each raw embedding `[B, D]`; those answered wrongly vote too."""
    references = options.references
    # none is dropped as a leak: of a reference that is the question itself only the task is used
    found = references.search(query, options.k, use="all", max_similarity=1.0, index=options.index)
    weights = kernel_weights("gaussian", found)
    votes = []
    for numbers, each, similarity in zip(found.index.tolist(), weights.tolist(), found.similarity, strict=True):
        shares: dict[str, float] = {}
        for number, weight in zip(numbers, each, strict=True):
            task = references.record(number).task
            shares[task] = shares.get(task, 0.0) + weight
        ordered = dict(sorted(shares.items(), key=lambda item: -item[1]))  # stable: of equals the nearer one
        votes.append(Vote(ordered, float(similarity[0])))
    return votes


def mean_deltas(options: TaskDelta, votes: list[Vote], like: Tensor) -> Tensor:
    """`sum_g share_g delta_g` as `like [B, L, E]`; a task without a confirmed delta adds nothing."""
    bank = options.bank
    shares = [[vote.shares.get(task.task, 0.0) for task in bank.accepted] for vote in votes]  # [B, G]
    return torch.einsum("bg,gle->ble", like.new_tensor(shares), torch.from_numpy(bank.values).to(like))


def refusal(options: TaskDelta, vote: Vote, no_harm: bool) -> str:
    """Why a sequence keeps its base routing whatever the deltas would do; empty if it does not."""
    bank = options.bank
    share, task = vote.shares[vote.leader], bank.tasks.get(vote.leader)
    least = bank.familiar if options.min_similarity is None else options.min_similarity
    if vote.similarity < least:
        return f"skipped: {vote.similarity:.2f} similar to the nearest reference, {least:.2f} is needed"
    if share < options.min_share:
        return f"skipped: the vote is not decided, {vote.leader} has {share:.2f} of it"
    # a minority's delta alone is no better confirmed for this prompt than none
    others = any(one.task in vote.shares for one in bank.accepted) and not no_harm
    if (task is None or task.row < 0) and not others:
        return f"skipped: no delta for {vote.leader} ({task.outcome if task else 'not fitted'})"
    return ""


def verdict(options: TaskDelta, kl: float, no_harm: bool) -> str:
    """What becomes of a delta whose next-token distribution is this far from base, in nats."""
    if not isfinite(kl):
        return "rolled back: the adapted next-token distribution is no number"
    if no_harm and kl > options.kl_limit:
        return f"rolled back: next-token KL {kl:.2f} over {options.kl_limit:g}"
    return "accepted"


def told(options: TaskDelta, vote: Vote) -> dict[str, Any]:
    """A vote as plain values, for reports."""
    tasks = options.bank.tasks
    votes = [
        {"task": task, "share": round(share, 4), "delta": tasks[task].outcome if task in tasks else "not fitted"}
        for task, share in vote.shares.items()
    ]
    return {"votes": votes, "similarity": round(vote.similarity, 4)}
