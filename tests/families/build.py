"""Build a tiny random model of any MoE family in transformers (a few thousand weights each)."""

from __future__ import annotations

import inspect
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

TABLE = json.loads((Path(__file__).parent / "configs.json").read_text())
FAMILIES: dict[str, dict[str, Any]] = TABLE["families"]


def _config_class(family: str) -> type[PreTrainedConfig]:
    """The family's (text) config class; text backbones share the package of their parent model."""
    return type(AutoConfig.for_model(family))


def _known_names(config_class: type[PreTrainedConfig]) -> set[str]:
    names = set(inspect.signature(config_class.__init__).parameters)
    for base in config_class.__mro__:
        names |= set(getattr(base, "__annotations__", {}))
    return names | set(getattr(config_class, "attribute_map", {}))


def tiny_config(family: str, **changes: Any) -> PreTrainedConfig:
    """The family's config at toy size. `changes` win over everything else."""
    entry = FAMILIES[family]
    cls = _config_class(family)
    known = _known_names(cls)
    kwargs = {k: v for k, v in TABLE["common"].items() if k in known}
    kwargs |= entry.get("overrides", {})
    for name in entry.get("drop", []):
        kwargs.pop(name, None)
    kwargs |= changes
    return cls(**kwargs)


def _experts(config: PreTrainedConfig) -> int:
    names = ("n_routed_experts", "num_local_experts", "num_experts")
    return next(int(getattr(config, name)) for name in names if hasattr(config, name))


def build(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A tiny model in eval mode with random weights and random correction biases."""
    entry = FAMILIES[family]
    config = tiny_config(family, **changes)
    if "backbone" in entry:
        module = import_module(f"transformers.models.{entry['package']}.modeling_{entry['package']}")
        cls = getattr(module, entry["backbone"])
    else:
        cls = getattr(transformers, entry["model_class"])
    torch.manual_seed(seed)
    model = cls(config).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if any(s in name for s in ("gate", "router")) and not tensor.any():
                tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))  # zero-initialised routers
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "bias" in name and any(s in name for s in ("correction", "expert_bias", "balancing")):
                tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
            elif name.endswith(("per_expert_scale", "gate.global_scale")):  # ones, which would hide them
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            elif name.endswith("tid2eid"):  # zeros, where a checkpoint has distinct experts for each token id
                experts = torch.rand(len(tensor), _experts(config), generator=generator).argsort(-1)
                tensor.copy_(experts[:, : tensor.shape[1]])
    return model.to(dtype)
