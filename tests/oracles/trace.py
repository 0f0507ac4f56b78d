"""Everything a model is made of, also where accelerate has put the weights away or a quantiser has packed them."""

import hashlib
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def digest(tensor: Tensor) -> Any:
    """Type, device and bytes; of a packed tensor those of its parts."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        return type(tensor).__name__, {name: digest(getattr(tensor, name)) for name in names}
    kind = (tensor.dtype, tuple(tensor.shape), str(tensor.device))
    if tensor.is_meta:
        return kind
    raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return *kind, hashlib.sha256(raw.numpy().tobytes()).hexdigest()


def trace(model: nn.Module) -> dict[str, Any]:
    """Weights where they rest and as they are loaded, attributes, hooks, forwards, by module."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        rest = {n: (digest(t), t.requires_grad, t.grad is None) for n, t in own}
        with align_module_device(module):
            loaded = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
            values = {n: digest(t) for n, t in loaded}
        found[name] = {
            "rest": rest,
            "values": values,
            "attributes": sorted(vars(module)),
            "forward": vars(module).get("forward"),
            "hooks": {k: list(v.values()) for k, v in vars(module).items() if k.endswith("_hooks")},
        }
    found["class forwards"] = {type(m): (type(m).forward, type(m).__call__) for m in model.modules()}
    found["modes"] = torch.overrides._len_torch_function_stack()  # type: ignore[attr-defined]
    return found
