"""A prompt is read once, and `generate` goes on from it: the same numbers as where it reads the prompt itself."""

import copy
from inspect import signature

import pytest
import torch
from torch import Tensor

import ttrouting as ttr
from oracles.double import build_double

pytestmark = pytest.mark.usefixtures("true_double")
NEW = 4
# plain caches, sliding windows, latent keys, states of Mamba, short convolutions and gated delta rules
FAMILIES = ["olmoe", "mixtral", "deepseek_v3", "gemma4_text", "jamba", "nemotron_h", "lfm2_moe", "qwen3_next"]
LOOSE = {"nemotron_h": 1e3}  # fp32 inside its recurrence: a prompt in two parts differs from one in its own cache too
CALL = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, "max_new_tokens": NEW}


def tensors(value):
    """Every tensor with an axis among nested attributes, with its name."""
    if isinstance(value, Tensor) and value.dim():
        yield "", value
    for name, inner in value.items() if isinstance(value, dict) else ():
        yield from ((f"{name} {deeper}", tensor) for deeper, tensor in tensors(inner))


def positions(model, mask):
    known = "position_ids" in signature(model.forward).parameters
    return {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)} if known else {}


@pytest.fixture
def handed(monkeypatch):
    """`handed(model)`: a list that gets a copy of each cache that is given to `generate`."""

    def watch(model):
        original, seen = model.generate, []

        def generate(**arguments):
            seen.append(copy.deepcopy(arguments.get("past_key_values")))
            return original(**arguments)

        monkeypatch.setattr(model, "generate", generate)
        return seen

    return watch


def run(model, strategy, ids, no_harm=True, tokenizer=None, **call):
    name = strategy.name
    with ttr.adapt(model, strategy, no_harm=no_harm, tokenizer=tokenizer) as adapted:
        out = adapted.generate(ids, attention_mask=(ids != 0).long(), **CALL, **call)
        notes = [s.strategies[name] for s in adapted.report.sequences]
        return out, adapted.state.tensors[name], notes


def plain(note):
    """What a report says of the fit, without milliseconds."""
    words, numbers = [], []
    for key in sorted(note):
        value = note[key]
        if isinstance(value, float):
            numbers.append(value)
        elif key == "curve":
            numbers += value
        elif key not in ("milliseconds", "adaptations"):
            words.append((key, value))
    return words, numbers


def check_both_ways(model, strategy, ids, monkeypatch, seen, loose=1.0, **how):
    """Handed over, and read by `generate` itself."""
    short, state, notes = run(model, strategy, ids, **how)
    monkeypatch.setattr("ttrouting.adaptive.can_hand_over", lambda *_: False)
    long, expected, others = run(model, strategy, ids, **how)
    assert [cache is None for cache in seen] == [False, True]
    for name, value in state.items():
        torch.testing.assert_close(value, expected[name], atol=1e-7 * loose, rtol=0)
    for mine, other in zip(notes, others, strict=True):
        assert plain(mine)[0] == plain(other)[0]
        assert plain(mine)[1] == pytest.approx(plain(other)[1], abs=1e-6 * loose)
    assert torch.equal(short.sequences, long.sequences)
    torch.testing.assert_close(short.logits, long.logits, atol=1e-5 * loose, rtol=1e-5)
    return notes


@pytest.mark.parametrize(("family", "layers"), [("olmoe", "all"), *((family, "last:1") for family in FAMILIES)])
def test_rerouting_over_the_hand_over_equals_rerouting_without(family, layers, prompts, monkeypatch, handed):
    """With `last:1` the cache of the upper layer is renewed by a replay, that of those below stays."""
    model = build_double(family)
    seen = handed(model)
    strategy = ttr.Rerouting(steps=2, lr=0.3, layers=layers, interval=None, kl_limit=50.0)
    how = {"no_harm": False, "loose": LOOSE.get(family, 1.0)}
    notes = check_both_ways(model, strategy, prompts(24, 19, seed=2), monkeypatch, seen, **how)
    assert [note["outcome"] for note in notes] == ["accepted"] * 2


@pytest.mark.parametrize("scope", ["last_prompt_token", "all"])
@pytest.mark.parametrize("family", ["mixtral", "jamba"])
def test_c3po_over_the_hand_over_equals_c3po_without(family, scope, prompts, monkeypatch, handed, tokenizer):
    model = build_double(family)
    seen = handed(model)
    labels = ("ab", "cde")
    strategy = ttr.C3PO(surrogate="oracle", labels=labels, steps=2, lr=0.1, layers="last:1", scope=scope)
    how = {"no_harm": False, "tokenizer": tokenizer}
    notes = check_both_ways(model, strategy, prompts(14, 9, seed=2), monkeypatch, seen, **how)
    assert [note["outcome"] for note in notes] == ["accepted"] * 2


