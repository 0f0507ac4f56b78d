"""How similar to its nearest reference must a question be, for the set to know its task?

The vote of neighbours means nothing, however unanimous it is, where a prompt is far from all of them. A fixed number
will not do, since vectors are centred on the set: the fewer tasks it has, the farther apart they are.

Legend: `n` references that are tried, `D` embedding dimension.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ttrouting.pathways import encode, read_prompts
from ttrouting.refsets.records import Record, others_than
from ttrouting.refsets.reference_set import ReferenceSet
from ttrouting.sites import text_config
from ttrouting.spans import last_match, tokens_from
from ttrouting.target import Target

TRIED = 64  # references; the least similar of them is about the 2 % quantile
ROOM = 0.75  # for prompts that are not written to the letter as references are: of what these have
OTHERS = 3  # solved references, of any task, that may stand before each


def least_similarity(
    target: Target, refset: ReferenceSet, records: Sequence[Record], head: str, batch_size: int, seed: int
) -> float:
    """`ROOM` times the lowest cosine to the nearest other reference among some references of a set.

    Where the model embeds and questions are found in longer texts by their `head`, every reference is read after
    solved ones of any task, as in a chat or after examples: hidden states depend on what was before. Otherwise its
    stored embedding is taken.
    """
    draw = random.Random(f"{seed}|familiar")
    numbers = sorted(draw.sample(range(len(records)), min(TRIED, len(records))))
    if refset.embedder_name == "model" and head:
        texts = [_in_company(target, records, number, draw) for number in numbers]
        query = _embedded(target, texts, re.compile(re.escape(head)), batch_size)
    else:
        query = np.asarray(refset.embeddings()[numbers], dtype=np.float64)
    near = refset.search(query, 2, use="all", max_similarity=1.0)
    itself = near.index[:, 0] == np.array(numbers)
    lowest = float(np.where(itself, near.similarity[:, 1], near.similarity[:, 0]).min())
    return min(lowest, ROOM * lowest)


def _in_company(target: Target, records: Sequence[Record], number: int, draw: random.Random) -> list[int]:
    """Token ids of a reference's prompt after other solved references, fewer where the context is short."""
    others = others_than(number, len(records), OTHERS, draw)
    limit = getattr(text_config(target.model.config), "max_position_embeddings", None)
    while True:
        front = "".join(records[i].solved for i in others)
        (ids,), _ = encode(target.tokenizer, [front + records[number].prompt], [""])
        if limit is None or len(ids) <= limit or not others:
            return ids
        others.pop()


def _embedded(target: Target, rows: list[list[int]], head: re.Pattern[str], batch_size: int) -> NDArray[Any]:
    """`[n, D]`: mean hidden states of the last question of each text."""
    found = []
    for i in range(0, len(rows), batch_size):
        some = rows[i : i + batch_size]
        starts = [last_match(row, head, target.tokenizer) or 0 for row in some]
        found.append(read_prompts(target, some, tokens_from(some, starts, target.tokenizer))[1])
    return torch.cat(found).double().cpu().numpy()
