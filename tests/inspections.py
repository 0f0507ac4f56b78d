"""Traces and inspections of random numbers, for tests of what shows them."""

import torch

from ttrouting.inspection.record import Inspection, NextToken
from ttrouting.report import Report, SequenceReport
from ttrouting.trace import RoutingTrace

T, L, E, K = 12, 3, 8, 3
WORDS = ["Ab", "cd\n", " <i>", "</script>", "\t", "é", "x", "y", "z", " end", "[b]", ":smile:"]


def made(seed, tokens=T, layers=L, experts=E, k=K, drop=0.0, words=None):
    """A random trace whose text and layers are the same for all seeds."""
    generator = torch.Generator().manual_seed(seed)
    pi = torch.randn(tokens, layers, experts, generator=generator).softmax(-1)
    weights, ids = pi.topk(k, -1)
    gone = torch.rand(ids.shape, generator=generator) < drop
    return RoutingTrace.from_arrays(
        ids.masked_fill(gone, -1),
        weights.masked_fill(gone, 0),
        torch.special.entr(pi).sum(-1),
        num_experts=experts,
        tokens=words or [WORDS[t % len(WORDS)] for t in range(tokens)],
        layers=[f"model.layers.{i}.mlp" for i in range(layers)],
        prompt_tokens=tokens - 2,
    )


def inspection(**options):
    phases = [{"curve": [2.5, 2.25, float("nan")], "loss_after": 2.0, "outcome": "accepted"}]
    sequence = SequenceReport(T, 2, {"rerouting": {"outcome": "accepted", "adaptations": phases}}, 3.0, [3.0] * L)
    likely = (NextToken(" a", 0.25, 0.5), NextToken("<b>", 0.125, 0.0625))
    report = Report([sequence], ["x"] * L, [K] * L, {"total": 1.0})
    return Inspection("a <title>", made(0, **options), made(1, drop=0.2, **options), likely, report)
