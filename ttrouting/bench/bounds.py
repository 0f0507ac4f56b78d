"""How cheap can a call be? By counting multiplications, and bytes that a decode step has to read.

A bound says what no implementation gets below that computes the same things; kernels, launches and copies come on
top of it. Multiplications are those of linear maps and of attention scores; norms, activations and routing are left
out. A backward pass gives gradients of activations alone, as no weight learns: one product for each linear map
(as in the forward pass) and four for the two of attention scores. It ends in the lowest layer that has a delta, at
the experts' weights of mixing: of that layer nothing else is differentiated.

Legend: `T` tokens of each prompt, `B` sequences, `L` decoder layers, `E` experts, `K` per token, `S` steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ttrouting.sites import Site, text_config


@dataclass(frozen=True)
class Layer:
    """Counts of one decoder layer.

    Attributes:
        dense: weights that every token meets: attention projections, router, shared experts or a plain MLP.
        expert: weights of one expert; 0 where there is none.
        experts, top_k: `E` and `K`.
        scores: numbers multiplied for one query and one key: `heads * (d_key + d_value)`.
        cached: numbers in the KV cache for one token.
    """

    dense: int
    expert: int
    experts: int
    top_k: int
    scores: int
    cached: int

    def forward(self, tokens: int, top_k: float | None = None) -> float:
        """Multiplications for a text of so many tokens, attention being causal."""
        k = self.top_k if top_k is None else top_k
        return tokens * (self.dense + k * self.expert) + self._attention(tokens)

    def backward(self, tokens: int) -> float:
        """The same for gradients of activations."""
        return self.forward(tokens) + self._attention(tokens)

    def read(self, batch: int, k: float, weak: bool = False) -> float:
        """Weights that a decode step reads.

        Args:
            k: experts per token. weak: a second row for each sequence that meets one more expert at most.
        """
        chosen = self.experts * (1 - (1 - k / self.experts) ** batch) if self.experts else 0.0
        more = min(batch, self.experts - chosen) if weak else 0.0
        return self.dense + (chosen + more) * self.expert

    def _attention(self, tokens: int) -> float:
        return self.scores * tokens * (tokens + 1) / 2


@dataclass(frozen=True)
class Shape:
    """A model, as far as counting needs it.

    Attributes:
        layers: lowest first. head: weights of the language-model head.
        homes: number of the decoder layer that each MoE layer stands in.
    """

    layers: tuple[Layer, ...]
    head: int
    homes: tuple[int, ...]

    @classmethod
    def of(cls, model: Any, sites: Sequence[Site]) -> Shape:
        """Of a model whose decoder layers attend to the whole text before a token."""
        layers = list(model.get_decoder().layers)
        homes = [n for s in sites for n, layer in enumerate(layers) if any(m is s.router for m in layer.modules())]
        config = text_config(model.config)
        return cls(
            tuple(_layer(layer, config, sites) for layer in layers),
            model.get_output_embeddings().weight.numel(),
            tuple(homes),
        )

    def forward(self, tokens: int, logits: int, k: Sequence[float] | None = None, first: int = 0) -> float:
        """Multiplications of a forward from layer `first` up, with logits of so many tokens.

        Args:
            k: experts per token of each layer; its own `K` if None.
        """
        each = self.own_k if k is None else k
        layers = list(zip(self.layers, each, strict=True))[first:]
        return sum(layer.forward(tokens, n) for layer, n in layers) + self.head * logits

    @property
    def own_k(self) -> list[int]:
        """`K` of each layer, 0 where it has no experts."""
        return [layer.top_k for layer in self.layers]

    def backward(self, tokens: int, logits: int, first: int) -> float:
        """Of a backward from the loss down to the mixing weights of layer `first`."""
        return sum(layer.backward(tokens) for layer in self.layers[first + 1 :]) + self.head * logits

    def read(self, batch: int, past: float, k: Sequence[float] | None = None, rows: int = 1) -> float:
        """Numbers that a decode step of `batch` sequences reads: weights, and a KV cache of `past` tokens a row.

        Args:
            k: as in `forward`. rows: 2 with a weak row for each sequence.
        """
        each = self.own_k if k is None else k
        weights = sum(layer.read(batch, n, rows > 1) for layer, n in zip(self.layers, each, strict=True))
        cache = sum(layer.cached for layer in self.layers) * past * batch * rows
        return weights + self.head + cache


@dataclass(frozen=True)
class Rerouting:
    """Counts of one adaptation of one sequence and the reading of its prompt, up to the first token.

    Attributes:
        tokens: `T`. steps: `S`. first: lowest decoder layer with a delta.
        known: whether `first` is known before the text was read. If it is, the first step's forward is the one that
            the others go on from; if not, that one makes no graph, and the tail is run again.
        no_harm: held-back tokens are judged, before and after. kept: if nothing is, the prompt is read once more.
    """

    shape: Shape
    tokens: int
    steps: int
    first: int
    known: bool
    no_harm: bool
    kept: bool = True

    @property
    def fitted(self) -> int:
        """Tokens that the loss is taken on."""
        return self.tokens - 1 - self._held

    @property
    def _held(self) -> int:
        return max(8, (self.tokens - 1) // 4) if self.no_harm else 0

    @property
    def ours(self) -> float:
        """One forward; then only the layers from `first` up; the last pass over them fills the KV cache."""
        shape, tokens = self.shape, self.tokens
        whole = shape.forward(tokens, 0)
        tail = shape.forward(tokens, 0, first=self.first)
        passes = self.steps - 1 + (not self.known)
        head = shape.head * (self.steps * self.fitted + 2 * self._held + 1)
        back = self.steps * shape.backward(tokens, self.fitted, self.first)
        return whole + passes * tail + back + tail + head + (0 if self.kept else whole)

    def straightforward(self, first: int) -> float:
        """All logits in each forward of the whole model, a backward, and at the end the prompt once more.

        Args:
            first: lowest layer that gets a gradient.
        """
        shape, tokens = self.shape, self.tokens
        forward = shape.forward(tokens, tokens)
        step = forward + shape.backward(tokens, tokens, first)
        return self.steps * step + (forward if self.no_harm else 0) + shape.forward(tokens, 1)


def _layer(layer: nn.Module, config: Any, sites: Sequence[Site]) -> Layer:
    modules = {id(m) for m in layer.modules()}
    site = next((s for s in sites if id(s.router) in modules), None)
    experts = list(site.experts.modules()) if site is not None and site.experts is not None else []
    routed = {id(p) for m in experts for p in m.parameters(recurse=False)}
    dense = sum(m.weight.numel() for m in layer.modules() if isinstance(m, nn.Linear) and id(m.weight) not in routed)
    if site is not None and not any(isinstance(m, nn.Linear) for m in site.router.modules()):
        dense += max((p.numel() for p in site.router.parameters()), default=0)
    weights = sum(p.numel() for m in experts for p in m.parameters(recurse=False) if p.dim() > 1)
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    keys, values = (getattr(config, name, None) or width for name in ("qk_head_dim", "v_head_dim"))
    groups = getattr(config, "num_key_value_heads", None) or heads
    return Layer(
        dense=dense,
        expert=0 if site is None else weights // site.num_experts,
        experts=0 if site is None else site.num_experts,
        top_k=0 if site is None else site.top_k,
        scores=heads * (keys + values),
        cached=groups * (keys + values),
    )
