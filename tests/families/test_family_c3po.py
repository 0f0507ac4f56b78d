"""C3PO's override in every family: the wanted scores at one token, by the family's own rule, cached or not.

Legend: `B` rows, `N` tokens of a forward, `L` layers, `E` experts.
"""

from __future__ import annotations

import pytest
import torch

import ttrouting as ttr
from tests.families.expected import EXPECTED
from tests.families.harness import Look, layers, read, spy, tokens
from tests.families.test_family_generation import eager, error, generate, limit
from tests.oracles import routing
from tests.oracles.double import InDouble
from tests.oracles.routing import Place

LABELS = ("ab", "cde")
INVERSES = {
    "softmax": torch.log,
    "sigmoid": lambda s: torch.log(s / (1 - s)),
    "sqrt_softplus": lambda s: torch.log(torch.exp(s**2) - 1),
}


def strategy(labels=LABELS):
    """On the labels of the sequences: no reference set has to be built for each family."""
    options = {"surrogate": "oracle", "labels": labels, "layers": "last:2", "core_experts": 4}
    return ttr.C3PO(**options, steps=2, lr=0.1)


def refused(family, tiny, expected, tokenizer, note):
    words, reason = {
        "none": ("no causal language-model head", "the text backbone has no language-model head: C3PO is refused"),
        "classifier": ("no causal language-model head", "a token classifier, not causal: C3PO is refused"),
        "lm": (r"no inverse \(other\)\. Use rerouting", "its scores have no inverse: C3PO is refused"),
    }[expected.head]
    with pytest.raises(ttr.UnsupportedModelError, match=words):
        ttr.adapt(tiny, strategy(), tokenizer=tokenizer)
    note(reason)


def check_routing(tiny, family, ids, seen, value, at, raw):
    """All tokens of one forward by the family's rule, token `at` from the scores `value [L, E]`."""
    expected = EXPECTED[family]
    first = len(expected.layers) - 2
    for index, (layer, one) in enumerate(zip(seen, layers(tiny, family), strict=True)):
        place = Place(family, one.router, one.block, tiny.config, ids.flatten())
        logits = routing.native_logits(family, one.router, layer.hidden)
        if index >= first:
            logits[at, : expected.experts] = INVERSES[expected.scoring](value[index, : expected.experts])
            total = value[index].sum() if expected.scoring == "softmax" else 1.0
            torch.testing.assert_close(raw[index][at], value[index] / total, atol=1e-8, rtol=0)
        choice = routing.choose(place, logits)
        sure = choice.certain  # AX-K2's groups leave draws at score 0
        assert sure.all() or family == "axk2"
        dense = choice.dense(expected.experts)
        torch.testing.assert_close(layer.dense[sure], dense[sure], atol=1e-8, rtol=1e-6)


@pytest.mark.check("c3po")
@pytest.mark.parametrize("family", EXPECTED)
@torch.no_grad()
def test_override_reaches_the_experts_and_cached_generation_equals_full_recompute(family, model, tokenizer, note):
    expected = EXPECTED[family]
    if not expected.generates or expected.scoring == "other":
        refused(family, model(family), expected, tokenizer, note)
        return
    tiny, ids = eager(model(family, torch.float64), expected), tokens()
    pads = (0, 5 if expected.left_padding else 0)
    ids[1, : pads[1]] = 0
    mask = (ids != 0).long()
    with InDouble():
        raw, own = {}, None
        with ttr.adapt(tiny, strategy(), tokenizer=tokenizer) as adapted:
            text, logits = generate(adapted, ids, mask)
            state = adapted.state
            for sequence in adapted.report.sequences:
                assert sequence.strategies["c3po"]["outcome"] == "accepted"
                assert sequence.strategies["c3po"]["kl"] > 1e-8, "the override changed nothing"
        learned = state.tensors["c3po"]
        look = Look(back=lambda site, call, _ids, _weights: raw.__setitem__(site.index, call.raw_scores()))
        for row, pad in enumerate(pads):
            alone = type(state)({"c3po": {k: v[row : row + 1] for k, v in learned.items()}}, state.fingerprint)
            one = text[row : row + 1, pad:-1]
            with (
                ttr.adapt(tiny, [strategy(LABELS[:1]), look], tokenizer=tokenizer) as adapted,
                spy(tiny, family) as seen,
            ):
                full = read(adapted, one, state=alone)[:, -logits.shape[1] :]
            off = float((logits[row] - full).abs().max() / full.abs().max())
            if off > limit(0.0):  # the model's own cache may be off (fp32 inside MiniMax and Nemotron-H)
                own = own or generate(tiny, ids, mask)
                assert off < limit(error(tiny, *own, pad, slice(row, row + 1)))
            at = ids.shape[1] - pad - 1
            assert int(learned["at"][row]) == at
            check_routing(tiny, family, one, seen, learned["value"][row], at, raw)
