"""Which references does C3PO ask for each sequence, and how are they read?

Legend: `B` sequences, `m` references for each of them, `R = B * m` rows, `L` MoE layers, `E` experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ttrouting.context import Context
from ttrouting.errors import ConfigError
from ttrouting.pathways import PathwayRecorder, answered_context, encode
from ttrouting.refsets import Neighbours, ReferenceSet
from ttrouting.refsets.kernels import weights as kernel_weights
from ttrouting.strategies._asking import texts_of, token_rows
from ttrouting.target import Target

if TYPE_CHECKING:
    from ttrouting.strategies.c3po import C3PO


@dataclass(frozen=True)
class Neighbourhood:
    """What the reference set answered.

    Attributes:
        references: the set. found: `m` for each sequence, nearest first.
        weights: `[B, m]`, the kernel's, summing to 1; 0 for those that nothing is fitted to.
        held: `[B]`, column of the one that is held back to judge by; -1 where there is none.
    """

    references: ReferenceSet
    found: Neighbours
    weights: Tensor
    held: Tensor

    def pathways(self, like: Tensor) -> Tensor:
        """`[B, m, L, E]` as `like`; where a list is shorter, the first record's stand in (with weight 0)."""
        stored = self.references.omega(np.maximum(self.found.index, 0).ravel())
        return torch.from_numpy(stored).to(like).view(*self.found.index.shape, *stored.shape[1:])

    def describe(self, sequence: int) -> list[dict[str, Any]]:
        """The neighbours of one sequence, for its report."""
        rows = []
        for column, index in enumerate(self.found.index[sequence].tolist()):
            if index >= 0:
                similarity, weight = self.found.similarity[sequence, column], self.weights[sequence, column]
                rows.append(
                    {
                        "record": index,
                        "task": self.references.record(index).task,
                        "similarity": round(float(similarity), 4),
                        "weight": round(float(weight), 4),
                        "held_back": column == int(self.held[sequence]),
                    }
                )
        return rows


@dataclass(frozen=True)
class AnsweredTexts:
    """Texts with known answers, those of a sequence side by side.

    Attributes:
        context: `R` rows whose targets are the answers. at: `[R]`, position of each last prompt token.
        weights: `[B, m]`, how much each counts in the fit.
    """

    context: Context
    at: Tensor
    weights: Tensor

    def weighted(self, losses: Tensor) -> Tensor:
        """`sum_i K_i loss_i`: `[B, m]` -> `[B]`."""
        # chosen, not multiplied: one that does not count may have a loss that is no number
        return torch.where(self.weights > 0, self.weights * losses, 0).sum(1)


def ask(options: C3PO, target: Target, context: Context, recorder: PathwayRecorder, omega: Tensor) -> Neighbourhood:
    """The nearest references of each prompt; with `no_harm` one more than are fitted to.

    Args:
        context: the prompts. recorder: what their reading recorded. omega: `[B, L, E]`, their own pathways.
    """
    references = options.references
    if options.embeds is None:
        query = recorder.pooled().double().cpu().numpy()
    else:
        query = options.embeds.embed(texts_of(token_rows(context), target.tokenizer))
    count, similar = options.k + target.no_harm, options.max_similarity
    if options.surrogate == "mode_finding":
        first = options.first_layer(len(target.sites))
        found = references.near_pathways(
            omega[:, first:].float().cpu().numpy(),
            list(range(first, len(target.sites))),
            count,
            use=options.use,
            exclude_similar_to=query,
            max_similarity=similar,
        )
    else:
        found = references.search(
            query, count, use=options.use, max_similarity=similar, eps=options.eps, index=options.index
        )
    there = (found.index >= 0).sum(1)  # [B]
    found = _first(found, max(1, int(there.max())))  # an eps-ball may hold far fewer than were asked for
    fitted = np.arange(found.index.shape[1]) < (there - target.no_harm)[:, None]  # [B, m]
    weights = kernel_weights(options.kernel, replace(found, index=np.where(fitted, found.index, -1)), options.sigma)
    held = there - 1 if target.no_harm else np.full_like(there, -1)
    return Neighbourhood(
        references, found, torch.from_numpy(weights).to(omega), torch.from_numpy(held).to(omega.device)
    )


def _first(found: Neighbours, count: int) -> Neighbours:
    """The nearest `count` of each list."""
    return Neighbours(found.index[:, :count], found.similarity[:, :count], found.distance[:, :count])


def neighbours_texts(near: Neighbourhood, target: Target, device: torch.device) -> AnsweredTexts:
    """The neighbours' prompts with their answers."""
    # where a list is shorter than others, the first record stands in with weight 0
    records = [near.references.record(max(0, i)) for i in near.found.index.flatten().tolist()]
    prompts, answers = encode(target.tokenizer, [r.prompt for r in records], [r.answer for r in records])
    return AnsweredTexts(
        *answered_context(prompts, answers, target.tokenizer.pad_token_id or 0, device), near.weights
    )


def own_texts(labels: tuple[str, ...], target: Target, context: Context, like: Tensor) -> AnsweredTexts:
    """The prompts themselves with their labels, for the oracle.

    Raises:
        ConfigError: another number of labels than of sequences.
    """
    prompts = token_rows(context)
    if len(labels) != len(prompts):
        raise ConfigError(f"c3po.labels has {len(labels)} answers for {len(prompts)} sequences. Give one for each.")
    answers = [target.tokenizer(label, add_special_tokens=False)["input_ids"] for label in labels]
    rows, at = answered_context(prompts, answers, target.tokenizer.pad_token_id or 0, context.ids.device)
    return AnsweredTexts(rows, at, like.new_ones(len(prompts), 1))
