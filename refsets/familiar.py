"""How similar to its nearest reference must a question be, for the set to know its task?

A classifier is sure of anything, also of what is far from all that it has seen. A fixed number will not do, since
vectors are centred on the set: the fewer tasks it has, the farther apart they are.

Legend: `n` references that are tried, `D` embedding dimension.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from ttrouting.refsets.company import embedded, in_company
from ttrouting.refsets.records import Record, others_than
from ttrouting.refsets.reference_set import ReferenceSet
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
        texts = []
        for number in numbers:
            others = others_than(number, len(records), OTHERS, draw)
            texts.append(in_company(target, records[number], [records[i] for i in others]))
        query = embedded(target, texts, head, batch_size)
    else:
        query = np.asarray(refset.embeddings()[numbers], dtype=np.float64)
    near = refset.search(query, 2, use="all", max_similarity=1.0)
    itself = near.index[:, 0] == np.array(numbers)
    lowest = float(np.where(itself, near.similarity[:, 1], near.similarity[:, 0]).min())
    return min(lowest, ROOM * lowest)
