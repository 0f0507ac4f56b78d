"""How does a prompt come to be inspected: traced under the strategies, and again as the model is?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ttrouting.adaptive import AdaptiveModel
from ttrouting.inspection.compare import Difference, compare
from ttrouting.report import Report
from ttrouting.trace import RoutingTrace

GREEDY: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "num_beams": 1}
LIKELY, SEEN = 10, 0.001  # next tokens of base and of adapted that are shown, if they are at least so likely


@dataclass(frozen=True)
class NextToken:
    """A token that may follow the prompt, and its probability before and after; None without strategies."""

    text: str
    before: float
    after: float | None


@dataclass(frozen=True)
class Curve:
    """One optimisation: its loss in nats before each step and after the last, and what became of it."""

    name: str
    losses: tuple[float, ...]
    outcome: str


@dataclass(frozen=True, eq=False)
class Inspection:
    """Everything that views show.

    Attributes:
        title: what was looked at. base: the model as it is. adapted: the same tokens; None without strategies.
        next_tokens: after the prompt, likeliest first. report: of the adapted call.
    """

    title: str
    base: RoutingTrace
    adapted: RoutingTrace | None = None
    next_tokens: tuple[NextToken, ...] = ()
    report: Report = field(default_factory=Report)

    @property
    def difference(self) -> Difference | None:
        """Experts gained and lost, None without strategies."""
        return None if self.adapted is None else compare(self.base, self.adapted)

    @property
    def curves(self) -> tuple[Curve, ...]:
        """The loss curve of each optimisation that the report tells of."""
        found = []
        for sequence in self.report.sequences:
            for name, facts in sequence.strategies.items():
                phases = facts.get("adaptations", [facts])
                for number, phase in enumerate(phases):
                    if "curve" in phase:
                        after = [phase["loss_after"]] if "loss_after" in phase else []
                        label = name if len(phases) == 1 else f"{name}, {number + 1} of {len(phases)}"
                        found.append(Curve(label, (*phase["curve"], *after), str(phase.get("outcome", ""))))
        return tuple(found)


def inspect_prompt(
    adapted: AdaptiveModel, tokenizer: Any, inputs: Mapping[str, Any], new_tokens: int = 0, title: str = ""
) -> Inspection:
    """Trace one prompt under the strategies, and the same tokens under the model's own routing.

    Args:
        inputs: `input_ids` and `attention_mask`, `[1, T]`. new_tokens: how many tokens to write, greedily, and to
            trace; the model's own routing then reads what the adapted model wrote.
    """
    if not adapted.strategies:
        trace, chances, _ = _generate(adapted, inputs, new_tokens)
        return Inspection(title, trace, next_tokens=_likely(tokenizer, chances, None))
    trace, after, text = _generate(adapted, inputs, new_tokens)
    report = adapted.report
    same = text[:, : len(trace.tokens)]
    with adapted.paused():
        base, before, _ = _generate(adapted, {"input_ids": same, "attention_mask": torch.ones_like(same)}, 0)
        if same.shape != inputs["input_ids"].shape:
            _, before, _ = _generate(adapted, inputs, 0)
    base = replace(base, prompt_tokens=trace.prompt_tokens)
    return Inspection(title, base, trace, _likely(tokenizer, before, after), report)


def _generate(
    adapted: AdaptiveModel, inputs: Mapping[str, Any], new_tokens: int
) -> tuple[RoutingTrace, Tensor, Tensor]:
    """The trace, the next-token distribution `[V]` after the prompt, and the text `[1, T]`."""
    with adapted.tracing() as traces:
        out = adapted.generate(
            **inputs,
            **GREEDY,
            max_new_tokens=new_tokens + 1,  # the last one is not read, and not traced
            return_dict_in_generate=True,
            output_logits=True,
        )
    return traces[0], out.logits[0][0].float().softmax(-1).cpu(), out.sequences


def _likely(tokenizer: Any, before: Tensor, after: Tensor | None) -> tuple[NextToken, ...]:
    """The likeliest tokens of both distributions `[V]`, by the last one given."""
    last = before if after is None else after
    most = min(LIKELY, len(before))
    tops = [chances.topk(most) for chances in (before, last)]
    ids = {int(i) for top in tops for n, i in enumerate(top.indices) if n == 0 or top.values[n] >= SEEN}
    ordered = sorted(ids, key=lambda i: (-float(last[i]), i))
    return tuple(
        NextToken(str(tokenizer.decode([i])), float(before[i]), None if after is None else float(after[i]))
        for i in ordered
    )
