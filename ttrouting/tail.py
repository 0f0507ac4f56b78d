"""Run only the upper layers of a model again, from what the layers below handed up in an earlier forward.

An edit at a layer changes nothing below it. So an optimisation reads its text once, and each further step runs
the layers from the first edited one up; there is no gradient and no memory for those below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ttrouting.patches import Patches
from ttrouting.probe import probe_tokens
from ttrouting.sites import Site
from ttrouting.target import Target

Recompute = Callable[[], AbstractContextManager[None]]


class _Stack:
    """The decoder layers of a model, and what they handed up in the last captured forward."""

    def __init__(self, layers: list[nn.Module]) -> None:
        self.layers = layers
        self.handed_up: dict[int, Any] = {}  # by number of the layer that gave it

    @contextmanager
    def capture(self, lowest: int) -> Iterator[None]:
        """Keep what layer `lowest - 1` and those above it hand up in the forward inside the block."""

        def keep(number: int, _module: nn.Module, _args: Any, output: Any) -> None:
            self.handed_up[number] = _detached(output)

        with ExitStack() as hooks:
            for number in range(max(0, lowest - 1), len(self.layers) - 1):
                hook = self.layers[number].register_forward_hook(partial(keep, number))
                hooks.callback(hook.remove)
            yield

    @contextmanager
    def replay(self, start: int) -> Iterator[None]:
        """Inside the block layers below `start` compute nothing: what was kept goes up in their place."""
        handed_up = self.handed_up.get(start - 1)
        patches = Patches()
        try:
            for layer in self.layers[:start]:
                patches.forward(layer, lambda _original: lambda *_args, **_kwargs: handed_up)
            yield
        finally:
            patches.undo()


class Tail:
    """The part of a model from the decoder layer of one MoE layer up.

    Attributes:
        skipped: sites below, which a replay does not run.
    """

    def __init__(
        self, target: Target, first: int, forward: Callable[..., Any], recompute: Recompute | None = None
    ) -> None:
        """Made by `Session.tail`.

        Args:
            first: index among the sites of the lowest layer that edits may touch. forward: the model's own.
            recompute: replays with a gradient keep no more than one layer's activations, and run each layer again
                in the backward pass; inside the context that this gives.
        """
        self._target, self._forward, self._recompute = target, forward, recompute
        self._stack = _Stack(_decoder_layers(target.model, target.sites))
        self._lowest = self._layer_of(first)
        self._following = False
        self._later: list[Any] = []  # what decoding handed up
        self.climb(first)

    def climb(self, first: int) -> None:
        """Replay from this site up, which is not below the one before; what lower layers gave is forgotten.

        Tried once for each model on the probe's tokens: where layers exchange more than a hidden state (keys and
        values, for example) a replay would not give the bits of a whole forward, and runs everything instead.
        """
        start = self._layer_of(first)
        self._start = start if start and self._proven(start) else 0
        kept = self._stack.handed_up
        self._stack.handed_up = {n: out for n, out in kept.items() if n == self._start - 1}
        below = {id(m) for layer in self._stack.layers[: self._start] for m in layer.modules()}
        self.skipped: list[Site] = [s for s in self._target.sites if id(s.router) in below]

    @contextmanager
    def capture(self) -> Iterator[None]:
        """The forward inside the block is the one that replays go on from, with the same context."""
        with self._stack.capture(self._lowest):
            yield

    def follow(self, patches: Patches) -> None:
        """From now on keep what decoding hands up: replays can go on from the longer text (see `catch_up`)."""
        self._following = bool(self._start)

        def more(_module: nn.Module, _args: Any, output: Any) -> None:
            if self._following:
                self._later.append(_detached(output))

        if self._following:
            patches.hook(self._stack.layers[self._start - 1], more)

    @contextmanager
    def catch_up(self, rows: int, length: int) -> Iterator[bool]:
        """Whether replays inside the block can go on from a text of `rows` sequences with `length` tokens.

        That is so if what was captured and what decoding handed up make that many: a prompt that `generate` read
        itself is there twice, for example, and then the second reading counts.
        """
        self._following, later = False, self._later
        first = self._stack.handed_up.get(self._start - 1)
        parts = later if sum(_length(part) for part in later) == length else [_repeated(first, rows), *later]
        there = all(isinstance(p, Tensor) and p.shape[0] == rows for p in parts)
        if there and sum(p.shape[1] for p in parts) == length:
            self._stack.handed_up[self._start - 1] = torch.cat(parts, 1)
            later.clear()
            yield True
            self._following = True
        else:
            self.release()
            yield False

    def release(self) -> None:
        """Forget everything that was kept."""
        self._following = False
        self._later.clear()
        self._stack.handed_up.clear()

    @contextmanager
    def replay(self) -> Iterator[None]:
        """The forward inside the block runs the upper layers only."""
        with self._stack.replay(self._start):
            if self._recompute is None or not torch.is_grad_enabled():
                yield
                return
            patches = Patches()
            try:
                for layer in self._stack.layers[self._start :]:
                    patches.forward(layer, partial(_checkpointed, self._recompute))
                yield
            finally:
                patches.undo()

    def _layer_of(self, first: int) -> int:
        """Number of the decoder layer that holds a site; 0 where layers are no list."""
        router = self._target.sites[first].router
        return next((n for n, layer in enumerate(self._stack.layers) if any(m is router for m in layer.modules())), 0)

    def _proven(self, start: int) -> bool:
        proven, name = self._target.proven, f"tail {start}"
        if name not in proven:
            stack, tokens = _Stack(self._stack.layers), probe_tokens(self._target.model)
            with torch.no_grad():
                with stack.capture(start):
                    whole = self._forward(input_ids=tokens, use_cache=False)
                # what layers leave for others outside of what they hand up is another text's from here on
                self._forward(input_ids=tokens.flip(1), use_cache=False)
                with stack.replay(start):
                    again = self._forward(input_ids=tokens, use_cache=False)
            proven[name] = torch.equal(_first(whole), _first(again))
        return proven[name]


def _checkpointed(recompute: Recompute, original: Callable[..., Any]) -> Callable[..., Any]:
    return partial(
        checkpoint,
        original,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (nullcontext(), recompute()),
    )


def _decoder_layers(model: nn.Module, sites: list[Site]) -> list[nn.Module]:
    """The list of layers that all sites stand in, lowest first; empty if there is none."""
    parts = sites[0].name.split(".")
    for depth in range(1, len(parts)):
        name = ".".join(parts[:depth])
        layers = model.get_submodule(name)
        if isinstance(layers, nn.ModuleList) and all(s.name.startswith(f"{name}.") for s in sites):
            return list(layers)
    return []


def _detached(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.detach()
    if isinstance(output, tuple):
        return tuple(_detached(o) for o in output)
    return output


def _length(kept: Any) -> int:
    return kept.shape[1] if isinstance(kept, Tensor) else 0


def _repeated(kept: Any, rows: int) -> Any:
    """One captured row for each of the neighbouring rows that a sequence became."""
    return kept.repeat_interleave(rows // kept.shape[0], 0) if isinstance(kept, Tensor) else kept


def _first(output: Any) -> Tensor:
    """Logits, or the last hidden state of a model without a head."""
    return output.logits if hasattr(output, "logits") else output[0]
