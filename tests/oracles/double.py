"""Run a model in true double precision: families cast to fp32 inside (norms, rotary, softmax)."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from families.build import build

# what may give or keep fp32 whatever its keywords are; everything else goes straight on
CASTS = {Tensor.float, Tensor.to, Tensor.type, Tensor.matmul, Tensor.cos, Tensor.sin}


class InDouble(TorchFunctionMode):
    """Turns fp32 casts of fp64 tensors into no-ops: finite differences and 1e-9 comparisons then mean something."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in CASTS and not (kwargs and kwargs.get("dtype") is torch.float32):
            return func(*args, **(kwargs or {}))
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
            if func in (Tensor.to, Tensor.type):
                args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            if func is Tensor.matmul:  # rotary angles of older versions: fp64 frequencies by fp32 positions
                args = (args[0], args[1].double(), *args[2:])
        out = func(*args, **kwargs)
        return out.double() if func is torch.Tensor.cos or func is torch.Tensor.sin else out


def build_double(family: str, **options: Any) -> Any:
    """A tiny model of a family in fp64, eager experts (grouped matmul takes no fp64 on a CPU), which never stops."""
    model = build(family, dtype=torch.float64, **options)
    model.set_experts_implementation("eager")
    model.generation_config.eos_token_id = None
    return model