def check_cache(model, cache, ids, delta, loose=1.0):
    """All of it is what a prefill under these deltas gives."""
    mask = (ids != 0).long()[:, :-1]
    with ttr.adapt(model, ttr.StaticRouting(delta=delta)) as adapted, torch.no_grad():
        fresh = adapted(ids[:, :-1], attention_mask=mask, use_cache=True, **positions(model, mask)).past_key_values
    assert len(cache.layers) == len(fresh.layers)
    found = 0
    for layer, (mine, theirs) in enumerate(zip(cache.layers, fresh.layers, strict=True)):
        assert type(mine) is type(theirs)
        assert mine.get_seq_length() == theirs.get_seq_length() if hasattr(mine, "get_seq_length") else True
        for (name, a), (other, b) in zip(tensors(vars(mine)), tensors(vars(theirs)), strict=True):
            assert name == other
            assert a.shape == b.shape
            if a.dim() == 4 and a.shape[2] == mask.shape[1]:  # keys and values; what stands at padding is not read
                a, b = (t.transpose(1, 2)[mask.bool()] for t in (a, b))
            torch.testing.assert_close(a, b, atol=1e-8 * loose, rtol=0, msg=f"{name} of layer {layer}")
            found += a.numel()
    assert found


@pytest.mark.parametrize(("family", "layers"), [("olmoe", "all"), *((family, "last:2") for family in FAMILIES)])
def test_where_some_rows_took_their_delta_back_the_cache_is_that_of_the_final_deltas(family, layers, prompts, handed):
    model = build_double(family)
    seen = handed(model)
    ids = prompts(24, 20, 24, 18, 22, 24, seed=4)
    few = torch.ones_like(ids)
    few[1, 15:] = 0  # under sixteen loss tokens: skipped
    strategy = ttr.Rerouting(steps=2, lr=0.03, layers=layers, interval=None, kl_limit=50.0)
    _, state, notes = run(model, strategy, ids, loss_mask=few)
    told = [note["outcome"].split(":")[0] for note in notes]
    assert told[1] == "skipped"
    (cache,) = seen
    assert "accepted" in told, "generate reads the prompt itself: choose another seed"
    check_cache(model, cache, ids, state["delta"], LOOSE.get(family, 1.0))
    assert not state["delta"][1].any()


@pytest.fixture(scope="module")
def folder(references):
    return references("mixtral")  # made before a test runs in double precision


def test_the_same_for_a_delta_from_neighbours(folder, tokenizer, handed):
    model = build_double("mixtral")
    seen = handed(model)
    prompts = ["what is it", "a b c d e", "(((", "klmnop", "hello"]
    ids = tokenizer(prompts, return_tensors="pt", padding=True)["input_ids"]
    strategy = ttr.C3PO(folder, scope="all", k=2, steps=2, use="all", layers="last:2")
    _, state, notes = run(model, strategy, ids, tokenizer=tokenizer)
    assert len({note["outcome"].split(":")[0] for note in notes}) == 2, "one outcome for all: the test cannot tell"
    check_cache(model, seen[0], ids, torch.where(state["on"][:, None, None], state["value"], 0))


def test_the_override_is_not_in_the_cache_that_is_handed_over(folder, tokenizer, handed):
    """It is put in when `generate` reads the last prompt token: the cache is the base model's."""
    model = build_double("mixtral")
    seen = handed(model)
    ids = tokenizer(["what is it", "a b c d e"], return_tensors="pt", padding=True)["input_ids"]
    run(model, ttr.C3PO(folder, k=2, steps=2, use="all"), ids, no_harm=False, tokenizer=tokenizer)
    check_cache(model, seen[0], ids, torch.zeros(4, 8))


@pytest.mark.parametrize(
    "call",
    [
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 5},
    ],
    ids=str,
)
def test_where_generate_has_ways_of_its_own_nothing_is_handed_over(prompts, handed, call):
    model = build_double("olmoe")
    seen = handed(model)
    run(model, ttr.Rerouting(steps=1, lr=0.1, interval=None), prompts(24, 19), no_harm=False, **call)
    assert seen == [None]
    run(model, ttr.Rerouting(steps=1, lr=0.1, interval=None), prompts(24, 19), no_harm=False)
    assert seen[1] is not None
