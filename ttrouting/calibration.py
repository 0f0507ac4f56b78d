"""Find the threshold of dynamic-k that meets a requested mean number of experts on given text.

Legend: `N` tokens, `L` layers, `E` experts, `K` per token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ttrouting.context import Context
from ttrouting.errors import ConfigError, UnsupportedModelError
from ttrouting.gradients import check_gradients
from ttrouting.objective import divergence, log_probabilities, token_losses
from ttrouting.plan import Plan
from ttrouting.rows import Rows
from ttrouting.session import Session
from ttrouting.sites import Site, find_sites
from ttrouting.taps import Call
from ttrouting.target import Target
from ttrouting.texts import text_contexts

if TYPE_CHECKING:
    from ttrouting.strategies.dynamic_k import DynamicK

# the option that a rule is calibrated by, and whether a larger value keeps more experts
KNOB = {
    "top_p": ("p", True),
    "entropy": ("p", True),
    "relative": ("beta", False),
    "sensitivity": ("threshold", False),
}
PLACES = 64  # tokens of a text, evenly spaced, whose next-token distributions are compared


def calibrate(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    mean_k: float,
    rule: str = "top_p",
    tolerance: float = 0.02,
    **options: Any,
) -> DynamicK:
    """A `DynamicK` whose mean experts per token on `texts` is `mean_k`, with what it cost there.

    Args:
        mean_k: wanted mean over tokens and layers, between `k_min` and the model's own `K`.
        rule: one of the rules of `DynamicK`. options: its other options (`k_min`, `gate`, `renormalize` ...).
        tolerance: largest accepted distance from `mean_k`.

    Returns:
        The strategy, its `calibration` filled in (mean k reached, KL to the base model).

    Raises:
        ConfigError: no text, or a mean that this rule cannot reach (the range is named).
    """
    from ttrouting.strategies.dynamic_k import Calibration, DynamicK

    if not texts:
        raise ConfigError("calibrate needs at least one text.")
    target = Target(model, find_sites(model))
    contexts = list(text_contexts(model, tokenizer, texts))
    knob, rising = KNOB.get(rule, ("", True))
    if rule == "sensitivity":
        options["sensitivity"] = layer_sensitivity(target, contexts)
    draft = DynamicK(rule=rule, **options)  # checks rule and options

    def with_value(value: float) -> DynamicK:
        change: dict[str, Any] = {knob: value}
        return dataclasses.replace(draft, **change)

    low, high = 1e-6, 1.0
    if rule == "sensitivity":
        high = _largest_threshold(draft, target)
    few, many = (_measure(target, contexts, with_value(v)) for v in ((low, high) if rising else (high, low)))
    if not few - tolerance <= mean_k <= many + tolerance:
        raise ConfigError(
            f"mean_k={mean_k:g} cannot be reached by {rule} here: it gives {few:.2f} to {many:.2f} experts per token "
            "with these options. Ask for a mean in that range, or lower k_min."
        )
    value, reached = low, few
    for _ in range(40):
        value = (low + high) / 2
        reached = _measure(target, contexts, with_value(value))
        if abs(reached - mean_k) <= tolerance:
            break
        if (reached < mean_k) == rising:
            low = value
        else:
            high = value
    kls = _divergences(target, contexts, with_value(value))
    means = torch.tensor([_measure(target, [context], with_value(value)) for context in contexts])
    record = Calibration(
        mean_k=reached,
        k_low=float(means.quantile(0.05)),
        kl=float(kls.mean()),
        kl_high=float(kls.quantile(0.95)),
        tokens=sum(int(c.mask.sum()) for c in contexts),
        fingerprint=target.fingerprint,
    )
    return dataclasses.replace(with_value(value), calibration=record)


def _largest_threshold(draft: DynamicK, target: Target) -> float:
    """A threshold above which even weight 1 (times scaling) is dropped in every layer."""
    largest = max(site.rule.scaling for site in target.sites)
    return 1.01 * max(draft.sensitivity or (1.0,)) * largest**2


def _measure(target: Target, contexts: list[Context], strategy: DynamicK) -> float:
    """Mean experts per token and layer, with the strategy live (what it drops changes later layers)."""
    kept, tokens = 0, 0

    def observe(site: Site, call: Call, ids: Tensor, weights: Tensor, rows: Rows) -> None:
        nonlocal kept, tokens
        valid = rows.valid.flatten().to(weights.device)
        kept += int(((weights != 0).sum(1) * valid).sum())
        tokens += int(valid.sum())

    for context in contexts:
        session = _session(target, context, strategy)
        session.observers.append(observe)
        with torch.no_grad(), session.installed():
            session.read(context, context.ids.new_tensor([context.ids.shape[1] - 1]))
    return kept / tokens


def _divergences(target: Target, contexts: list[Context], strategy: DynamicK) -> Tensor:
    """KL(base || dynamic) of the next token, `[texts * PLACES]` or fewer.

    At tokens all over a text and not at its end alone: most texts end where nothing is left to say, and what is
    certain there tells nothing of a prompt whose answer is open.
    """
    found = []
    for context in contexts:
        length = context.ids.shape[1]
        keep = torch.linspace(0, length - 1, min(length, PLACES), device=context.ids.device).long()
        session = _session(target, context, strategy)
        with torch.no_grad(), session.installed():
            thinned = log_probabilities(session.read(context, keep).logits[0], context)  # [places, V]
            with session.without(*session.runs):
                base = log_probabilities(session.read(context, keep).logits[0], context)
        found.append(divergence(base, thinned))
    return torch.cat(found).clamp_min(0)


def _session(target: Target, context: Context, *strategies: DynamicK) -> Session:
    return Session(Plan(target, strategies, None), context.mask, context.ids[:, 0])


def _keep_output(outputs: dict[int, Tensor], index: int, _module: Any, _inputs: Any, out: Tensor) -> Tensor:
    outputs[index] = out if out.requires_grad else out.detach().requires_grad_(True)
    return outputs[index]


def layer_sensitivity(target: Target, contexts: Sequence[Context]) -> tuple[float, ...]:
    """`H_l`: mean squared gradient of the loss with respect to each MoE output, normalised to mean 1.

    (AdapMoE.) One forward and backward per text.

    Raises:
        UnsupportedModelError: a kernel without a backward pass is in the way.
    """
    check_gradients("dynamic_k.rule='sensitivity'", target)
    totals = torch.zeros(len(target.sites), dtype=torch.float64)
    tokens = 0
    for context in contexts:
        session = _session(target, context)
        outputs: dict[int, Tensor] = {}
        handles = []
        for site in target.sites:
            module = site.experts if site.experts is not None else site.block

            handles.append(module.register_forward_hook(partial(_keep_output, outputs, site.index)))
        try:
            with torch.enable_grad(), session.installed():
                losses, _ = token_losses(session, context)
                ordered = [outputs[s.index] for s in target.sites]
                gradients = torch.autograd.grad(losses.sum() / context.targets.sum(), ordered)
        except RuntimeError as error:
            raise UnsupportedModelError(
                f"Sensitivities need a backward pass through {type(target.model).__name__}: {error}. Use another "
                "rule, or load the model unquantised."
            ) from error
        finally:
            for handle in handles:
                handle.remove()
        for index, gradient in enumerate(gradients):
            totals[index] += float(gradient.double().pow(2).sum())
        tokens += int(context.mask.sum())
    means = totals / max(tokens, 1)
    return tuple((means / means.mean().clamp_min(1e-30)).clamp_min(1e-12).tolist())
