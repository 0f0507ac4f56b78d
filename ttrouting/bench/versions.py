"""Which calls are compared: the model's own `generate`, ours under a strategy, and a straightforward version of it.

Legend: `B` sequences, `T` tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ttrouting.adaptive import AdaptiveModel, adapt
from ttrouting.baselines import dynamic_k_baseline, rerouting_baseline, scmoe_baseline
from ttrouting.baselines.routers import find_routers
from ttrouting.bench.measure import Call, Clock
from ttrouting.layers import LayerRule
from ttrouting.strategies.dynamic_k import DynamicK
from ttrouting.strategies.rerouting import Rerouting
from ttrouting.strategies.scmoe import SCMoE, WeakRouting
from ttrouting.strategy import Strategy

BARE, STRAIGHTFORWARD, ALL_LAYERS, ADAPTED = "bare", "straightforward", "straightforward, all layers", "adapted"
Reading = Callable[[Tensor, int, Clock], object]


@dataclass(frozen=True, eq=False)
class Contender:
    """Strategies that are measured together, and the model that runs under them.

    Attributes:
        name: as in a table. strategies: one or several. no_harm: as in `ttr.adapt`.
        adapted: a model object of its own with the same weights.
        readings: calls of the straightforward versions by name, `(ids, new tokens, clock)`; none where there is none.
    """

    name: str
    strategies: tuple[Strategy, ...]
    no_harm: bool
    adapted: AdaptiveModel
    readings: Mapping[str, Reading] = field(default_factory=dict)


@contextmanager
def contenders(
    model: Any, groups: Mapping[str, Sequence[Strategy]], no_harm: bool, tokenizer: Any = None
) -> Iterator[list[Contender]]:
    """Each group of strategies, by its name in tables, on the model.

    Raises:
        NotMoEError, UnsupportedModelError, ConfigError, CompositionError: as `ttr.adapt`.
    """
    with ExitStack() as stack:
        found: list[Contender] = []
        for name, group in groups.items():
            # a model object can be adapted once at a time; the copy has the same modules and weights
            adapted = stack.enter_context(adapt(copy.copy(model), list(group), no_harm=no_harm, tokenizer=tokenizer))
            found.append(Contender(name, tuple(group), no_harm, adapted, readings(model, group, no_harm)))
        yield found


def readings(model: Any, group: Sequence[Strategy], no_harm: bool) -> dict[str, Reading]:
    """The straightforward versions of one strategy: `call(ids, new_tokens, clock)` by name.

    Empty where a baseline does not have the options, the router or the combination.
    """
    if len(group) != 1:
        return {}
    try:
        find_routers(model)
    except ValueError:
        return {}
    (strategy,) = group
    if isinstance(strategy, Rerouting):
        return _rerouting(model, strategy, no_harm)
    if isinstance(strategy, SCMoE):
        weak = WeakRouting.parse(strategy.weak)
        if weak.kind != "rank":
            return {}
        options: dict[str, Any] = {"alpha": strategy.alpha, "beta": strategy.beta, "rank": weak.count}
        return {STRAIGHTFORWARD: _reading(scmoe_baseline.generate, model, options)}
    if isinstance(strategy, DynamicK):
        if strategy.rule != "top_p" or strategy.gate is not None or strategy.renormalize != "family":
            return {}
        options = {"p": strategy.share, "k_min": strategy.floor}
        return {STRAIGHTFORWARD: _reading(dynamic_k_baseline.generate, model, options)}
    return {}


def _rerouting(model: Any, strategy: Rerouting, no_harm: bool) -> dict[str, Reading]:
    kind = LayerRule.parse(strategy.layers).kind
    plain = strategy.optimizer == "adam" and strategy.refresh_kv and strategy.loss_on == "all"
    if kind not in ("all", "last", "highest") or not plain:
        return {}
    options = {
        "steps": strategy.steps,
        "lr": strategy.lr,
        "interval": strategy.interval,
        "layers": strategy.layers,
        "no_harm": no_harm,
    }
    found = {STRAIGHTFORWARD: _reading(rerouting_baseline.generate, model, options)}
    if kind == "last":
        found[ALL_LAYERS] = _reading(rerouting_baseline.generate, model, {**options, "layers": "all"})
    return found


def _reading(generate: Any, model: Any, options: dict[str, Any]) -> Reading:
    def call(ids: Tensor, new_tokens: int, clock: Clock) -> Any:
        return generate(model, ids, new_tokens, **options, stopping_criteria=[clock])

    return call


def calls(model: Any, found: Sequence[Contender], ids: Tensor, new_tokens: int) -> dict[tuple[str, str], Call]:
    """Every version of every contender on prompts `ids [B, T]`, by the contender's name and the version's.

    The bare model is there once, under `("", "bare")`; ours is `(its name, "adapted")`.
    """

    def own(generator: Any) -> Call:
        return lambda clock: generator.generate(
            input_ids=ids,
            attention_mask=ids.new_ones(ids.shape),
            do_sample=False,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            stopping_criteria=[clock],
        )

    def straight(reading: Reading) -> Call:
        return lambda clock: reading(ids, new_tokens, clock)

    versions: dict[tuple[str, str], Call] = {("", BARE): own(model)}
    for contender in found:
        versions[contender.name, ADAPTED] = own(contender.adapted)
        versions |= {(contender.name, name): straight(r) for name, r in contender.readings.items()}
    return versions
