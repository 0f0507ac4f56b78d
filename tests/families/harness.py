"""What the family tests share: inputs, a spy on routers and experts, strategies for tests, a state fingerprint.

Legend: `B` rows, `T` tokens a row, `N = B * T`, `L` layers, `E` experts, `K` per token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import ttrouting as ttr
from tests.families.build import build
from tests.families.expected import EXPECTED, Expected
from tests.oracles import routing
from ttrouting.rows import Rows
from ttrouting.session import Session
from ttrouting.taps import Call

BATCH, LENGTH = 2, 12
SPECIAL = 3  # ids below are padding and the like


@lru_cache(maxsize=8)
def built(family: str, dtype: torch.dtype, changes: tuple[tuple[str, Any], ...] = ()) -> nn.Module:
    """A tiny model, kept for the next test that wants the same one."""
    torch.set_num_threads(1)
    model = build(family, dtype=dtype, **dict(changes))
    return model.requires_grad_(False)


def tokens(batch: int = BATCH, length: int = LENGTH, seed: int = 0) -> Tensor:
    """`[B, T]` ids without special ones."""
    return torch.randint(SPECIAL, 96, (batch, length), generator=torch.Generator().manual_seed(seed))


def read(model: Any, ids: Tensor, **inputs: Any) -> Tensor:
    """Logits, or hidden states of a model without a head; `[B, T, *]`, no cache."""
    out = model(input_ids=ids, use_cache=False, **inputs)
    return out.logits if "logits" in out else out.last_hidden_state


def random_delta(expected: Expected, batch: int | None = BATCH, scale: float = 1.0, seed: int = 1) -> Tensor:
    """`[B, L, E]`, or `[L, E]`."""
    shape = (len(expected.layers), expected.experts)
    noise = torch.randn(shape if batch is None else (batch, *shape), generator=torch.Generator().manual_seed(seed))
    return scale * noise


def implementations(model: Any, expected: Expected) -> Iterator[str]:
    """Set each experts implementation in turn."""
    for name in expected.implementations:
        if expected.implementations != ("eager",):
            model.set_experts_implementation(name)
        yield name


# --- layers ---------------------------------------------------------------------------------------------


@dataclass
class Layer:
    """One MoE layer by name, found without ttrouting."""

    name: str
    router: nn.Module
    block: nn.Module


def layers(model: nn.Module, family: str) -> list[Layer]:
    """The layers that the table of expectations names."""
    found = []
    for name in EXPECTED[family].router_names():
        block = name.rpartition(".")[0]
        found.append(Layer(block, model.get_submodule(name), model.get_submodule(block)))
    return found


@dataclass
class Seen:
    """What passed one layer in one forward."""

    hidden: Tensor | None = None  # input of the router's matrix
    ids: Tensor | None = None  # [N, K] as the experts got them; None where they get something else
    weights: Tensor | None = None  # [N, K]
    dense: Tensor | None = None  # [N, E] weight of each expert
    given: Tensor | None = None  # input of the experts, or of the block where they have no such input
    made: Tensor | None = None  # output of the same
    shared: Tensor | None = None  # weights of Inkling's shared experts


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def _dense(ids: Tensor, weights: Tensor, experts: int) -> Tensor:
    return weights.new_zeros(len(ids), experts).scatter_add(1, ids, weights)


@contextmanager
def spy(model: nn.Module, family: str) -> Iterator[list[Seen]]:
    """Watch what really reaches the experts, innermost: after every hook and wrapper."""
    expected = EXPECTED[family]
    with ExitStack() as stack:
        seen = [_watch(stack, layer, family, expected) for layer in layers(model, family)]
        yield seen


def _watch(stack: ExitStack, layer: Layer, family: str, expected: Expected) -> Seen:
    seen = Seen()

    def on_router_input(_module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.hidden = args[0].detach().reshape(-1, args[0].shape[-1])

    source = routing.input_module(family, layer.router)
    stack.callback(source.register_forward_pre_hook(on_router_input).remove)
    if expected.interface == "experts":
        experts = layer.block.experts
        original = experts.forward

        def forward(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            seen.given, seen.ids, seen.weights = hidden.detach(), ids.detach(), weights.detach()
            seen.dense = _dense(seen.ids, seen.weights, expected.experts)
            seen.made = original(hidden, ids, weights)
            return seen.made

        experts.forward = forward
        stack.callback(experts.__dict__.pop, "forward")
        if family == "inkling_text":

            def on_shared(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
                seen.shared = kwargs["gammas"].detach()

            hook = layer.block.shared_experts.register_forward_pre_hook(on_shared, with_kwargs=True)
            stack.callback(hook.remove)
        return seen

    def on_router_output(_module: nn.Module, _args: Any, out: Any) -> None:
        if expected.interface == "dense":
            seen.dense = out[0].detach()
            return
        _order, token, gate, sizes, _logits = out
        expert = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        rows = len(seen.hidden) if seen.hidden is not None else 0
        seen.dense = gate.new_zeros(rows, expected.experts).index_put((token, expert), gate.detach(), True)

    def on_block(_module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        seen.given, seen.made = args[0].detach(), _first(out)

    stack.callback(layer.router.register_forward_hook(on_router_output).remove)
    stack.callback(layer.block.register_forward_hook(on_block).remove)
    return seen


# --- strategies -----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Replace(ttr.RoutingStrategy):
    """Random experts with random weights instead of the family's, `columns` of them."""

    name: ClassVar[str] = "replace_in_tests"
    columns: int = 1
    seed: int = 0

    def start(self, session: Session) -> ttr.RoutingRun:
        return _ReplaceRun(self, session)


class _ReplaceRun(ttr.RoutingRun):
    strategy: Replace

    def edit_selection(
        self, site: ttr.Site, call: Call, ids: Tensor, weights: Tensor, rows: Rows
    ) -> tuple[Tensor, Tensor]:
        return random_selection(self.strategy, site.index, len(ids), site.num_experts)


def random_selection(given: Replace, layer: int, count: int, experts: int) -> tuple[Tensor, Tensor]:
    """What `Replace` puts in: distinct experts `[N, columns]`, positive weights."""
    generator = torch.Generator().manual_seed(1000 * given.seed + layer)
    ids = torch.rand(count, experts, generator=generator).argsort(-1)[:, : given.columns]
    return ids, 0.1 + torch.rand(count, given.columns, generator=generator)


@dataclass(frozen=True, eq=False)
class Look(ttr.RoutingStrategy):
    """Calls back with each site's call and the family's choice; changes nothing."""

    name: ClassVar[str] = "look_in_tests"
    back: Callable[[ttr.Site, Call, Tensor, Tensor], None] = field(default=lambda *_: None)

    def start(self, session: Session) -> ttr.RoutingRun:
        return _LookRun(self, session)


class _LookRun(ttr.RoutingRun):
    strategy: Look

    def edit_selection(
        self, site: ttr.Site, call: Call, ids: Tensor, weights: Tensor, rows: Rows
    ) -> tuple[Tensor, Tensor]:
        self.strategy.back(site, call, ids, weights)
        return ids, weights


# --- traces ---------------------------------------------------------------------------------------------


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """State that an adapted call must leave as it was: attributes, hooks and tensors of every module."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules():
        hooks = {k: len(v) for k, v in module.__dict__.items() if k.endswith("_hooks") and v}
        state[name] = (
            type(module).__name__,
            module.training,
            sorted(module.__dict__),
            hooks,
            getattr(module.forward, "__func__", module.forward) is type(module).forward,
        )
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {tensor.requires_grad}".encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    state["tensors"] = digest.hexdigest()
    return state
