"""How a router turns logits into scores, and how it turns scores into mixing weights.

Legend: `N` tokens, `E` experts to choose from, `K` experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SCORINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda z: z.softmax(-1),
    "sigmoid": lambda z: z.sigmoid(),
    "sqrt_softplus": lambda z: torch.nn.functional.softplus(z).sqrt(),
}
# the logits that have these scores; of softmax's, which are known up to a constant, the log
INVERSES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda s: s.log(),
    "sigmoid": lambda s: s.logit(),
    "sqrt_softplus": lambda s: s.square().expm1().log(),
}
SMALLEST = 1e-7  # a score of 0 has no finite logit


@dataclass(frozen=True)
class WeightRule:
    """`w = scaling * scale_e * pi_e`, divided by the sum over the chosen K if `renormalises`.

    Attributes:
        scoring: name in `SCORINGS`; `"choice"` where the scores handed to the top-k are the scores
            (a soft-cap sits in between); `"other"` where no rule was found.
        renormalises: whether the weights depend on which experts are chosen together.
        scaling: constant factor (`routed_scaling_factor` in many configs).
    """

    scoring: str
    renormalises: bool
    scaling: float


def raw_scores(scoring: str, logits: Tensor, choice: Tensor | None) -> Tensor:
    """The family's own scores before bias, `[N, E]`; softmax where the rule is not known."""
    if scoring == "choice" and choice is not None:
        return choice
    return SCORINGS.get(scoring, SCORINGS["softmax"])(logits)


def logits_of(scoring: str, scores: Tensor) -> Tensor:
    """Router logits that the family scores as `scores [..., E]`; `scoring` must be in `INVERSES`."""
    highest = 1 - SMALLEST if scoring == "sigmoid" else None
    return INVERSES[scoring](scores.clamp(SMALLEST, highest))


def probabilities(scoring: str, logits: Tensor, choice: Tensor | None) -> Tensor:
    """`pi [N, E]`, non-negative and summing to 1: sigmoid-like scores are divided by their sum.

    With raw sigmoids a share such as "p = 1" would not mean "keep everything".
    """
    scores = raw_scores(scoring, logits, choice)
    if scoring in ("softmax", "other"):
        return scores
    scores = scores.clamp_min(0)
    return scores / scores.sum(-1, keepdim=True).clamp_min(1e-20)


def infer_weight_rule(
    logits: Tensor, choice: Tensor | None, ids: Tensor, weights: Tensor, tolerance: float
) -> WeightRule:
    """Find the rule that explains observed weights.

    Args:
        logits: `[N, E]` router logits. choice: `[N, E]` scores handed to the top-k, or None.
        ids: `[N, K]` chosen experts. weights: `[N, K]` their weights, any per-expert scale divided out.
        tolerance: largest relative spread of `w / predicted` that still counts as constant.
    """
    candidates = {name: f(logits) for name, f in SCORINGS.items()}
    if choice is not None:
        candidates["choice"] = choice
    fits: list[tuple[float, WeightRule]] = []
    for name, scores in candidates.items():
        chosen = scores.gather(-1, ids)  # [N, K]
        total = chosen.sum(-1, keepdim=True)
        for renormalises, predicted in ((False, chosen), (True, chosen / total)):
            known = predicted.abs() > 1e-6
            if not known.any():
                continue
            ratio = (weights / predicted)[known]
            centre = float(ratio.median())
            if not 0 < centre < float("inf"):
                continue
            spread = float((ratio / centre - 1).abs().max())
            if spread < tolerance:
                constant = 1.0 if abs(centre - 1) < tolerance else float(f"{centre:.6g}")
                fits.append((spread, WeightRule(name, renormalises, constant)))
    if not fits:
        return WeightRule("other", renormalises=False, scaling=1.0)
    # several rules can fit to rounding (softmax and "choice" often are one): take the first such
    good = max(4 * min(spread for spread, _ in fits), tolerance / 100)
    return next(rule for spread, rule in fits if spread <= good)
