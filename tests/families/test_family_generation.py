"""Generation under a delta: the cache holds what a full recompute would give, in padded batches too."""

from __future__ import annotations

import pytest
import torch

import ttrouting as ttr
from tests.families.expected import EXPECTED
from tests.families.harness import random_delta, read, tokens
from tests.oracles.double import InDouble

NEW = 4
every_family = pytest.mark.parametrize("family", EXPECTED)


def refused_without_head(family, tiny, expected, note):
    """Models that cannot generate say so, and what to do instead."""
    adapted = ttr.adapt(tiny, ttr.StaticRouting(delta=random_delta(expected, None)))
    with adapted, pytest.raises(ttr.UnsupportedCallError, match=r"cannot generate .*call the adapted model"):
        adapted.generate(tokens())
    with pytest.raises(ttr.UnsupportedModelError, match="no causal language-model head"):
        ttr.adapt(tiny, ttr.Rerouting())
    note(
        "a token classifier, not causal: generate and rerouting are refused"
        if expected.head == "classifier"
        else "the text backbone has no language-model head: generate and rerouting are refused"
    )


def eager(tiny, expected):
    if expected.implementations != ("eager",):
        tiny.set_experts_implementation("eager")  # grouped_mm takes no fp64 on the CPU
    return tiny


def generate(adapted, ids, mask):
    out = adapted.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences, torch.stack(out.logits, 1)  # [B, T + NEW], [B, NEW, V]


def error(model, text, logits, pad=0, row=slice(None)):
    """Largest difference between cached logits and those of a full recompute, relative to the largest logit."""
    full = read(model, text[row, pad:-1])[:, -NEW:]
    return float((logits[row] - full).abs().max() / full.abs().max())


def limit(own):
    """What is allowed where the model's own cache is off by `own` (fp32 inside MiniMax and Nemotron-H)."""
    assert own < 1e-3, "the model's own cache is wrong"
    return max(1e-10, 20 * own)


@pytest.mark.check("generate")
@every_family
@torch.no_grad()
def test_cached_generation_equals_full_recompute(family, model, note):
    expected = EXPECTED[family]
    if not expected.generates:
        refused_without_head(family, model(family), expected, note)
        return
    tiny, ids = eager(model(family, torch.float64), expected), tokens()
    with InDouble():
        base_text, base = generate(tiny, ids, torch.ones_like(ids))
        with ttr.adapt(tiny, ttr.StaticRouting(delta=random_delta(expected))) as adapted:
            text, logits = generate(adapted, ids, torch.ones_like(ids))
            assert error(adapted, text, logits) < limit(error(tiny, base_text, base))
    assert (logits[:, 0] - base[:, 0]).abs().max() > 1e-3 * base.abs().max(), "the delta changed nothing"


@pytest.mark.check("padding")
@every_family
@torch.no_grad()
def test_left_padded_rows_equal_rows_alone(family, model, note):
    expected = EXPECTED[family]
    if not expected.generates:
        refused_without_head(family, model(family), expected, note)
        return
    tiny, text = eager(model(family, torch.float64), expected), tokens()
    pads = (0, 5)
    ids = text.clone()
    ids[1, :5] = 0
    mask = (ids != 0).long()
    delta = random_delta(expected)
    with InDouble():
        base_text, base = generate(tiny, ids, mask)
        own = [error(tiny, base_text, base, pad, slice(row, row + 1)) for row, pad in enumerate(pads)]
        if not expected.left_padding:
            assert own[1] > 1e-3, "it can do left padding after all"
            note("the model itself gives other logits to a left-padded row")
            return
        with ttr.adapt(tiny, ttr.StaticRouting(delta=delta)) as adapted:
            text, logits = generate(adapted, ids, mask)
        for row, pad in enumerate(pads):
            with ttr.adapt(tiny, ttr.StaticRouting(delta=delta[row])) as adapted:
                assert error(adapted, text, logits, pad, slice(row, row + 1)) < limit(max(own))


@pytest.mark.check("beams")
@every_family
@torch.no_grad()
def test_beams_equal_beams_without_cache(family, model, note):
    expected = EXPECTED[family]
    if not expected.generates:
        refused_without_head(family, model(family), expected, note)
        return
    tiny, ids = eager(model(family, torch.float64), expected), tokens()
    beams = {"max_new_tokens": NEW, "num_beams": 2, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    adapted = ttr.adapt(tiny, ttr.StaticRouting(delta=random_delta(expected)))
    with InDouble(), adapted:
        if not expected.beams:  # MiniMax: the states of its linear layers stay where they are
            cached, again = (tiny.generate(input_ids=ids, use_cache=use, **beams) for use in (True, False))
            assert not torch.equal(cached, again), "upstream's beam search works now: drop the refusal"
            with pytest.raises(ttr.UnsupportedCallError, match=r"beam reorder.*Use num_beams=1"):
                adapted.generate(input_ids=ids, **beams)
            note("its cache does not follow a beam reorder upstream: refused")
            return
        cached, again = (adapted.generate(input_ids=ids, use_cache=use, **beams) for use in (True, False))
    assert torch.equal(cached, again)
