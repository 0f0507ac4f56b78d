"""What did strategies change in the routing of a text: experts gained and lost, mean k, entropy, layer by layer?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ttrouting.context import Context
from ttrouting.keyed import sequence_keys
from ttrouting.plan import Plan, make_plan
from ttrouting.session import Session
from ttrouting.sites import Site
from ttrouting.state import AdaptationState
from ttrouting.strategy import Strategy
from ttrouting.summary import RoutingSummary, changes, summarise
from ttrouting.target import Target


@dataclass(frozen=True)
class LayerChange:
    """One MoE layer, means over the tokens of the text.

    Attributes:
        name: of the layer. mean_k: experts with a weight, `(base, adapted)`. entropy: of the router's softmax in
            nats, the same. gained, lost: experts and by how much the share of tokens that chose them changed.
    """

    name: str
    mean_k: tuple[float, float]
    entropy: tuple[float, float]
    gained: tuple[tuple[int, float], ...]
    lost: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class RoutingChange:
    """A text, read once under each routing.

    Attributes:
        tokens: of the text. strategies: names. layers: every MoE layer.
    """

    tokens: int
    strategies: tuple[str, ...]
    layers: tuple[LayerChange, ...]


def compare(
    model: Any,
    sites: list[Site],
    tokenizer: Any,
    text: Sequence[int],
    strategies: Sequence[Strategy],
    state: AdaptationState,
) -> RoutingChange:
    """Read a text under routing strategies, with what they learned, and without them.

    Args:
        text: token ids. strategies: of an adapted call; a decoding strategy is left out. state: what was learned.
    """
    target = Target(model, sites, tokenizer)
    routing = make_plan(target, strategies).routing
    ids = torch.tensor([list(text)], device=model.get_input_embeddings().weight.device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    context = Context(ids, mask, torch.zeros_like(mask))
    session = Session(Plan(target, routing, None), mask, sequence_keys(ids, mask))
    for run in session.runs:
        run.restore(state.tensors.get(run.strategy.name, {}))
    last = ids.new_tensor([ids.shape[1] - 1])
    with torch.no_grad(), session.installed():
        with summarise(session) as adapted:
            session.read(context, last)
        with session.without(*session.runs), summarise(session) as base:
            session.read(context, last)
    names = [s.name for s in sites]
    shifted = {one["layer"]: one for one in changes(base, adapted, 0, names)}
    nothing: dict[str, Any] = {"gained": [], "lost": []}
    layers = tuple(
        LayerChange(
            site.name,
            (_mean_k(base, site.index), _mean_k(adapted, site.index)),
            (_entropy(base, site.index), _entropy(adapted, site.index)),
            tuple(shifted.get(site.name, nothing)["gained"]),
            tuple(shifted.get(site.name, nothing)["lost"]),
        )
        for site in sites
    )
    return RoutingChange(int(ids.shape[1]), tuple(run.strategy.name for run in session.runs), layers)


def _mean_k(summary: RoutingSummary, layer: int) -> float:
    return float(summary.usage[layer][0].sum() / summary.tokens[layer][0])


def _entropy(summary: RoutingSummary, layer: int) -> float:
    return float(summary.entropy[layer][0] / summary.tokens[layer][0])
