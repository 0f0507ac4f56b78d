"""Read weights that accelerate keeps on the CPU or on disk between forwards.

Outside a forward such a weight is on the meta device: it has a shape and no values, and torch computes
garbage from it without a word. So values are only read through accelerate's own hooks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from accelerate.utils import align_module_device
from torch import Tensor, nn

from ttrouting.errors import UnsupportedModelError


def resident(module: nn.Module, name: str) -> Any:
    """A parameter of `module` with its values, or None if there is none of that name."""
    value = getattr(module, name, None)
    if not isinstance(value, Tensor) or not value.is_meta:
        return value
    with align_module_device(module):
        return getattr(module, name)


@contextmanager
def blocks_loaded(model: nn.Module, inner: nn.Module) -> Iterator[None]:
    """Inside this block weights of `inner` are there that accelerate loads with a block around it.

    (`preload_module_classes`.) Weights that `inner` or its children load themselves are left to `resident`.
    """
    path = next(name for name, module in model.named_modules() if module is inner)
    parts = path.split(".")[:-1]
    with ExitStack() as stack:
        for depth in range(len(parts) + 1):
            stack.enter_context(align_module_device(model.get_submodule(".".join(parts[:depth]))))
        yield


def check_loaded(model: nn.Module) -> None:
    """Raise if a weight has no values and no hook of accelerate's that would bring them."""
    missing: list[str] = []

    def walk(module: nn.Module, prefix: str, covered: bool) -> None:
        hook = getattr(module, "_hf_hook", None)
        hooks = getattr(hook, "hooks", (hook,))  # a sequence of hooks, or one
        loads = covered or any(getattr(h, "offload", False) for h in hooks)
        if not loads:
            missing.extend(prefix + name for name, p in module.named_parameters(recurse=False) if p.is_meta)
        for name, child in module.named_children():
            walk(child, f"{prefix}{name}.", loads)

    walk(model, "", False)
    if missing:
        raise UnsupportedModelError(
            f"{len(missing)} weights of {type(model).__name__} have no values (first: {missing[0]}): they are on the "
            "meta device, and no accelerate hook loads them. Load the model with from_pretrained(..., "
            "device_map=..., offload_folder=...)."
        )
