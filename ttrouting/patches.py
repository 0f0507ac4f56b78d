"""Temporary changes to modules: every one is undone, in reverse, also after a failure half-way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class Patches:
    """A stack of undo steps. `undo()` is idempotent and runs every step even if one fails."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def forward(self, module: nn.Module, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Replace `module.forward` on the instance by `make(current forward)`.

        Outermost on purpose: accelerate patches the same attribute, and its version is kept inside.
        """
        missing = object()
        before = module.__dict__.get("forward", missing)
        # the plain slot, not setattr: nn.Module would try to register the value
        module.__dict__["forward"] = make(module.forward)

        def restore() -> None:
            if before is missing:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = before

        self._undo.append(restore)

    def pre_hook(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Register a forward pre-hook that sees and may replace `(args, kwargs)`."""
        self._undo.append(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def hook(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Register a forward hook that sees `(module, arguments, output)`."""
        self._undo.append(module.register_forward_hook(hook).remove)

    def undo(self) -> None:
        """Take everything back."""
        failure: BaseException | None = None
        while self._undo:
            step = self._undo.pop()
            try:
                step()
            except BaseException as error:  # noqa: BLE001 - the remaining steps must still run
                failure = failure or error
        if failure is not None:
            raise failure
