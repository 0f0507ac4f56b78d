"""C3PO in an engine: a prompt is read, its neighbours are asked, its last token is read again as they were routed.

Legend: `L` MoE layers, `E` experts, `D` hidden size.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ttrouting.errors import ConfigError, UnsupportedCallError
from ttrouting.scoring import INVERSES, logits_of, raw_scores
from ttrouting.strategies._neighbourhood import ask
from ttrouting.strategies._surrogates import core_experts, mean_pathway
from ttrouting.vllm.routing import Layer

if TYPE_CHECKING:
    from ttrouting.vllm.bookkeeping import Held


def check_c3po(c3po: Any, no_harm: bool, scorings: tuple[str, ...], sizes: tuple[int, ...], fingerprint: str) -> None:
    """Raise unless an engine can do what is asked for.

    Raises:
        ConfigError, UnsupportedCallError: what to ask for instead.
    """
    if c3po.surrogate != "kernel_regression" or c3po.scope != "last_prompt_token":
        raise UnsupportedCallError(
            f"c3po in vLLM runs surrogate='kernel_regression' at scope='last_prompt_token', not {c3po.surrogate!r} "
            f"at {c3po.scope!r}. Use transformers for the others."
        )
    if c3po.alpha is None or no_harm:
        raise UnsupportedCallError(
            "c3po in vLLM does not read the neighbours' answers, so it can neither search alpha nor tell whether the "
            "result helps: give alpha a number, and the spec no_harm=false."
        )
    if c3po.embedder is not None or c3po.references.embedder_name != "model":
        raise UnsupportedCallError("c3po in vLLM takes reference sets that were embedded by the model itself.")
    usable = c3po.references.manifest["counts"]["records" if c3po.use == "all" else "correct"]
    if c3po.eps is None and c3po.k > usable:
        raise ConfigError(f"c3po.k={c3po.k}, and this reference set has {usable} usable references. Use a smaller k.")
    if fingerprint:
        c3po.references.check_model(fingerprint)
    for layer in range(c3po.first_layer(len(sizes)), len(sizes)):
        if scorings[layer] not in INVERSES:
            raise UnsupportedCallError(f"c3po sets scores, and those of layer {layer} have no inverse.")
        if isinstance(c3po.core_experts, int) and c3po.core_experts > sizes[layer]:
            raise ConfigError(f"c3po.core_experts={c3po.core_experts}, and layer {layer} has {sizes[layer]} experts.")


def look_up(held: Held, hidden: Tensor, seen: Tensor, layers: list[Layer]) -> bool:
    """Whether the last prompt token is to be read again, with the logits that neighbours suggest.

    Args:
        hidden: `[n, D]` fp32, of the prompt's tokens in a forward. seen: `[L, W, E]` router logits of watched tokens.
    """
    _, count, before = held.rows
    ends = before + count == held.prompt
    body = hidden[: count - ends].sum(0)  # [D]
    held.total = body if held.total is None else held.total + body
    if not ends:
        return False
    if held.watched is None:
        return True  # more prompts end here than are watched
    pooled = (held.total + hidden[-1]) / held.prompt
    held.override, facts = override_logits(held.wanted.c3po, layers, seen[:, held.watched], pooled)
    held.facts |= facts
    held.read, held.first = True, held.wanted.c3po.first_layer(len(layers))
    return held.override is not None


def override_logits(
    c3po: Any, layers: list[Layer], router_logits: Tensor, pooled: Tensor
) -> tuple[Tensor | None, dict[str, Any]]:
    """Router logits `[L, E]` for the last prompt token, or None where too few references are near.

    Args:
        router_logits: `[L, E]` fp32, what the token's routers gave. pooled: `[D]` mean hidden state of the prompt.

    Returns:
        The logits, and facts for the report.
    """
    sizes = [layer.size for layer in layers]
    omega = torch.zeros_like(router_logits)[None]  # [1, L, E]
    for layer in layers:
        own = router_logits[layer.index, : layer.size]
        omega[0, layer.index, : layer.size] = raw_scores(layer.rule.scoring, own, None)
    asked = SimpleNamespace(no_harm=False, sites=layers, tokenizer=None)
    near = ask(c3po, asked, None, SimpleNamespace(pooled=lambda: pooled[None]), omega)  # type: ignore[arg-type]
    facts = {"neighbours": near.describe(0)}
    if not bool(near.weights[0].any()):
        return None, {**facts, "outcome": "skipped: too few references are near enough"}
    core = core_experts(omega, sizes, c3po.first_layer(len(layers)), c3po.core_experts)
    mean = torch.where(core, mean_pathway(near.weights, near.pathways(omega)), omega)
    value = c3po.alpha * omega + (1 - c3po.alpha) * mean
    logits = torch.zeros_like(router_logits)
    for layer in layers:
        scores = value[0, layer.index, : layer.size]
        if layer.rule.scoring in INVERSES:
            logits[layer.index, : layer.size] = logits_of(layer.rule.scoring, scores)
    return logits, {**facts, "outcome": "accepted"}
