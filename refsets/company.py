"""References as questions of longer texts: read after solved ones, as in a chat or after examples.

Hidden states of a question depend on what was before it, and so does the vector that it is found by.

Legend: `n` texts, `D` embedding dimension.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray

from ttrouting.pathways import encode, read_prompts
from ttrouting.refsets.records import Record
from ttrouting.sites import text_config
from ttrouting.spans import last_match, tokens_from
from ttrouting.target import Target


def in_company(target: Target, record: Record, before: Sequence[Record]) -> list[int]:
    """Token ids of a reference's prompt after other solved references, fewer where the context is short."""
    limit = getattr(text_config(target.model.config), "max_position_embeddings", None)
    others = list(before)
    while True:
        front = "".join(other.solved for other in others)
        (ids,), _ = encode(target.tokenizer, [front + record.prompt], [""])
        if limit is None or len(ids) <= limit or not others:
            return ids
        others.pop()


def embedded(target: Target, rows: list[list[int]], head: str, batch_size: int) -> NDArray[Any]:
    """`[n, D]`: mean hidden states of the last question of each text, which begins with `head`."""
    found, begins = [], re.compile(re.escape(head))
    for i in range(0, len(rows), batch_size):
        some = rows[i : i + batch_size]
        starts = [last_match(row, begins, target.tokenizer) or 0 for row in some]
        found.append(read_prompts(target, some, tokens_from(some, starts, target.tokenizer))[1])
    return torch.cat(found).double().cpu().numpy()
