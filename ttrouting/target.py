"""The model that strategies are planned for: its sites, its tokenizer, its fingerprint."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ttrouting.sites import Site


def _resident(module: nn.Module, name: str, tensor: Tensor) -> Tensor | None:
    """A parameter's values, also while accelerate keeps them on the CPU or on disk."""
    if not tensor.is_meta:
        return tensor.detach()
    hook = getattr(module, "_hf_hook", None)
    weights = getattr(hook, "weights_map", None)
    if weights is None:
        return None
    value = weights[name]
    return value.detach() if isinstance(value, Tensor) else None


@dataclass(frozen=True, eq=False)
class Target:
    """A model, ready to be planned for.

    Attributes:
        model: the transformers model. sites: its MoE layers. tokenizer: needed for patterns in `loss_on`.
        no_harm: whether adaptations that do not help are rolled back.
    """

    model: Any
    sites: list[Site] = field(repr=False)
    tokenizer: Any = None
    no_harm: bool = True

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over architecture, sites and router weights (as bf16, so that dtype does not matter)."""
        digest = hashlib.sha256()
        config = self.model.config
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        head = {
            "model_type": config.model_type,
            "hidden_size": getattr(text, "hidden_size", None),
            "vocab_size": getattr(text, "vocab_size", None),
            "sites": [(s.name, s.num_experts, s.top_k) for s in self.sites],
        }
        digest.update(json.dumps(head, sort_keys=True).encode())
        for site in self.sites:
            for path, module in site.router.named_modules():
                for name, parameter in module.named_parameters(recurse=False):
                    value = _resident(module, name, parameter)
                    digest.update(f"{path}.{name}".encode())
                    if value is not None:
                        raw = value.to("cpu", torch.bfloat16).contiguous().view(torch.uint8)
                        digest.update(raw.numpy().tobytes())
        return digest.hexdigest()
