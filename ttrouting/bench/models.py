"""Which model is measured where no weights are at hand? A random one, by a short text such as `olmoe:8x512`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ttrouting.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Proportions:
    """Of a released checkpoint, so that a small model spends its time as the large one does.

    Attributes:
        experts, top_k: counts. ffn, vocab, heads, shared: in units of the hidden size: an expert's inner size, the
            vocabulary, attention heads, the shared expert's inner size. kv: key-value heads for each head.
    """

    experts: int
    top_k: int
    ffn: float
    vocab: float
    heads: float
    kv: float
    shared: float = 0


FAMILIES = {
    "olmoe": Proportions(64, 8, ffn=1 / 2, vocab=50304 / 2048, heads=16 / 2048, kv=1),  # OLMoE-1B-7B
    "mixtral": Proportions(8, 2, ffn=7 / 2, vocab=32000 / 4096, heads=32 / 4096, kv=1 / 4),  # Mixtral-8x7B
    "qwen2_moe": Proportions(  # Qwen1.5-MoE-A2.7B
        60, 4, ffn=1408 / 2048, vocab=151936 / 2048, heads=16 / 2048, kv=1, shared=11 / 4
    ),
    "qwen3_moe": Proportions(  # Qwen3-30B-A3B
        128, 8, ffn=768 / 2048, vocab=151936 / 2048, heads=32 / 2048, kv=1 / 8
    ),
}
OPTIONS = ("experts", "top_k", "ffn", "vocab", "heads")
EXAMPLE = "olmoe:8x512 or olmoe:16x256:experts=32,vocab=8000"
ROW = 8  # numbers: grouped matmuls take rows of whole 16 bytes
ROUTER_SPREAD = 1.5  # standard deviation of router logits: the best 8 of 64 experts hold about 0.6 of probability


@dataclass(frozen=True)
class Spec:
    """Legend: `L` layers, `H` hidden size, `E` experts, `K` per token, `V` vocabulary, `I` an expert's inner size."""

    family: str
    layers: int
    hidden: int
    experts: int
    top_k: int
    ffn: int
    vocab: int
    heads: int

    @classmethod
    def parse(cls, text: str) -> Spec:
        """From `FAMILY:LxH`, with options after another colon: `experts=E,top_k=K,ffn=I,vocab=V,heads=N`.

        Raises:
            ConfigError: anything else.
        """
        found = re.fullmatch(r"([a-z0-9_]+):(\d+)x(\d+)(?::(.*))?", text.strip().lower().replace("-", "_"))
        if found is None:
            raise ConfigError(f"--random takes FAMILY:LAYERSxHIDDEN, for example {EXAMPLE}; got {text!r}.")
        family, layers, hidden, rest = found[1], int(found[2]), int(found[3]), found[4]
        if family not in FAMILIES:
            raise ConfigError(f"--random has no family {family!r}.{did_you_mean(family, FAMILIES)}")
        large = FAMILIES[family]
        values = {
            "experts": large.experts,
            "top_k": large.top_k,
            "ffn": max(ROW, round(large.ffn * hidden / ROW) * ROW),
            "vocab": max(1, round(large.vocab * hidden)),
            "heads": max(1, round(large.heads * hidden)),
        }
        for part in (rest or "").split(",") if rest is not None else []:
            name, _, value = part.partition("=")
            if name not in OPTIONS:
                raise ConfigError(f"--random {text!r} has no option {name!r}.{did_you_mean(name, OPTIONS)}")
            if not value.isdigit():
                raise ConfigError(f"--random needs a whole number in {name}=..., got {part!r}.")
            values[name] = int(value)
        spec = cls(family, layers, hidden, **values)
        spec._check(text)
        return spec

    def _check(self, text: str) -> None:
        for name in ("layers", "hidden", *OPTIONS):
            if getattr(self, name) < 1:
                raise ConfigError(f"--random {text!r}: {name} must be at least 1.")
        for name in ("hidden", "ffn"):
            if getattr(self, name) % ROW:
                raise ConfigError(f"--random {text!r}: {name}={getattr(self, name)} is no multiple of {ROW}.")
        if self.top_k > self.experts:
            raise ConfigError(f"--random {text!r}: top_k={self.top_k} of {self.experts} experts. Give fewer.")
        if self.hidden % (2 * self.heads):
            raise ConfigError(
                f"--random {text!r}: {self.heads} heads do not share a hidden size of {self.hidden} in even parts. "
                "Give another size, or heads=1."
            )

    def __str__(self) -> str:
        options = ",".join(f"{name}={getattr(self, name)}" for name in OPTIONS)
        return f"{self.family}:{self.layers}x{self.hidden}:{options}"

    def build(self, longest: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Any:
        """A random model in eval mode that never ends a sequence.

        Args:
            longest: tokens of a prompt and its continuation.
        """
        # not at the top: it takes seconds, and a wrong option should be told at once
        from transformers import AutoConfig, AutoModelForCausalLM

        large = FAMILIES[self.family]
        expert_size = "intermediate_size" if self.family in ("olmoe", "mixtral") else "moe_intermediate_size"
        options: dict[str, Any] = {
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "vocab_size": self.vocab,
            "num_attention_heads": self.heads,
            "num_key_value_heads": _divisor(self.heads, max(1, round(large.kv * self.heads))),
            "head_dim": self.hidden // self.heads,
            expert_size: self.ffn,
            "num_local_experts" if self.family == "mixtral" else "num_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "max_position_embeddings": longest,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        }
        if large.shared:
            options["shared_expert_intermediate_size"] = round(large.shared * self.hidden)
        if self.family == "qwen3_moe":
            options["norm_topk_prob"] = True  # as released
        torch.manual_seed(seed)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(self.family, **options), dtype=dtype)
        for block in model.modules():
            if hasattr(block, "gate") and hasattr(block, "experts"):
                nn.init.normal_(block.gate.weight, std=ROUTER_SPREAD / self.hidden**0.5)
        return model.eval()


def _divisor(number: int, near: int) -> int:
    """The largest divisor of `number` up to `near`."""
    return next(n for n in range(min(number, near), 0, -1) if number % n == 0)
