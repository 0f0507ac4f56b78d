"""A model that transformers does not know: found by structure, its scoring measured.

Legend: `N` tokens, `E` experts, `K` per token.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ttrouting as ttr

E, K, WIDTH = 6, 2, 16
CAP = 1.5
RULES = {
    # name: (logits -> scores, renormalised, factor, bias on the choice; what is to be found)
    "softmax": (lambda z: z.softmax(-1), False, 1.0, False, "softmax"),
    "softmax, renormalised": (lambda z: z.softmax(-1), True, 1.0, False, "softmax"),
    "sigmoid with bias": (torch.sigmoid, False, 0.7, True, "sigmoid"),
    "sigmoid with bias, renormalised": (torch.sigmoid, True, 3.2, True, "sigmoid"),
    "root of softplus": (lambda z: F.softplus(z).sqrt(), True, 1.0, True, "sqrt_softplus"),
    "soft-capped": (lambda z: (CAP * torch.tanh(z / CAP)).softmax(-1), False, 1.0, False, "choice"),
    "squared softmax with bias": (lambda z: z.softmax(-1) ** 2, False, 1.0, True, "other"),
}


class Gate(nn.Module):
    def __init__(self, rule: str) -> None:
        super().__init__()
        self.score, self.renormalised, self.factor, self.biased, _ = RULES[rule]
        self.projection = nn.Linear(WIDTH, E)
        self.correction = nn.Parameter(0.3 * torch.randn(E))

    def choose(self, logits):
        scores = self.score(logits)
        ids = (scores + self.correction * self.biased).topk(K, sorted=False).indices
        weights = scores.gather(-1, ids)
        if self.renormalised:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights * self.factor, ids

    def forward(self, hidden):
        return self.choose(self.projection(hidden))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, WIDTH, WIDTH) / WIDTH**0.5)

    def forward(self, hidden, ids, weights):
        made = torch.einsum("nh,ehd->ned", hidden, self.weight)  # [N, E, H]
        return (weights[..., None] * made.gather(1, ids[..., None].expand(-1, -1, WIDTH))).sum(1)


class Block(nn.Module):
    def __init__(self, rule: str) -> None:
        super().__init__()
        self.gate, self.experts = Gate(rule), Experts()

    def forward(self, hidden):
        flat = hidden.flatten(0, 1)
        weights, ids = self.gate(flat)
        return hidden + self.experts(flat, ids, weights).view_as(hidden)


class Unlisted(nn.Module):
    """Two MoE blocks around nothing."""

    def __init__(self, rule: str) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="never_seen", vocab_size=50, hidden_size=WIDTH)
        self.embedding = nn.Embedding(50, WIDTH)
        self.blocks = nn.ModuleList(Block(rule) for _ in range(2))
        self.head = nn.Linear(WIDTH, 50)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, use_cache=False):
        hidden = self.embedding(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_rule_is_measured_and_a_delta_follows_it(rule):
    torch.manual_seed(0)
    model = Unlisted(rule).eval()
    ids = torch.randint(0, 50, (2, 9))
    sites = ttr.find_sites(model)
    _, renormalised, factor, _, scoring = RULES[rule]
    assert [site.name for site in sites] == ["blocks.0", "blocks.1"]
    for site in sites:
        assert (site.num_experts, site.top_k) == (E, K)
        assert site.scoring == scoring
        if scoring != "other":
            assert site.renormalises == renormalised
            assert site.rule.scaling == pytest.approx(factor, rel=1e-4)
    delta = torch.randn(2, 2, E)
    base = model(ids)
    with ttr.adapt(model, ttr.StaticRouting(delta=torch.zeros(2, E))) as adapted:
        assert torch.equal(adapted(ids), base)
    with ttr.adapt(model, ttr.StaticRouting(delta=delta)) as adapted:
        moved = adapted(ids)
    hidden = model.embedding(ids)
    for layer, block in enumerate(model.blocks):
        flat = hidden.flatten(0, 1)
        logits = flat @ block.gate.projection.weight.T + block.gate.projection.bias
        weights, chosen = block.gate.choose(logits + delta[:, layer].repeat_interleave(9, 0))
        hidden = hidden + block.experts(flat, chosen, weights).view_as(hidden)
    torch.testing.assert_close(moved, model.head(hidden), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(moved, base, atol=1e-2)
