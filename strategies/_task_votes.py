"""Which tasks do a prompt's neighbours vote for, and by what part of the prompt are they found?

Legend: `B` sequences, `P` positions, `k` neighbours, `G` accepted tasks, `L` MoE layers, `E` experts.
"""

from __future__ import annotations

from dataclasses import dataclass
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
