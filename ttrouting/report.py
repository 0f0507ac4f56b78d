"""What happened in an adapted call, per sequence: every front end prints this."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class SequenceReport:
    """One sequence.

    Attributes:
        prompt_tokens, new_tokens: counts without padding and without the token that ends the sequence.
        strategies: by strategy name, what it did (loss before and after, accepted or the reason why not,
            layers adapted, experts gained and lost ...).
        experts_per_token: mean number of experts that ran for a token, over layers.
        experts_per_layer: the same for each layer.
    """

    prompt_tokens: int
    new_tokens: int
    strategies: dict[str, dict[str, Any]]
    experts_per_token: float
    experts_per_layer: list[float]


@dataclass(frozen=True)
class Report:
    """One call.

    Attributes:
        sequences: one entry each. layers: names of the MoE layers. top_k: the model's own `K` per layer.
        milliseconds: wall-clock of each phase (`adapt`, `generate`, `readapt`, `total`).
    """

    sequences: list[SequenceReport] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)
    top_k: list[int] = field(default_factory=list)
    milliseconds: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    def to_json(self) -> str:
        """The same as a JSON string."""
        return json.dumps(self.to_dict())

    def __rich__(self) -> RenderableType:
        if not self.sequences:
            return Text("No adapted call yet.")
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("sequence", "strategy", "outcome", "loss", "layers", "experts/token"):
            table.add_column(name, justify="right" if name in ("loss", "layers", "experts/token") else "left")
        for number, sequence in enumerate(self.sequences):
            experts = f"{sequence.experts_per_token:.2f} of {_mean(self.top_k):.2f}"
            rows = list(sequence.strategies.items()) or [("none", {})]
            for i, (name, facts) in enumerate(rows):
                table.add_row(
                    str(number) if i == 0 else "",
                    name,
                    str(facts.get("outcome", "applied")),
                    _change(facts.get("loss_before"), facts.get("loss_after")),
                    str(len(facts["layers"])) if "layers" in facts else "",
                    experts if i == 0 else "",
                )
        times = "  ".join(f"{name} {value:.0f} ms" for name, value in self.milliseconds.items())
        return Group(table, Text(times, style="dim"))

    def __str__(self) -> str:
        console = Console(width=100, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()


def _mean(values: list[int]) -> float:
    return sum(values) / len(values) if values else 0.0


def _change(before: float | None, after: float | None) -> str:
    return "" if before is None or after is None else f"{before:.3f} -> {after:.3f}"
