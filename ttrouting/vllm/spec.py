"""What does a request carry, and is it a strategy that this engine can run?

Legend: `L` MoE layers, `E` experts, `K` experts per token.

A spec is plain data: `{"strategies": [{"artefact": NAME} | {"strategy": NAME, **options}, ...], "no_harm": true}`.
Tensors are artefacts that the engine was given at its start, or nested lists; a spec names no path.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ttrouting.errors import CompositionError, ConfigError, UnsupportedCallError, did_you_mean
from ttrouting.registry import get_strategy
from ttrouting.strategies.task_delta import TaskDelta
from ttrouting.strategy import Strategy

KEYS = ("strategies", "no_harm")
PAIRED = ("scmoe", "c3po", "task_delta")  # have no part in async scheduling and run on the V1 runner alone
REREADING = (*PAIRED, "rerouting")  # read a prompt more than once: a request has one of them
MOST_BYTES = 1 << 22  # of a spec in JSON: a delta for 60 layers of 256 experts has some 300 kB


def spec(strategies: Strategy | str | Sequence[Strategy | str], *, no_harm: bool = True) -> dict[str, Any]:
    """The spec of a request from strategies, or from names of artefacts that the engine was started with.

    Args:
        strategies: as for `ttr.adapt`; a plain string is the name of a registered artefact.
        no_harm: as for `ttr.adapt`.

    Raises:
        ConfigError: something else, or a strategy that no request can carry.
    """
    given = [strategies] if isinstance(strategies, (Strategy, str)) else list(strategies)
    return {"strategies": [_entry(one) for one in given], "no_harm": bool(no_harm)}


def spec_json(strategies: Strategy | str | Sequence[Strategy | str], *, no_harm: bool = True) -> str:
    """The same as the string that `vllm_xargs` takes."""
    return json.dumps(spec(strategies, no_harm=no_harm))


def _entry(one: Strategy | str) -> dict[str, Any]:
    if isinstance(one, str):
        return {"artefact": one}
    if not isinstance(one, Strategy):
        raise ConfigError(f"{one!r} is neither a strategy nor the name of an artefact.")
    tensors = {name: value.tolist() for name, value in one.tensors().items()}
    return {**one.to_dict(), **tensors}


class Names(Protocol):
    """The artefacts that an engine was started with."""

    def strategies(self, name: str) -> list[Strategy]:
        """Strategies saved under a name."""

    def refset(self, name: str) -> Any:
        """A reference set registered under a name."""

    def digest(self, name: str) -> str:
        """Hash of its content."""


@dataclass(frozen=True)
class Facts:
    """What a worker found in its model; sent to the front end once, as plain values.

    Attributes:
        layers, experts, top_k: `L`, the largest `E`, and `K` of each layer.
        sizes: `E` of each layer. scorings: name of each layer's scoring rule.
        refusals: by strategy name (`""` is all of them), why it cannot run here.
        fingerprint: of the model, as artefacts carry it; empty where it could not be found out.
    """

    layers: int
    experts: int
    top_k: tuple[int, ...]
    sizes: tuple[int, ...]
    scorings: tuple[str, ...]
    refusals: Mapping[str, str] = field(default_factory=dict)
    fingerprint: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Facts:
        """The inverse of `to_dict`."""
        return cls(
            **{
                **data,
                "top_k": tuple(data["top_k"]),
                "sizes": tuple(data["sizes"]),
                "scorings": tuple(data["scorings"]),
            }
        )


@dataclass(frozen=True, eq=False)
class Wanted:
    """A request's routing, checked and merged.

    Attributes:
        delta: `[L, E]` fp32 or None. mask: `[L, E]` bool or None. before_scoring: of the mask.
        dynamic_k, scmoe, c3po, task_delta, rerouting: the strategies of these names or None.
        no_harm: as in the spec. digest: hash of the whole content: equal ones share cached prefixes.
    """

    delta: Tensor | None
    mask: Tensor | None
    before_scoring: bool
    dynamic_k: Any
    scmoe: Any
    c3po: Any
    task_delta: Any
    rerouting: Any
    no_harm: bool
    digest: str

    @property
    def identity(self) -> bool:
        """Whether nothing is to be done."""
        return not self.rereading and all(part is None for part in (self.delta, self.mask, self.dynamic_k))

    @property
    def rereading(self) -> list[str]:
        """Names of the strategies that read the prompt more than once."""
        return [name for name in REREADING if getattr(self, name) is not None]


def read(value: Any) -> dict[str, Any]:
    """A spec as it came, a dict or its JSON, as a dict of the right form.

    Raises:
        ConfigError: it has another form.
    """
    if isinstance(value, str):
        if len(value) > MOST_BYTES:
            raise ConfigError(
                f"The spec has {len(value)} characters, {MOST_BYTES} are allowed. Register an artefact."
            )
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"The spec is no JSON: {error}.") from None
    if not isinstance(value, Mapping):
        raise ConfigError(f"A spec is a JSON object, got {type(value).__name__}. Make it with ttrouting.vllm.spec.")
    for key in value:
        if key not in KEYS:
            raise ConfigError(f"A spec has no {key!r}.{did_you_mean(str(key), KEYS)}")
    entries = value.get("strategies")
    if not isinstance(entries, Sequence) or isinstance(entries, str) or not entries:
        raise ConfigError("A spec needs 'strategies', a list of at least one. Make it with ttrouting.vllm.spec.")
    for entry in entries:
        named = isinstance(entry, Mapping) and ("artefact" in entry) != ("strategy" in entry)
        if not named or not all(isinstance(key, str) for key in entry):
            raise ConfigError(f"A strategy in a spec is an object with 'strategy' or 'artefact', got {entry!r:.200}.")
        if "artefact" in entry and len(entry) > 1:
            raise ConfigError(f"An artefact takes no options beside its name, got {sorted(entry)}.")
    if not isinstance(value.get("no_harm", True), bool):
        raise ConfigError(f"no_harm in a spec must be true or false, got {value['no_harm']!r}.")
    return {"strategies": [dict(entry) for entry in entries], "no_harm": value.get("no_harm", True)}


def parse(value: Any, names: Names, facts: Facts) -> Wanted:
    """Check a spec against the artefacts and the model of an engine.

    Raises:
        ConfigError, CompositionError, UnsupportedCallError: what is wrong and what to do.
    """
    data = read(value)
    if "" in facts.refusals:
        raise UnsupportedCallError(facts.refusals[""])
    merged: dict[str, Any] = {"static": [], "mask": None}
    digests: list[Any] = [data["no_harm"]]
    for entry in data["strategies"]:
        if "artefact" in entry:
            found = names.strategies(entry["artefact"])
            digests.append(names.digest(entry["artefact"]))
        else:
            found = [_strategy(entry, names)]
            digests.append(entry)
            if entry["strategy"] in ASKING:
                digests.append(names.digest(entry.get("refset", "pocket")))
            if isinstance(found[0], TaskDelta):
                digests.append(found[0].bank.manifest["sha256"])
        for one in found:
            _merge(one, merged, facts)
    return _wanted(merged, facts, data["no_harm"], digests)


# looking through the entry points of all packages takes milliseconds
_kind = functools.lru_cache(maxsize=64)(get_strategy)


def _strategy(entry: Mapping[str, Any], names: Names) -> Strategy:
    """One strategy from plain values; lists become tensors where the strategy takes tensors."""
    name = entry["strategy"]
    if not isinstance(name, str):
        raise ConfigError(f"The name of a strategy is text, got {name!r}.")
    cls = _kind(name)
    options = {k: v for k, v in entry.items() if k != "strategy"}
    tensors = {k: _tensor(cls.name, k, options.pop(k)) for k in ("delta", "mask") if options.get(k) is not None}
    if options.get("deltas") is not None:
        raise ConfigError(f"{cls.name}.deltas cannot name a folder in a spec: fit them into the set's own.")
    if cls.name in ASKING:
        options["refset"] = names.refset(options.get("refset", "pocket"))
    for option, value in options.items():
        if isinstance(value, list) and option != "sensitivity":
            raise ConfigError(f"{cls.name}.{option} cannot be a list in a spec.")
    try:
        return cls.from_dict(options, tensors)
    except TypeError as error:
        raise ConfigError(f"{cls.name} does not take these options: {error}.") from None


def _tensor(strategy: str, option: str, value: Any) -> Tensor:
    try:
        dtype = torch.bool if option == "mask" else torch.float32
        tensor = torch.tensor(value, dtype=dtype)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ConfigError(f"{strategy}.{option} must be a list for each layer of numbers: {error}.") from None
    if tensor.dim() != 2:
        raise ConfigError(f"{strategy}.{option} must be [layers, experts], got {list(tensor.shape)}.")
    return tensor


ASKING = ("c3po", "task_delta")  # of reference sets
SINGLE = ("dynamic_k", "expert_mask", *REREADING)


def _merge(one: Strategy, merged: dict[str, Any], facts: Facts) -> None:
    """Add one strategy to what a request wants."""
    if one.name in facts.refusals:
        raise UnsupportedCallError(facts.refusals[one.name])
    if one.name in SINGLE and merged.get(one.name) is not None:
        raise CompositionError(f"{one.name} is given more than once. Keep one of them.")
    made_for = getattr(one, "fingerprint", None) or getattr(getattr(one, "calibration", None), "fingerprint", None)
    if made_for and facts.fingerprint and made_for != facts.fingerprint:
        raise ConfigError(
            f"This {one.name} was made for another model (fingerprint {made_for[:12]}, this model has "
            f"{facts.fingerprint[:12]}). Make it again on this model."
        )
    if one.name == "static_routing":
        merged["static"].append(one)
    elif one.name in SINGLE:
        merged[one.name] = one
    else:
        raise UnsupportedCallError(f"The vLLM plugin does not run {one.name!r}. It runs static_routing, {SINGLE}.")


def _wanted(merged: dict[str, Any], facts: Facts, no_harm: bool, digests: list[Any]) -> Wanted:
    shape = (facts.layers, facts.experts)
    delta: Tensor | None = None
    masks: list[Tensor] = []
    for one in merged["static"]:
        for option in ("delta", "mask"):
            value = getattr(one, option)
            if value is not None and tuple(value.shape) != shape:
                raise ConfigError(
                    f"static_routing.{option} has shape {list(value.shape)}; this model needs {list(shape)} "
                    "(layers, experts)."
                )
        if one.delta is not None:
            delta = one.delta.float() if delta is None else delta + one.delta.float()
        if one.mask is not None:
            masks.append(one.mask)
    given = merged.get("expert_mask")
    if given is not None:
        if tuple(given.mask.shape) != shape:
            raise ConfigError(f"expert_mask.mask has shape {list(given.mask.shape)}; this model needs {list(shape)}.")
        masks.append(given.mask)
    mask = torch.stack(masks).all(0) if masks else None
    _check_mask(mask, facts)
    dynamic_k, scmoe = merged.get("dynamic_k"), merged.get("scmoe")
    if dynamic_k is not None:
        rule = dynamic_k.rule
        if rule == "sensitivity" and len(dynamic_k.sensitivity or ()) != facts.layers:
            raise ConfigError(f"dynamic_k.rule='sensitivity' needs a value for each of {facts.layers} layers.")
    if scmoe is not None:
        check_weak(scmoe, facts)
    for name in CHECKS:
        if merged.get(name) is not None and not merged[name].identity:
            CHECKS[name](merged[name], no_harm, facts)
    live = {name: one for name, one in merged.items() if isinstance(one, Strategy) and not one.identity}
    return Wanted(
        delta=delta,
        mask=mask if mask is not None and not bool(mask.all()) else None,
        before_scoring=given is not None and given.at == "logits",
        dynamic_k=live.get("dynamic_k"),
        scmoe=live.get("scmoe"),
        c3po=live.get("c3po"),
        task_delta=live.get("task_delta"),
        rerouting=live.get("rerouting"),
        no_harm=no_harm,
        digest=hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:32],
    )


def _check_c3po(c3po: Any, no_harm: bool, facts: Facts) -> None:
    from ttrouting.vllm.neighbours import check_c3po  # a client that makes specs need not load it

    check_c3po(c3po, no_harm, facts.scorings, facts.sizes, facts.fingerprint)


def _check_task_delta(task_delta: Any, no_harm: bool, facts: Facts) -> None:
    from ttrouting.vllm.recognising import check_task_delta

    check_task_delta(task_delta, (facts.layers, facts.experts), facts.fingerprint)


def _check_rerouting(rerouting: Any, no_harm: bool, facts: Facts) -> None:
    """What evolution strategies in an engine cannot do."""
    if rerouting.interval is not None:
        raise UnsupportedCallError("rerouting in vLLM adapts to the prompt alone: give interval=None.")
    if rerouting.loss_on != "all":
        raise UnsupportedCallError("rerouting in vLLM learns from the whole prompt: give loss_on='all'.")
    if rerouting.layers.partition(":")[0] not in ("all", "last"):
        raise UnsupportedCallError(
            f"rerouting.layers={rerouting.layers!r} does not run in vLLM: give 'all' or 'last:N'."
        )


CHECKS = {"c3po": _check_c3po, "task_delta": _check_task_delta, "rerouting": _check_rerouting}


def _check_mask(mask: Tensor | None, facts: Facts) -> None:
    if mask is None:
        return
    if "mask" in facts.refusals:
        raise UnsupportedCallError(facts.refusals["mask"])
    for layer, (size, k) in enumerate(zip(facts.sizes, facts.top_k, strict=True)):
        kept = int(mask[layer, :size].sum())
        if kept < k:
            raise ConfigError(f"The masks keep {kept} experts in layer {layer}, which chooses {k} per token.")


def check_weak(scmoe: Any, facts: Facts) -> None:
    """Raise unless the weak experts are among those that the family chooses itself."""
    kind, _, count = scmoe.weak.partition(":")
    least = min(facts.top_k)
    if kind == "random":
        raise UnsupportedCallError("scmoe.weak='random' does not run in vLLM. Use 'rank:2'.")
    if int(count) > least:
        raise ConfigError(f"scmoe.weak={scmoe.weak!r} needs {count} experts, vLLM's routers give {least} per token.")
