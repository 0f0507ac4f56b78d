"""What does each contender cost in a case: one prompt length, one batch size?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ttrouting.bench.bounds import Shape
from ttrouting.bench.expected import DECODE, FIRST, MEMORY, Counts, expected
from ttrouting.bench.measure import Spread, Timing, interleaved, peak_bytes
from ttrouting.bench.versions import ADAPTED, BARE, Contender, calls


@dataclass(frozen=True)
class Comparison:
    """One quantity of a contender beside another version of the same call.

    Attributes:
        quantity: `first token` (seconds from the call on), `decode` (seconds a step) or `memory` (bytes at the peak,
            beyond what was there before the call). against: the other version.
        ours, theirs: medians and quartiles; memory is measured once.
        ratio: ours to theirs within each repetition; below 1 is cheaper.
        bound: what counting gives for this ratio, None where nothing was counted.
    """

    quantity: str
    against: str
    ours: Spread
    theirs: Spread
    ratio: Spread
    bound: float | None

    @property
    def over_bound(self) -> float | None:
        """The ratio in units of its bound."""
        return None if self.bound is None else self.ratio.median / self.bound


@dataclass(frozen=True)
class Result:
    """One contender in one case.

    Attributes:
        model: as it was asked for. prompt: tokens. batch: sequences. new_tokens: of each.
        contender: name. strategies: with all options. outcomes: what the report said, by sequence.
        counts: multiplications until the first token, and numbers that a decode step reads, of all sequences; None
            where nothing was counted.
    """

    model: str
    prompt: int
    batch: int
    new_tokens: int
    contender: str
    strategies: list[dict[str, Any]]
    outcomes: list[str]
    counts: dict[str, float | None]
    comparisons: list[Comparison]


def measure(
    name: str,
    model: Any,
    found: Sequence[Contender],
    ids: Tensor,
    new_tokens: int,
    repeats: int,
    seed: int = 0,
    kind: str = "wall",
    say: Callable[[str], None] = lambda _: None,
) -> list[Result]:
    """Every contender on prompts `ids [B, T]`, all of one length, all in the same repetitions.

    Args:
        name: the model's, for the result. kind: of clock, `wall` or `cpu`.
    """
    batch, tokens = ids.shape
    versions = calls(model, found, ids, new_tokens)
    shape = Shape.of(model, found[0].adapted.sites)
    device = ids.device

    case = f"{name}, {batch} x {tokens} tokens"
    timings = interleaved(versions, device, repeats, seed, kind, lambda step: say(f"{case}: {step}"))
    say(f"{case}: memory")
    memory = {version: peak_bytes(call, device) for version, call in versions.items()}
    results = []
    for contender in found:
        counts = expected(contender, shape, tokens, batch, new_tokens)
        ours = (contender.name, ADAPTED)
        comparisons = []
        for other in [("", BARE), *((contender.name, reading) for reading in contender.readings)]:
            for quantity in (FIRST, DECODE, MEMORY):
                if quantity == DECODE and new_tokens == 1:
                    continue
                mine, theirs = (_values(quantity, timings[v], memory[v]) for v in (ours, other))
                comparisons.append(
                    Comparison(
                        quantity,
                        other[1],
                        Spread.of(mine),
                        Spread.of(theirs),
                        Spread.of_ratios(mine, theirs),
                        _bound(counts, quantity, other[1]),
                    )
                )
        results.append(
            Result(
                name,
                tokens,
                batch,
                new_tokens,
                contender.name,
                [s.to_dict() for s in contender.strategies],
                _outcomes(contender),
                {quantity: counts.get((quantity, ADAPTED)) for quantity in (FIRST, DECODE)},
                comparisons,
            )
        )
    return results


def _bound(counts: Counts, quantity: str, against: str) -> float | None:
    ours, theirs = (counts.get((quantity, version)) for version in (ADAPTED, against))
    return None if ours is None or theirs is None else ours / theirs


def _values(quantity: str, timings: Sequence[Timing], memory: int) -> list[float]:
    if quantity == MEMORY:
        return [float(memory)]
    return [t.first if quantity == FIRST else t.step for t in timings]


def _outcomes(contender: Contender) -> list[str]:
    """Of each sequence in the last call."""
    return [
        "; ".join(f"{name} {facts.get('outcome', 'applied')}" for name, facts in sequence.strategies.items())
        for sequence in contender.adapted.report.sequences
    ]


def random_prompts(vocabulary: int, batch: int, tokens: int, device: str, seed: int = 0) -> Tensor:
    """`[batch, tokens]` ids, each as likely."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (batch, tokens), generator=generator).to(device)


def cut_prompts(ids: Tensor, batch: int, tokens: int) -> Tensor:
    """`[batch, tokens]` ids from different places of a text, `ids [length]`, which begins anew where it ends."""
    starts = torch.arange(batch, device=ids.device) * (len(ids) // batch)
    return ids[(starts[:, None] + torch.arange(tokens, device=ids.device)) % len(ids)]
