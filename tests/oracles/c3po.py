"""C3PO for one text at a time, in plain lines: no padding, no cache, routers patched by hand. Shares no code with
ttrouting; sets are read with the safetensors library.

Legend: `L` MoE layers, `E` experts, `N` references, `D` embedding dimension, `k` neighbours.
"""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oracles.plain_router import family_scores, plain_routing, routers, top_k_rule

# --- a model under an override ----------------------------------------------------------------------------


def inverse(router: nn.Module, scores: Tensor) -> Tensor:
    """Logits that the family scores as `scores` (softmax: up to a factor); none is below 1e-7."""
    if hasattr(router, "e_score_correction_bias"):  # DeepSeek-V3: a sigmoid, and none is above 1 - 1e-7
        return torch.log(scores.clamp(1e-7, 1 - 1e-7)) - torch.log(1 - scores.clamp(1e-7, 1 - 1e-7))
    return torch.log(scores.clamp_min(1e-7))


@contextmanager
def overridden(
    model: nn.Module, scores: Tensor, at: int, first: int = 0, delta: Tensor | None = None
) -> Iterator[list[Tensor]]:
    """Route by hand; token `at` of each row of a forward, in layers from `first` up, by `scores [L, E]`.

    Rows are copies of one unpadded text, always read whole. `delta [L, E]` is on the logits of all other tokens.
    Gives a list that fills with the `[N, E]` scores of each router call.
    """
    rows, seen = [1], []

    def make(router: nn.Module, layer: int) -> Any:
        def forward(hidden: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
            flat = hidden.reshape(-1, hidden.shape[-1])
            logits = flat @ router.weight.T.to(flat.dtype)
            if delta is not None:
                logits = logits + delta[layer]
            if layer >= first:
                wanted = inverse(router, scores[layer]).to(logits)
                texts = [torch.cat([t[:at], wanted[None], t[at + 1 :]]) for t in logits.chunk(rows[0])]
                logits = torch.cat(texts)
            found, choice = family_scores(router, logits)
            seen.append(found.detach())
            ids, weights = top_k_rule(router, found, choice)
            return logits, weights, ids

        return forward

    def count(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows[0] = (kwargs["input_ids"] if "input_ids" in kwargs else args[0]).shape[0]

    patched = routers(model)
    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    for layer, router in enumerate(patched):
        router.forward = make(router, layer)
    try:
        yield seen
    finally:
        hook.remove()
        for router in patched:
            del router.forward


def whole(model: nn.Module, ids: Sequence[int]) -> Tensor:
    """Logits `[T, V]` of one text."""
    return model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]


@torch.no_grad()
def read_alone(model: Any, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Scores at the last token `[L, E]`, and the mean last hidden state `[D]`."""
    with plain_routing(model) as seen:
        hidden = model.model(input_ids=torch.tensor([list(ids)]), use_cache=False).last_hidden_state[0]
    return torch.stack([scores[-1] for _, scores in seen]), hidden.mean(0)


def answer_loss(model: nn.Module, prompt: Sequence[int], answer: Sequence[int], scores: Tensor, first: int) -> Tensor:
    """Mean cross-entropy of an answer, the last prompt token routed by `scores [L, E]`."""
    with overridden(model, scores, len(prompt) - 1, first):
        logits = whole(model, [*prompt, *answer])
    return F.cross_entropy(logits[len(prompt) - 1 : -1], torch.tensor(list(answer)))


def answer_loss_under(model: nn.Module, prompt: Sequence[int], answer: Sequence[int], delta: Tensor) -> Tensor:
    """The same with `delta [L, E]` on the logits of every token."""
    with plain_routing(model, delta):
        logits = whole(model, [*prompt, *answer])
    return F.cross_entropy(logits[len(prompt) - 1 : -1], torch.tensor(list(answer)))


def heaviest(omega: Tensor, first: int, count: int) -> Tensor:
    """`[L, E]` bool: the `count` experts with the highest scores of each layer from `first` up."""
    chosen = torch.zeros(omega.shape, dtype=torch.bool)
    for layer in range(first, len(omega)):
        for expert in sorted(range(omega.shape[1]), key=lambda e: -float(omega[layer, e]))[:count]:
            chosen[layer, expert] = True
    return chosen


# --- a reference set --------------------------------------------------------------------------------------


class PlainSet:
    """A set's folder, read whole. `found` below is a list of `(number, cosine, distance)`, nearest first."""

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        arrays = safetensors.numpy.load_file(folder / "embeddings.safetensors")
        self.raw = arrays["embeddings"].astype(np.float64)
        self.mean, self.scale = (arrays.get(name) for name in ("mean", "scale"))
        self.vectors = np.stack([self._compared(row) for row in self.raw])  # unit vectors but for their rounding
        self.omega = safetensors.numpy.load_file(folder / "pathways.safetensors")["omega"].astype(np.float64)
        self.records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
        self.prompts = [tokenizer(r["prompt"])["input_ids"] for r in self.records]
        self.answers = [tokenizer(r["answer"], add_special_tokens=False)["input_ids"] for r in self.records]

    def _compared(self, row: np.ndarray) -> np.ndarray:
        if self.mean is not None:
            row = (row - self.mean) / self.scale
        return row / math.sqrt(sum(x * x for x in row))

    def query(self, raw: Any) -> np.ndarray:
        raw = np.asarray(raw, dtype=np.float64)
        unit = raw / math.sqrt(sum(x * x for x in raw))
        return self._compared(unit.astype(np.float32).astype(np.float64))  # a small scale makes this rounding large

    def nearest(self, query: Any, k: int, use: str = "successful", most: float = 0.95, eps: float = 9.0) -> list:
        """By embedding `[D]`, one by one."""
        one = self.query(query)
        found = []
        for number, row in enumerate(self.vectors):
            cosine = float((row * one).sum())
            distance = math.sqrt(max(0.0, 2 - 2 * cosine))
            if cosine <= most and distance <= eps and (use == "all" or self.records[number]["correct"]):
                found.append((number, cosine, distance))
        return sorted(found, key=lambda f: f[2])[:k]

    def nearest_pathways(
        self, query: Any, omega: np.ndarray, first: int, k: int, use: str = "successful", most: float = 0.95
    ) -> list:
        """By scores `[L, E]` in the layers from `first` up; leaks are still those of the embedding."""
        one = self.query(query)
        found = []
        for number, path in enumerate(self.omega):
            cosine = float((self.vectors[number] * one).sum())
            if cosine <= most and (use == "all" or self.records[number]["correct"]):
                distance = math.sqrt(float(((path[first:] - omega[first:]) ** 2).sum()))
                found.append((number, cosine, distance))
        return sorted(found, key=lambda f: f[2])[:k]

    def mean_pathway(self, found: list, weights: list[float]) -> np.ndarray:
        """`sum K_i omega_i / sum K_i`, `[L, E]`."""
        return sum(w * self.omega[f[0]] for f, w in zip(found, weights, strict=True)) / sum(weights)


def kernel(name: str, found: list, sigma: float | None = None) -> list[float]:
    """Weights of neighbours, summing to 1; the width is the median distance if none is given."""
    distances = [f[2] for f in found]
    width = float(np.median(distances)) if sigma is None else sigma
    values = []
    for _, cosine, d in found:
        far = math.sqrt(3) * d / width
        values.append(
            {
                "gaussian": math.exp(-(d**2) / (2 * width**2)),
                "matern": (1 + far) * math.exp(-far),
                "linear": max(0.0, cosine),
                "polynomial": (1 + cosine) ** 2,
            }[name]
        )
    return [value / sum(values) for value in values]
