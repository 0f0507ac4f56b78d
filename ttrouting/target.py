"""The model that strategies are planned for: its sites, its tokenizer, its fingerprint."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ttrouting.offload import blocks_loaded, resident
from ttrouting.sites import Site, text_config


def _bytes(value: Tensor) -> bytes:
    """Values as bf16, so that neither dtype nor device matters."""
    if is_traceable_wrapper_subclass(value):  # a quantised weight
        value = value.dequantize()
    return value.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes()


@dataclass(frozen=True, eq=False)
class Target:
    """A model, ready to be planned for.

    Attributes:
        model: the transformers model. sites: its MoE layers. tokenizer: needed for patterns in `loss_on`.
        no_harm: whether adaptations that do not help are rolled back.
        proven: short cuts through the model that were tried on it, and whether they gave the same (see `tail` and
            `head`); one that was not tried is not taken.
    """

    model: Any
    sites: list[Site] = field(repr=False)
    tokenizer: Any = None
    no_harm: bool = True
    proven: dict[str, bool] = field(default_factory=dict, repr=False)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over architecture, sites and router weights (as bf16, so that dtype does not matter)."""
        digest = hashlib.sha256()
        config = self.model.config
        text = text_config(config)
        head = {
            "model_type": config.model_type,
            "hidden_size": getattr(text, "hidden_size", None),
            "vocab_size": getattr(text, "vocab_size", None),
            "sites": [(s.name, s.num_experts, s.top_k) for s in self.sites],
        }
        digest.update(json.dumps(head, sort_keys=True).encode())
        for site in self.sites:
            with blocks_loaded(self.model, site.router):
                for path, module in site.router.named_modules():
                    for name, _ in module.named_parameters(recurse=False):
                        digest.update(f"{path}.{name}".encode())
                        digest.update(_bytes(resident(module, name)))
        return digest.hexdigest()
