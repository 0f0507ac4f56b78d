"""What is a routing trace: for each token and layer the experts that ran, their weights, the router's entropy?

Legend: `T` tokens, `L` MoE layers, `E` experts, `K` columns of experts a token.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ttrouting.errors import ConfigError

NO_EXPERT = -1
MOST_EXPERTS = torch.iinfo(torch.int16).max


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """How one sequence was routed. `ttr.save` and `ttr.load` keep it.

    Attributes:
        ids: `[T, L, K]` int16, experts that ran; -1 where one was dropped, or a layer has fewer columns.
        weights: `[T, L, K]` fp32, mixing weights as the experts got them, 0 beside -1; None if unknown.
        entropy: `[T, L]` fp32, of the router's distribution `pi` in nats; None if unknown.
        tokens: `T` pieces of text; token ids as text where there was no tokenizer.
        layers: `L` names. num_experts: `E`, of the widest layer.
        prompt_tokens: how many of the tokens are the prompt; the others were generated.
        fingerprint: of the model, empty if unknown.

    Raises:
        ConfigError: shapes that do not fit each other, or experts that are not there.
    """

    ids: Tensor
    weights: Tensor | None
    entropy: Tensor | None
    tokens: tuple[str, ...]
    layers: tuple[str, ...]
    num_experts: int
    prompt_tokens: int
    fingerprint: str = ""

    def __post_init__(self) -> None:
        ids = self.ids
        if ids.dim() != 3 or 0 in ids.shape or ids.is_floating_point():
            raise ConfigError(
                f"A trace needs whole numbers of shape [tokens, layers, k], got {ids.dtype} of shape "
                f"{tuple(ids.shape)}. A batch is one trace for each sequence."
            )
        if not 0 < self.num_experts <= MOST_EXPERTS:
            raise ConfigError(f"num_experts must be from 1 to {MOST_EXPERTS}, got {self.num_experts}.")
        low, high = int(ids.min()), int(ids.max())
        if low < NO_EXPERT or high >= self.num_experts:
            raise ConfigError(
                f"Experts {low} to {high} are named where the model has {self.num_experts}. "
                "Pass the model's own num_experts, and -1 where no expert ran."
            )
        for name, part, wanted in (("weights", self.weights, ids.shape), ("entropy", self.entropy, ids.shape[:2])):
            if part is not None and part.shape != wanted:
                raise ConfigError(f"{name} has shape {tuple(part.shape)}, these ids need {tuple(wanted)}.")
        for name, words, number in (("tokens", self.tokens, ids.shape[0]), ("layers", self.layers, ids.shape[1])):
            if len(words) != number:
                raise ConfigError(f"There are {len(words)} {name} beside ids of shape {tuple(ids.shape)}.")
        if not 0 <= self.prompt_tokens <= ids.shape[0]:
            raise ConfigError(f"prompt_tokens is {self.prompt_tokens} in a trace of {ids.shape[0]} tokens.")

    @classmethod
    def from_arrays(
        cls,
        ids: Any,
        weights: Any = None,
        entropy: Any = None,
        *,
        num_experts: int,
        tokens: Sequence[str] | None = None,
        layers: Sequence[str] | None = None,
        prompt_tokens: int | None = None,
        fingerprint: str = "",
    ) -> RoutingTrace:
        """A trace of arrays from elsewhere, such as the `routed_experts` of vLLM and SGLang.

        Args:
            ids: `[T, L, K]` whole numbers, MoE layers alone. weights: as `ids`. entropy: `[T, L]`.
            num_experts: `E` of the model. tokens, layers: their names; numbers if left out.
            prompt_tokens: all tokens if left out.

        Raises:
            ConfigError: shapes that do not fit, an expert that is not there, or twice in one place.
        """
        found = _tensor(ids)
        if found.dim() == 3:
            _check_distinct(found)
        names = tokens if tokens is not None else [str(t) for t in range(len(found))]
        sites = layers if layers is not None else [str(i) for i in range(found.shape[1] if found.dim() > 1 else 0)]
        narrow = found.dim() == 3 and not found.is_floating_point() and found.abs().max() <= MOST_EXPERTS
        return cls(
            found.to(torch.int16) if narrow else found,  # what does not fit is refused, not wrapped
            None if weights is None else _tensor(weights).to(torch.float32),
            None if entropy is None else _tensor(entropy).to(torch.float32),
            tuple(names),
            tuple(sites),
            num_experts,
            len(names) if prompt_tokens is None else prompt_tokens,
            fingerprint,
        )

    @property
    def k(self) -> Tensor:
        """`[T, L]` int64, how many experts ran."""
        return (self.ids != NO_EXPERT).sum(-1)

    @property
    def load(self) -> Tensor:
        """`[L, E]` fp64, the share of the tokens that each expert ran for."""
        count, width = len(self.layers), self.num_experts
        place = torch.arange(count)[None, :, None] * width + self.ids.long()  # [T, L, K]
        hits = torch.bincount(place[self.ids != NO_EXPERT], minlength=count * width)
        return hits.view(count, width).double() / len(self.tokens)

    @property
    def top(self) -> Tensor:
        """`[T, L]` int64, the expert with the largest weight (the first one named without weights), or -1."""
        if self.weights is None:
            return self.ids[:, :, 0].long()
        best = self.weights.masked_fill(self.ids == NO_EXPERT, -torch.inf).argmax(-1, keepdim=True)
        return self.ids.gather(2, best)[:, :, 0].long()


def _tensor(values: Any) -> Tensor:
    """Arrays, lists and tensors, copied: a trace does not change with what it was made of."""
    return values.clone() if isinstance(values, Tensor) else torch.as_tensor(np.array(values))


def decode_routed_experts(text: str, num_layers: int | None = None, top_k: int | None = None) -> np.ndarray[Any, Any]:
    """`[T, L, K]` int32 from what an inference server writes into its answer.

    vLLM sends a base64 `.npy` file, which knows its shape; SGLang base64 int32 without one, of all `num_layers`
    hidden layers. Assumed: little-endian, as on the machines that both run on.

    Raises:
        ConfigError: no base64, no whole numbers, or a shape that is missing or does not fit.
    """
    try:
        data = base64.b64decode(text, validate=True)
        if data.startswith(b"\x93NUMPY"):
            found = np.load(io.BytesIO(data), allow_pickle=False)
        elif num_layers is None or top_k is None:
            raise ConfigError("These routed experts do not say their shape. Pass num_layers and top_k of the model.")
        else:
            found = np.frombuffer(data, dtype="<i4").reshape(-1, num_layers, top_k)
    except (binascii.Error, ValueError, EOFError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"These are no routed experts of vLLM or SGLang: {error}.") from None
    if found.ndim != 3 or not np.issubdtype(found.dtype, np.integer):
        raise ConfigError(f"Routed experts are whole numbers [tokens, layers, k], got {found.dtype} {found.shape}.")
    return found.astype(np.int32)


def _check_distinct(ids: Tensor) -> None:
    """Servers fill the columns of dense layers with zeros: an expert stands there twice."""
    inside = ids.sort(-1).values
    twice = ((inside[..., 1:] == inside[..., :-1]) & (inside[..., 1:] != NO_EXPERT)).any(-1)  # [T, L]
    if bool(twice.any()):
        token, layer = twice.nonzero()[0].tolist()
        raise ConfigError(
            f"Layer {layer} names an expert twice for token {token}. Is it a dense layer? "
            "Pass the columns of MoE layers alone, such as ids[:, 1:]."
        )
