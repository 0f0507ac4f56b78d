"""What does counting say that each version of a strategy costs in a measured case?

Legend: `T` tokens of each prompt, `B` sequences, `K` experts per token.
"""

from __future__ import annotations

from ttrouting.bench import bounds
from ttrouting.bench.versions import ADAPTED, ALL_LAYERS, BARE, STRAIGHTFORWARD, Contender
from ttrouting.layers import LayerRule
from ttrouting.strategies.dynamic_k import DynamicK
from ttrouting.strategies.rerouting import Rerouting
from ttrouting.strategies.scmoe import SCMoE, WeakRouting

FIRST, DECODE, MEMORY = "first token", "decode", "memory"
Counts = dict[tuple[str, str], float]  # by quantity and version


def expected(contender: Contender, shape: bounds.Shape, tokens: int, batch: int, new_tokens: int) -> Counts:
    """Multiplications until the first token, and numbers that a decode step reads, by version.

    None for several strategies together, for other strategies, and for memory. The contender has just been run: where
    its cost depends on what it found (which layers, how many experts), its report is read.
    """
    if len(contender.strategies) != 1:
        return {}
    (strategy,) = contender.strategies
    past = tokens + new_tokens / 2  # mean length of the cache
    forward, read = shape.forward(tokens, 1), shape.read(batch, past)
    first, decode = {BARE: forward}, {BARE: read}
    if isinstance(strategy, Rerouting):
        first |= _rerouting(contender, strategy, shape, tokens)
        if strategy.interval is None or new_tokens <= strategy.interval:  # else later adaptations are in it
            decode |= dict.fromkeys((ADAPTED, *contender.readings), read)
    elif isinstance(strategy, SCMoE):
        weak = WeakRouting.parse(strategy.weak)
        k = [min(layer.top_k, weak.count if weak.kind == "top" else 1) for layer in shape.layers]
        first |= dict.fromkeys((ADAPTED, STRAIGHTFORWARD), forward + shape.forward(tokens, 1, k))
        decode |= {ADAPTED: shape.read(batch, past, rows=2), STRAIGHTFORWARD: read + shape.read(batch, past, k)}
    elif isinstance(strategy, DynamicK):
        kept = _kept(contender, shape)
        first |= {ADAPTED: shape.forward(tokens, 1, kept), STRAIGHTFORWARD: forward}
        decode |= {ADAPTED: shape.read(batch, past, kept), STRAIGHTFORWARD: read}
    each = {FIRST: {name: batch * count for name, count in first.items()}, DECODE: decode}
    return {(quantity, name): count for quantity, counts in each.items() for name, count in counts.items()}


def _rerouting(contender: Contender, strategy: Rerouting, shape: bounds.Shape, tokens: int) -> dict[str, float]:
    """Multiplications for one sequence."""
    facts = [s.strategies[strategy.name] for s in contender.adapted.report.sequences]
    layers = {name for f in facts for name in f.get("layers", [])}
    sites = [s for s in contender.adapted.sites if s.name in layers]
    if not sites:  # nothing was tried
        return {}
    rule = LayerRule.parse(strategy.layers)
    count = bounds.Rerouting(
        shape,
        tokens,
        strategy.steps,
        first=min(shape.homes[s.index] for s in sites),
        known=rule.kind in ("last", "all", "soft", "random"),
        no_harm=contender.no_harm,
        kept=any(f["adaptations"][0]["outcome"] == "accepted" for f in facts),
    )
    # with the same layers: the lowest that the rule might choose gets a gradient
    lowest = shape.homes[rule.lowest(len(shape.homes))]
    return {
        ADAPTED: count.ours,
        STRAIGHTFORWARD: count.straightforward(lowest),
        ALL_LAYERS: count.straightforward(0),
    }


def _kept(contender: Contender, shape: bounds.Shape) -> list[float]:
    """Experts per token of each decoder layer that were not dropped, mean over sequences."""
    k: list[float] = list(shape.own_k)
    layers = zip(*(s.experts_per_layer for s in contender.adapted.report.sequences), strict=True)
    for place, each in zip(shape.homes, layers, strict=True):
        k[place] = sum(each) / len(each)
    return k
