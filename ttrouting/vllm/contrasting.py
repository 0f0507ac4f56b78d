"""How do the two streams of SCMoE become one distribution and one token?

Legend: `R` rows of the batch, `V` vocabulary, `P` tokens of a prompt that contrast is tried on.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from math import log
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ttrouting.context import Context
from ttrouting.head import CHUNK
from ttrouting.spans import check_loss_on, narrow_targets
from ttrouting.strategies.scmoe import Trial, mix

if TYPE_CHECKING:
    from ttrouting.vllm.bookkeeping import Bookkeeping, Held


def pair_rows(book: Bookkeeping, rows: dict[str, int], samples: Any) -> tuple[list[tuple[int, int, Held]], list[int]]:
    """The pairs of a batch of which both streams are sampled from, and rows of streams that are alone.

    Args:
        rows: row of each request. samples: `[R]` bool, rows that are sampled from in this step.
    """
    pairs, alone = [], []
    for request_id, row in rows.items():
        held = book.requests.get(request_id)
        if held is None or held.partner is None or not samples[row]:
            continue
        other = rows.get(held.partner)
        if other is None or not samples[other]:
            held.alone += 1
            alone.append(row)
        elif not held.weak:
            held.steps += 1
            pairs.append((row, other, held))
    return pairs, alone


def judged_positions(scmoe: Any, ids: list[int], tokenizer: Any) -> list[int]:
    """Which tokens of a prompt `no_harm` tries contrast on, rising.

    Raises:
        ConfigError: they are to be found in text, and the engine has no tokenizer.
    """
    check_loss_on(scmoe.judge_on, tokenizer, option="scmoe.judge_on")
    row = torch.tensor([ids])
    targets = torch.ones_like(row, dtype=torch.bool)
    targets[:, 0] = False  # nothing predicts it
    context = Context(row, torch.ones_like(targets), targets)
    found = narrow_targets(context, scmoe.judge_on, tokenizer)[0].nonzero().flatten()
    return [int(position) for position in found]


def keep(held: Held, judged: list[int], hidden: Tensor) -> None:
    """Keep what predicts judged tokens of the hidden states `[n, D]` of a forward."""
    _, count, before = held.rows
    if held.states is None:
        held.states = hidden.new_zeros(len(judged), hidden.shape[1])
    first, end = bisect_left(judged, before + 1), bisect_left(judged, before + count + 1)
    if first < end:
        predecessors = torch.tensor(judged[first:end], device=hidden.device) - 1 - before
        held.states[first:end] = hidden[predecessors]


def decide(strong: Held, weak: Held, ids: Sequence[int], head: Callable[[Tensor], Tensor]) -> None:
    """Contrast a pair or not, by whether its prompt's own tokens are predicted better with contrast.

    Args:
        strong, weak: of the same prompt, read to its end. ids: of the prompt. head: `[n, D]` -> `[n, V]`.
    """
    options, judged = strong.wanted.scmoe, strong.judged or []
    states = torch.stack([held.states for held in (strong, weak) if held.states is not None])  # [2, P, D]
    won = lost = 0
    for begin in range(0, len(judged), CHUNK):
        chunk = slice(begin, begin + CHUNK)
        ours, theirs = head(states[:, chunk].flatten(0, 1)).float().chunk(2)  # [n, V]
        mixed, _ = mix(ours, theirs, log(options.alpha), options.beta, options.kl_limit)
        labels = torch.tensor([ids[position] for position in judged[chunk]], device=mixed.device)
        before, after = ours.argmax(-1) == labels, mixed.argmax(-1) == labels
        won, lost = won + int((after & ~before).sum()), lost + int((before & ~after).sum())
    trial = Trial(len(judged), won, lost)
    strong.on = trial.passed
    strong.facts |= {"judged_tokens": trial.tokens, "turned_right": won, "turned_wrong": lost}
    strong.facts["outcome"] = "applied" if trial.passed else trial.words
    for held in (strong, weak):
        held.judged = held.states = None


def contrast(logits: Tensor, pairs: list[tuple[int, int, Held]]) -> None:
    """Write the contrasted logits into the strong rows of `logits [R, V]`, before any processor and grammar."""
    pairs = [pair for pair in pairs if pair[2].on]
    if not pairs:
        return
    strong_rows = torch.tensor([strong for strong, _, _ in pairs], device=logits.device)
    weak_rows = torch.tensor([weak for _, weak, _ in pairs], device=logits.device)

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits.device)[:, None]

    options = [held.wanted.scmoe for _, _, held in pairs]
    wanted = column([one.beta for one in options])
    limit = column(
        [
            one.kl_limit if held.wanted.no_harm else float("inf")
            for one, (_, _, held) in zip(options, pairs, strict=True)
        ]
    )
    mixed, beta = mix(
        logits[strong_rows].float(), logits[weak_rows].float(), column([log(o.alpha) for o in options]), wanted, limit
    )
    logits[strong_rows] = mixed.to(logits.dtype)
    for reduced, (_, _, held) in zip((beta < wanted)[:, 0].tolist(), pairs, strict=True):
        held.limited += reduced


def follow(sampled: Tensor, pairs: list[tuple[int, int, Held]]) -> None:
    """Give the weak rows of `sampled [R, 1]` the strong rows' tokens, whatever they were sampled with."""
    for strong, weak, _ in pairs:
        sampled[weak] = sampled[strong]
