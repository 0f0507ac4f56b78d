"""Writes docs/families.md from what the family matrix found."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.families.expected import CHECKS, EXPECTED, REFUSED

COMMAND = "pytest tests/families --families-table docs/families.md"


class Results:
    """Outcome of each (family, check), reasons for dashes, facts about families."""

    def __init__(self) -> None:
        self.outcomes: dict[tuple[str, str], set[str]] = defaultdict(set)
        self.reasons: dict[tuple[str, str], list[str]] = defaultdict(list)
        self.remarks: dict[tuple[str, str], list[str]] = defaultdict(list)
        self.facts: dict[str, dict[str, Any]] = defaultdict(dict)

    def add(self, family: str, check: str, outcome: str, notes: list[dict[str, Any]]) -> None:
        self.outcomes[family, check].add(outcome)
        for note in notes:  # not to be changed: under pytest-xdist it is on its way to the controller
            self.facts[family].update({k: v for k, v in note.items() if k not in ("reason", "remark")})
            for kind, said in (("reason", self.reasons), ("remark", self.remarks)):
                text = note.get(kind)
                if text and text not in said[family, check]:
                    said[family, check].append(text)

    def cell(self, family: str, check: str, numbers: dict[str, int]) -> str:
        """✓ for what passed, – with a number for what cannot be, ✗ for a failure."""
        outcomes = self.outcomes.get((family, check), set())
        if not outcomes:
            return "not run"
        if "failed" in outcomes:
            return "✗"
        reasons, remarks = (said.get((family, check), []) for said in (self.reasons, self.remarks))
        marks = [str(numbers.setdefault(text, len(numbers) + 1)) for text in (*reasons, *remarks)]
        sign = "–" if reasons else "✓"
        return f"{sign} [{', '.join(marks)}]" if marks else sign


def _row(*cells: Any) -> str:
    return "| " + " | ".join(str(c) for c in cells) + " |"


def _head(*names: str) -> list[str]:
    return [_row(*names), _row(*["---"] * len(names))]


def _rule(facts: dict[str, Any]) -> str:
    parts = [facts["scoring"]]
    if facts["renormalises"]:
        parts.append("renormalised")
    if facts["scaling"] != 1:
        parts.append(f"x {facts['scaling']:g}")
    return ", ".join(parts)


def render(results: Results) -> str:
    """The whole page."""
    lines = [
        "# Model families",
        "",
        f"Written by `{COMMAND}`; do not edit. A tiny random model of each family in transformers "
        f"{transformers.__version__} (torch {torch.__version__.partition('+')[0]}, CPU).",
        "",
        "A family that is not listed is probed in the same way: its MoE layers are found by structure, and how it "
        "scores, renormalises and scales is measured on sixteen tokens. `ttrouting sites --model NAME` shows it.",
        "",
        "## What was found",
        "",
        "E experts to choose from, K per token, in the tiny model; the factor is the tiny config's. *Edited in*: "
        "the precision in which a bf16 model's router logits are edited. Top-k on raw logits with a softmax over the "
        "chosen counts as a renormalised softmax, which it equals; *other* is no rule from one logit to one weight: "
        "everything works there but C3PO's override.",
        "",
        *_head("family", "class", "routers", "E, K", "weights", "edited in", "experts implementations"),
    ]
    for family in EXPECTED:
        facts = results.facts.get(family)
        if not facts or not {"class", "dtype", "implementations"} <= set(facts):  # a run of some tests only
            lines.append(_row(f"`{family}`", *["not run"] * 6))
            continue
        lines.append(
            _row(
                f"`{family}`",
                f"`{facts['class']}`",
                f"`{facts['routers']}`",
                f"{facts['experts']}, {facts['top_k']}",
                _rule(facts),
                facts["dtype"],
                ", ".join(facts["implementations"]),
            )
        )
    lines += ["", "## Checks", ""]
    lines += [f"- **{name}**: {what}." for name, what in CHECKS.items()]
    lines += [
        "",
        "✓ passed, – refused or not possible; numbers are explained below the table.",
        "",
        *_head("family", *CHECKS),
    ]
    numbers: dict[str, int] = {}
    for family in EXPECTED:
        lines.append(_row(f"`{family}`", *(results.cell(family, check, numbers) for check in CHECKS)))
    lines += ["", *(f"{number}. {reason}" for reason, number in numbers.items())]
    lines += ["", "## Limits", "", "What `Site.limits` says; each is asserted by the tests.", ""]
    for family in EXPECTED:
        facts = results.facts.get(family, {})
        lines += [f"- `{family}`: {limit}." for limit in facts.get("limits", [])]
        lines += [f"- `{family}` in bf16: {limit}." for limit in facts.get("bf16_limits", [])]
    lines += ["", "## Refused", ""]
    for family in REFUSED:
        lines.append(f"- `{family}`: {results.facts.get(family, {}).get('refused', 'not run')}")
    return "\n".join(lines) + "\n"


def write(results: Results, path: Path) -> None:
    """Write the page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(results))
