"""What bound holds for a strategy in a measured case, as a ratio to the bare model and to a straightforward version?

Legend: `T` tokens of each prompt, `B` sequences, `K` experts per token.
"""

from __future__ import annotations

from ttrouting.bench import bounds
from ttrouting.bench.versions import ALL_LAYERS, BARE, STRAIGHTFORWARD, Contender
from ttrouting.layers import LayerRule
from ttrouting.strategies.dynamic_k import DynamicK
from ttrouting.strategies.rerouting import Rerouting
from ttrouting.strategies.scmoe import SCMoE, WeakRouting

FIRST, DECODE, MEMORY = "first token", "decode", "memory"
Bounds = dict[tuple[str, str], float]  # by quantity and version that ours is compared with


def expected(contender: Contender, shape: bounds.Shape, tokens: int, batch: int, new_tokens: int) -> Bounds:
    """Bounds of one strategy; none for several together, for other strategies, and for memory.

    The contender has just been run: where its cost depends on what it found (which layers, how many experts), its
    report is read.
    """
    if len(contender.strategies) != 1:
        return {}
    (strategy,) = contender.strategies
    past = tokens + new_tokens / 2  # mean length of the cache
    if isinstance(strategy, Rerouting):
        return _rerouting(contender, strategy, shape, tokens, new_tokens)
    if isinstance(strategy, SCMoE):
        return _scmoe(strategy, shape, tokens, batch, past)
    if isinstance(strategy, DynamicK):
        return _dynamic_k(contender, shape, tokens, batch, past)
    return {}


def _rerouting(
    contender: Contender, strategy: Rerouting, shape: bounds.Shape, tokens: int, new_tokens: int
) -> Bounds:
    facts = [s.strategies[strategy.name] for s in contender.adapted.report.sequences]
    layers = {name for f in facts for name in f.get("layers", [])}
    sites = [s for s in contender.adapted.sites if s.name in layers]
    if not sites:  # nothing was tried
        return {}
    rule = LayerRule.parse(strategy.layers)
    # with the same layers: the lowest that the rule might choose gets a gradient
    lowest = shape.homes[rule.lowest(len(shape.homes))]
    count = bounds.Rerouting(
        shape,
        tokens,
        strategy.steps,
        first=min(shape.homes[s.index] for s in sites),
        known=rule.kind in ("last", "all", "soft", "random"),
        no_harm=contender.no_harm,
        kept=any(f["adaptations"][0]["outcome"] == "accepted" for f in facts),
    )
    found: Bounds = {
        (FIRST, BARE): count.ours / shape.forward(tokens, 1),
        (FIRST, STRAIGHTFORWARD): count.ours / count.straightforward(lowest),
        (FIRST, ALL_LAYERS): count.ours / count.straightforward(0),
    }
    if strategy.interval is None or new_tokens <= strategy.interval:  # else later adaptations are in it
        found |= {(DECODE, version): 1.0 for version in (BARE, STRAIGHTFORWARD, ALL_LAYERS)}
    return found


def _scmoe(strategy: SCMoE, shape: bounds.Shape, tokens: int, batch: int, past: float) -> Bounds:
    weak = WeakRouting.parse(strategy.weak)
    k = [min(layer.top_k, weak.count if weak.kind == "top" else 1) for layer in shape.layers]
    return _ratios(
        ours=(shape.forward(tokens, 1) + shape.forward(tokens, 1, k), shape.read(batch, past, rows=2)),
        bare=(shape.forward(tokens, 1), shape.read(batch, past)),
        straight=(
            shape.forward(tokens, 1) + shape.forward(tokens, 1, k),
            shape.read(batch, past) + shape.read(batch, past, k),
        ),
    )


def _dynamic_k(contender: Contender, shape: bounds.Shape, tokens: int, batch: int, past: float) -> Bounds:
    sequences = contender.adapted.report.sequences
    k: list[float] = list(shape.own_k)
    for place, each in zip(shape.homes, zip(*(s.experts_per_layer for s in sequences), strict=True), strict=True):
        k[place] = sum(each) / len(each)
    bare = (shape.forward(tokens, 1), shape.read(batch, past))
    return _ratios(ours=(shape.forward(tokens, 1, k), shape.read(batch, past, k)), bare=bare, straight=bare)


def _ratios(ours: tuple[float, float], bare: tuple[float, float], straight: tuple[float, float]) -> Bounds:
    """Of `(multiplications until the first token, numbers that a decode step reads)`."""
    return {
        (quantity, version): mine / theirs
        for version, others in ((BARE, bare), (STRAIGHTFORWARD, straight))
        for quantity, mine, theirs in zip((FIRST, DECODE), ours, others, strict=True)
    }
