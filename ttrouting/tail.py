"""Run only the upper layers of a model again, from what the layers below handed up in an earlier forward.

An edit at a layer changes nothing below it. So an optimisation reads its text once, and each further step runs
the layers from the first edited one up; there is no gradient and no memory for those below.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ttrouting.patches import Patches
from ttrouting.probe import probe_tokens
from ttrouting.sites import Site
from ttrouting.target import Target


class Tail:
    """The part of a model from the decoder layer of one MoE layer up.

    Attributes:
        skipped: sites below, which a replay does not run.
        whole: True if a replay runs the whole model: `check_tail` has not found that this one's layers can be cut.
    """

    def __init__(self, target: Target, first: int) -> None:
        """`first`: index among the sites of the lowest layer that edits may touch."""
        self.whole = not target.proven.get(_name(first), False)
        self._below = [] if self.whole else _layers_below(target.model, target.sites[first])
        inside = {id(module) for layer in self._below for module in layer.modules()}
        self.skipped = [s for s in target.sites if id(s.router) in inside]
        self._handed_up: Any = None

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Keep what the layers below hand up in the forward inside the block."""
        if not self._below:
            yield
            return

        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            self._handed_up = _detached(output)

        hook = self._below[-1].register_forward_hook(keep)
        try:
            yield
        finally:
            hook.remove()

    @contextmanager
    def replay(self) -> Iterator[None]:
        """Inside the block the layers below compute nothing: what `capture` kept goes up in their place."""
        patches = Patches()

        def stand_in(*_args: Any, **_kwargs: Any) -> Any:
            return self._handed_up

        try:
            for layer in self._below:
                patches.forward(layer, lambda _original: stand_in)
            yield
        finally:
            patches.undo()

    def release(self) -> None:
        """Forget what was kept."""
        self._handed_up = None


def check_tail(target: Target, first: int) -> None:
    """Find out whether a replay from this site up gives the bits of a whole forward; outside of a session.

    Where layers exchange more than a hidden state it does not, and replays then run everything.
    """
    if _name(first) in target.proven:
        return
    target.proven[_name(first)] = True
    tail, tokens = Tail(target, first), probe_tokens(target.model)
    with torch.no_grad():
        with tail.capture():
            whole = target.model(input_ids=tokens, use_cache=False)
        with tail.replay():
            again = target.model(input_ids=tokens, use_cache=False)
    target.proven[_name(first)] = bool(tail.skipped) and torch.equal(_first(whole), _first(again))


def _name(first: int) -> str:
    return f"tail {first}"


def _layers_below(model: nn.Module, site: Site) -> list[nn.Module]:
    """The decoder layers below that of `site`, lowest first; empty if there are none."""
    parts = site.name.split(".")
    for depth in range(1, len(parts)):
        stack = model.get_submodule(".".join(parts[:depth]))
        if isinstance(stack, nn.ModuleList):
            return list(stack)[: int(parts[depth])]
    return []


def _detached(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.detach()
    if isinstance(output, tuple):
        return tuple(_detached(o) for o in output)
    return output


def _first(output: Any) -> Tensor:
    """Logits, or the last hidden state of a model without a head."""
    return output.logits if hasattr(output, "logits") else output[0]
