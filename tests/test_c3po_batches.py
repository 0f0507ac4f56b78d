"""C3PO during a call: one token is touched, every way of decoding is the same text, rows of a batch stay apart."""

import json
import random
import shutil
from contextlib import ExitStack, contextmanager

import pytest
import torch
import torch.nn.functional as F
from transformers import LogitsProcessor
from transformers.models.olmoe.modeling_olmoe import OlmoeAttention

import ttrouting as ttr
from oracles.c3po import PlainSet, overridden
from oracles.double import build_double
from oracles.plain_router import full_logits, plain_routing
from oracles.refset import forge

L, E, FIRST = 4, 8, 2
NEW = 5
DICT = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}


@pytest.fixture(scope="module")
def folder(references):
    return references("olmoe")


@pytest.fixture(scope="module")
def model(references):
    return build_double("olmoe")


def text(seed, length=9):
    return "".join(random.Random(f"batch {seed}").choice("abcdefghijklmnop (){}") for _ in range(length))


def texts(*lengths, seed=0):
    return [text(seed + i, length) for i, length in enumerate(lengths)]


def c3po(folder, **options):
    """Moves far enough that other tokens come out."""
    base = {"refset": str(folder), "use": "all", "layers": "last:2", "core_experts": 0.5, "k": 2, "steps": 3}
    return ttr.C3PO(**base | {"lr": 0.2} | options)


def adapt(model, tokenizer, strategies, no_harm=False):
    return ttr.adapt(model, strategies, no_harm=no_harm, tokenizer=tokenizer)


def batch(tokenizer, prompts):
    return dict(tokenizer(prompts, return_tensors="pt", padding=True))


def outcomes(adapted):
    return [s.strategies["c3po"]["outcome"] for s in adapted.report.sequences]


def values(adapted):
    return adapted.state.tensors["c3po"]["value"]


# --- exactly one position ---------------------------------------------------------------------------------


@contextmanager
def watched(model):
    """What the experts really run with: a list of `(hidden [N, D], ids [N, K], weights [N, K])` for each layer."""
    seen = [[] for _ in range(L)]
    with ExitStack() as stack:
        for layer, block in zip(seen, (one.mlp for one in model.model.layers), strict=True):
            hook = block.experts.register_forward_hook(lambda _module, args, _out, layer=layer: layer.append(args))
            stack.callback(hook.remove)
        yield seen


def native(model, layer, hidden):
    """`(ids, weights)` by the model's own router, outside of any session."""
    _, weights, ids = model.model.layers[layer].mlp.gate(hidden)
    return ids, weights


@pytest.mark.usefixtures("true_double")
@torch.no_grad()
def test_only_the_last_prompt_token_is_routed_anew(model, folder, tokenizer):
    """In a forward over prompts with what was generated after them, each token is compared with the model's own
    router on the very input that it met."""
    inputs = batch(tokenizer, texts(9, 6))
    with adapt(model, tokenizer, c3po(folder)) as adapted:
        whole = adapted.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        mask = F.pad(inputs["attention_mask"], (0, NEW), value=1)
        value = values(adapted)
        with watched(model) as seen:
            out = adapted(whole, attention_mask=mask, state=adapted.state, output_router_logits=True)
    at = torch.zeros(2, whole.shape[1], dtype=torch.bool)
    at[:, inputs["input_ids"].shape[1] - 1] = True  # the last prompt token, also of the padded row
    for layer, ((hidden, ids, weights),) in enumerate(seen):
        own_ids, own_weights = native(model, layer, hidden)
        logits = F.linear(hidden, model.model.layers[layer].mlp.gate.weight)
        assert torch.equal(out.router_logits[layer], logits), "reported router logits are the model's own"
        here = at.flatten() if layer >= FIRST else torch.zeros(at.numel(), dtype=torch.bool)
        assert torch.equal(ids[~here], own_ids[~here])
        assert torch.equal(weights[~here], own_weights[~here])
        if layer < FIRST:
            continue
        scores = value[:, layer] / value[:, layer].sum(1, keepdim=True)  # softmax of their log
        best = scores.sort(-1, descending=True)
        assert torch.equal(ids[here], best.indices[:, :3])
        torch.testing.assert_close(weights[here], best.values[:, :3], atol=1e-12, rtol=0)
        assert not torch.allclose(weights[here], own_weights[here], atol=1e-3), "hardly moved: the test cannot tell"


class AfterPrompt(LogitsProcessor):
    """Forgets what was seen when the first token has been decided on."""

    def __init__(self, seen):
        self.seen, self.begun = seen, False

    def __call__(self, input_ids, scores):
        if not self.begun:
            self.begun = True
            self.prompt = [list(layer) for layer in self.seen]
            for layer in self.seen:
                layer.clear()
        return scores


@pytest.mark.usefixtures("true_double")
@torch.no_grad()
@pytest.mark.parametrize("cached", [True, False])
def test_no_decoding_step_is_touched(model, folder, tokenizer, cached):
    inputs = batch(tokenizer, texts(9, 6))
    with adapt(model, tokenizer, c3po(folder)) as adapted, watched(model) as seen:
        after = AfterPrompt(seen)
        adapted.generate(**inputs, max_new_tokens=NEW, do_sample=False, logits_processor=[after], use_cache=cached)
    length = inputs["input_ids"].shape[1]
    for layer in range(L):
        hidden, ids, weights = after.prompt[layer][-1]  # the forward whose logits decide on the first token
        own_ids, own_weights = native(model, layer, hidden)
        assert len(hidden) == (2 if cached else 2 * length)
        moved = (weights != own_weights).any(1).view(2, -1)
        assert moved[:, -1].tolist() == [layer >= FIRST] * 2
        assert not moved[:, :-1].any()
        assert len(seen[layer]) == NEW - 1
        for step, (hidden, ids, weights) in enumerate(seen[layer], 1):
            own_ids, own_weights = native(model, layer, hidden)
            new = torch.ones(2, len(hidden) // 2, dtype=torch.bool)
            if not cached:
                assert new.shape[1] == length + step
                new[:, length - 1] = False  # the last prompt token is read anew
            assert torch.equal(ids[new.flatten()], own_ids[new.flatten()])
            assert torch.equal(weights[new.flatten()], own_weights[new.flatten()])


# --- every way of decoding --------------------------------------------------------------------------------

CALLS = {
    "greedy": {},
    "static cache": {"cache_implementation": "static"},
    "prompt in chunks": {"prefill_chunk_size": 4},
    "no cache": {"use_cache": False},
    "beams, copies": {"num_beams": 3, "num_return_sequences": 2},
    "sampled copies": {"num_return_sequences": 2, "do_sample": True, "temperature": 2.0},
}


@pytest.mark.usefixtures("true_double")
@pytest.mark.parametrize("name", CALLS)
def test_text_equals_decoding_without_a_cache_under_the_same_override(model, folder, tokenizer, name):
    """Row by row, unpadded, by a model whose routers are overridden by hand at one position."""
    call = {**DICT, "max_new_tokens": NEW, **CALLS[name]}
    inputs = batch(tokenizer, texts(9, seed=6) if call["do_sample"] else texts(9, 6, seed=6))
    torch.manual_seed(0)
    with adapt(model, tokenizer, c3po(folder, lr=0.5)) as adapted:
        out = adapted.generate(**inputs, **call)
        value, at = (adapted.state.tensors["c3po"][n] for n in ("value", "at"))
    copies = call.get("num_return_sequences", 1)
    plain = {k: v for k, v in call.items() if k not in ("cache_implementation", "prefill_chunk_size")}
    different = 0
    for row in range(len(inputs["input_ids"])):
        alone = inputs["input_ids"][row][inputs["attention_mask"][row] == 1][None]
        rows = slice(row * copies, (row + 1) * copies)
        assert at[rows].tolist() == [alone.shape[1] - 1] * copies
        torch.manual_seed(0)
        with overridden(model, value[row * copies], alone.shape[1] - 1, FIRST):
            expected = model.generate(alone, attention_mask=torch.ones_like(alone), **plain | {"use_cache": False})
        assert torch.equal(out.sequences[rows, -NEW:], expected.sequences[:, -NEW:])
        if "num_beams" not in call:
            for mine, theirs in zip(out.logits, expected.logits, strict=True):
                torch.testing.assert_close(mine[rows], theirs, atol=1e-6, rtol=1e-6)  # cast to fp32 by generate
        base = model.generate(alone, attention_mask=torch.ones_like(alone), **plain)
        different += not torch.equal(base.sequences, expected.sequences)
    assert different, "the override changed nothing: the test cannot tell"


@pytest.mark.usefixtures("true_double")
@pytest.mark.parametrize("lengths", [(1,), (1, 6), (1, 1)])
def test_prompts_of_one_token(model, folder, tokenizer, lengths):
    """No head of the prompt to read ahead: the whole prompt is the token that is overridden."""
    inputs = batch(tokenizer, texts(*lengths, seed=3))
    with adapt(model, tokenizer, c3po(folder, max_similarity=1.0)) as adapted:
        out = adapted.generate(**inputs, max_new_tokens=NEW, **DICT)
        value = values(adapted)
        assert outcomes(adapted) == ["accepted"] * len(lengths)
    for row, length in enumerate(lengths):
        ids = out.sequences[row : row + 1, -length - NEW : -1]
        with torch.no_grad(), overridden(model, value[row], length - 1, FIRST):
            expected = full_logits(model, ids)[0, -NEW:]
        found = torch.stack([logits[row] for logits in out.logits])
        torch.testing.assert_close(found, expected.float(), atol=1e-6, rtol=1e-6)


@pytest.mark.usefixtures("true_double")
@pytest.mark.parametrize("surrogate", ["ngd", "kernel_regression"])
def test_a_delta_for_all_tokens_is_a_static_one_on_prompt_and_answer(model, folder, tokenizer, surrogate):
    inputs = batch(tokenizer, texts(9, 6))
    how = {"scope": "all", "surrogate": surrogate, "alpha": 0.2 if surrogate == "kernel_regression" else None}
    with adapt(model, tokenizer, c3po(folder, **how)) as adapted:
        out = adapted.generate(**inputs, max_new_tokens=NEW, **DICT)
        delta = values(adapted)
    with adapt(model, tokenizer, ttr.StaticRouting(delta=delta)) as adapted:
        expected = adapted.generate(**inputs, max_new_tokens=NEW, **DICT)
    assert torch.equal(out.sequences, expected.sequences)
    torch.testing.assert_close(out.logits, expected.logits, atol=1e-6, rtol=1e-6)
    assert not delta[:, :FIRST].any()
    for row, length in enumerate((9, 6)):
        ids = out.sequences[row : row + 1, -length - NEW : -1]
        with torch.no_grad(), plain_routing(model, delta[row]):
            plain = full_logits(model, ids)[0, -NEW:]
        found = torch.stack([logits[row] for logits in out.logits])
        torch.testing.assert_close(found, plain.float(), atol=1e-6, rtol=1e-6)


# --- batches ----------------------------------------------------------------------------------------------


def facts(sequence):
    """A sequence's report as words and numbers, without what is measured in milliseconds."""
    words, numbers = [], []

    def walk(value):
        if isinstance(value, dict):
            for key in sorted(value):
                if key != "milliseconds":
                    words.append(key)
                    walk(value[key])
        elif isinstance(value, (list, tuple)):
            for item in value:
                walk(item)
        elif isinstance(value, float):
            numbers.append(value)
        else:
            words.append(value)

    walk(vars(sequence))
    return words, numbers


WAYS = {
    "ngd": {},
    "kernel regression": {"surrogate": "kernel_regression"},
    "mode finding": {"surrogate": "mode_finding", "kernel": "matern"},
    "eps": {"eps": 1.18, "k": 4},
    "all tokens": {"scope": "all"},
    "oracle": {"surrogate": "oracle", "labels": ("(a", "bcd", "e")},
}


@pytest.mark.usefixtures("true_double")
@pytest.mark.parametrize(("name", "no_harm"), [("all tokens", False), *((name, True) for name in WAYS)])
def test_a_batch_equals_its_sequences_one_by_one(model, folder, tokenizer, name, no_harm):
    prompts, told = texts(9, 5, 12, seed=6), set()
    with adapt(model, tokenizer, c3po(folder, **WAYS[name]), no_harm) as adapted:
        out = adapted.generate(**batch(tokenizer, prompts), max_new_tokens=NEW, **DICT)
        together, report = adapted.state.tensors["c3po"], adapted.report
    for row, prompt in enumerate(prompts):
        own = dict(WAYS[name])
        if "labels" in own:
            own["labels"] = own["labels"][row : row + 1]
        with adapt(model, tokenizer, c3po(folder, **own), no_harm) as adapted:
            alone = adapted.generate(**batch(tokenizer, [prompt]), max_new_tokens=NEW, **DICT)
            for key, value in adapted.state.tensors["c3po"].items():
                torch.testing.assert_close(together[key][row], value[0], atol=1e-6, rtol=0)
            words, numbers = facts(report.sequences[row])
            assert words == facts(adapted.report.sequences[0])[0]
            assert numbers == pytest.approx(facts(adapted.report.sequences[0])[1], abs=1e-5)
        assert torch.equal(out.sequences[row, -NEW:], alone.sequences[0, -NEW:])
        for mine, theirs in zip(out.logits, alone.logits, strict=True):
            torch.testing.assert_close(mine[row], theirs[0], atol=1e-5, rtol=0)
        told.add(report.sequences[row].strategies["c3po"]["outcome"][:7])
    if name == "eps":
        assert "skipped" in told
    if name != "oracle" and no_harm:
        assert len(told) > 1, "one outcome for all: the test cannot tell"
    assert "accepte" in told or no_harm


@pytest.mark.usefixtures("true_double")
def test_rows_that_are_skipped_or_taken_back_are_the_base_models(model, folder, tokenizer):
    """Beside rows that adapt; what is kept in the cache for them is theirs too."""
    prompts = texts(9, 5, 12, 8, 7, seed=20)
    inputs = batch(tokenizer, prompts)
    base = model.generate(**inputs, max_new_tokens=NEW, **DICT)
    for how in ({"eps": 1.18, "k": 4}, {"eps": 1.18, "k": 4, "scope": "all"}):
        with adapt(model, tokenizer, c3po(folder, **how), no_harm=True) as adapted:
            out = adapted.generate(**inputs, max_new_tokens=NEW, **DICT)
            told, on = outcomes(adapted), adapted.state.tensors["c3po"]["on"]
            notes = [s.strategies["c3po"] for s in adapted.report.sequences]
        assert {t.split(":")[0] for t in told} == {"accepted", "rolled back", "skipped"}
        assert on.tolist() == [t == "accepted" for t in told]
        kept = [i for i, t in enumerate(told) if t != "accepted"]
        for mine, theirs in zip(out.logits, base.logits, strict=True):
            torch.testing.assert_close(mine[kept], theirs[kept], atol=1e-6, rtol=1e-6)
        assert (out.logits[0][on] - base.logits[0][on]).abs().max() > 1e-2
        for note in notes:
            if note["outcome"].startswith("skipped"):
                assert len(note["neighbours"]) < 2
            elif note["outcome"] == "accepted":
                assert note["held_back_after"] < note["held_back_before"]
            else:
                assert note["held_back_after"] >= note["held_back_before"]


@pytest.mark.parametrize("scope", ["last_prompt_token", "all"])
@pytest.mark.parametrize("how", [{"kl_limit": 1e-12}, {"eps": 1e-3}], ids=str)
def test_all_taken_back_the_whole_call_is_the_base_model_bit_by_bit(olmoe, folder, tokenizer, scope, how):
    olmoe.set_experts_implementation("batched_mm")
    inputs = batch(tokenizer, texts(9, 5, seed=1))
    call = {"max_new_tokens": 9, "do_sample": True, "top_k": 20}
    torch.manual_seed(0)
    base = olmoe.generate(**inputs, **call, output_logits=True, return_dict_in_generate=True)
    with adapt(olmoe, tokenizer, c3po(folder, scope=scope, **how), no_harm=True) as adapted:
        torch.manual_seed(0)
        out = adapted.generate(**inputs, **call, output_logits=True, return_dict_in_generate=True)
        assert all(t.startswith(("rolled back", "skipped")) for t in outcomes(adapted))
    assert torch.equal(out.sequences, base.sequences)
    assert all(torch.equal(a, b) for a, b in zip(out.logits, base.logits, strict=True))


def test_a_large_move_of_the_next_token_is_taken_back(olmoe64, folder, tokenizer):
    prompts = texts(9, 5, 12, 8, 7, seed=20)
    told = []
    for limit in (5.0, 1e-9):
        with adapt(olmoe64, tokenizer, c3po(folder, kl_limit=limit), no_harm=True) as adapted:
            adapted.generate(**batch(tokenizer, prompts), max_new_tokens=1, do_sample=False)
            told.append(outcomes(adapted))
    assert "accepted" in told[0]
    for free, tight in zip(*told, strict=True):
        assert tight.startswith("rolled back: next-token KL") if free == "accepted" else tight == free


# --- the neighbour that is held back ----------------------------------------------------------------------


def with_answer(folder, to, number, letters):
    """A copy of a set in which one record has another answer of the same length."""
    shutil.copytree(folder, to)
    lines = (to / "records.jsonl").read_text().splitlines(keepends=True)
    record = json.loads(lines[number])
    record["answer"] = letters[: len(record["answer"])]
    new = json.dumps(record, ensure_ascii=False) + "\n"
    padding = len(lines[number].encode()) - len(new.encode())  # offsets are stored: no other line may move
    lines[number] = new[:-1] + " " * padding + "\n"
    (to / "records.jsonl").write_text("".join(lines))
    forge(to, lambda manifest: None)
    return to


@pytest.mark.usefixtures("true_double")
@pytest.mark.parametrize("surrogate", ["ngd", "kernel_regression", "mode_finding"])
def test_what_is_held_back_is_in_no_fit(model, folder, tokenizer, surrogate, tmp_path):
    """Another answer of that one changes its loss and the outcome, and nothing that was fitted."""
    found = []

    def ask(where):
        with adapt(model, tokenizer, c3po(where, surrogate=surrogate), no_harm=True) as adapted:
            adapted.generate(**batch(tokenizer, texts(9, seed=2)), max_new_tokens=1, do_sample=False)
            found.append((values(adapted), adapted.report.sequences[0].strategies["c3po"]))
        return found[-1][1]

    neighbours = ask(folder)["neighbours"]
    assert [n["held_back"] for n in neighbours] == [False, False, True]
    ask(with_answer(folder, tmp_path / "judge", neighbours[2]["record"], "zzzz"))
    ask(with_answer(folder, tmp_path / "fitted", neighbours[0]["record"], "zzzz"))
    (value, base), (judged, other), (fitted, moved) = found
    torch.testing.assert_close(judged, value, atol=1e-12, rtol=0)
    assert abs(other["held_back_before"] - base["held_back_before"]) > 0.1
    for name in ("loss_before", "loss_after"):
        assert other[name] == pytest.approx(base[name], abs=1e-12)
    assert moved["held_back_before"] == pytest.approx(base["held_back_before"], abs=1e-12)
    assert abs(moved["loss_before"] - base["loss_before"]) > 0.1
    assert surrogate != "ngd" or not torch.allclose(fitted, value, atol=1e-3)


def test_one_more_is_fetched_than_fitted_and_only_under_no_harm(olmoe64, folder, tokenizer):
    plain = PlainSet(folder, tokenizer)
    for no_harm in (False, True):
        with adapt(
            olmoe64, tokenizer, c3po(folder, k=5, surrogate="kernel_regression", alpha=0.5), no_harm
        ) as adapted:
            adapted.generate(**batch(tokenizer, texts(9)), max_new_tokens=1, do_sample=False)
            note = adapted.report.sequences[0].strategies["c3po"]
        assert len(note["neighbours"]) == 5 + no_harm
        assert sum(n["weight"] > 0 for n in note["neighbours"]) == 5
        assert [plain.records[n["record"]]["task"] for n in note["neighbours"]] == [
            n["task"] for n in note["neighbours"]
        ]
        assert ("held_back_before" in note) == no_harm


# --- with other strategies --------------------------------------------------------------------------------

DELTA = torch.randn(L, E, generator=torch.Generator().manual_seed(5)).double()
OTHERS = {
    "static_routing": lambda: [ttr.StaticRouting(delta=DELTA)],
    "rerouting": lambda: [ttr.Rerouting(steps=2, lr=0.2, interval=None, layers="all")],
    "rerouting, upper layers": lambda: [ttr.Rerouting(steps=2, lr=0.2, interval=None, layers="last:1")],
    "dynamic_k": lambda: [ttr.DynamicK(p=0.5)],
    "expert_mask": lambda: [ttr.ExpertMask(mask=torch.arange(E).expand(L, E) < 5)],
    "all": lambda: [OTHERS[n]()[0] for n in ("static_routing", "rerouting", "dynamic_k", "expert_mask")],
}


@pytest.mark.usefixtures("true_double")
@pytest.mark.parametrize(("name", "scope"), [("rerouting", "all"), *((name, "last_prompt_token") for name in OTHERS)])
def test_beside_other_strategies_the_cache_holds_what_a_whole_forward_gives(model, folder, tokenizer, name, scope):
    inputs = batch(tokenizer, texts(18, 20, seed=30))
    with adapt(model, tokenizer, [*OTHERS[name](), c3po(folder, scope=scope)]) as adapted:
        out = adapted.generate(**inputs, max_new_tokens=NEW, **DICT)
        assert outcomes(adapted) == ["accepted"] * 2
        mask = F.pad(inputs["attention_mask"], (0, NEW - 1), value=1)
        with torch.no_grad():
            positions = (mask.cumsum(1) - 1).clamp_min(0)
            whole = adapted(out.sequences[:, :-1], attention_mask=mask, position_ids=positions, state=adapted.state)
    torch.testing.assert_close(torch.stack(out.logits, 1), whole.logits[:, -NEW:].float(), atol=1e-6, rtol=1e-6)


@pytest.mark.usefixtures("true_double")
@torch.no_grad()
def test_a_given_delta_is_on_the_other_tokens_and_on_what_is_fitted_from(model, folder, tokenizer):
    """Order 10 before order 30: at the one token the override stands alone."""
    (prompt,) = texts(9, seed=31)
    with adapt(model, tokenizer, [c3po(folder), ttr.StaticRouting(delta=DELTA)]) as adapted:
        out = adapted.generate(**batch(tokenizer, [prompt]), max_new_tokens=NEW, **DICT)
        value = values(adapted)[0]
    with overridden(model, value, 8, FIRST, DELTA):
        expected = full_logits(model, out.sequences[:, :-1])[0, -NEW:]
    torch.testing.assert_close(torch.cat(out.logits), expected.float(), atol=1e-6, rtol=1e-6)


@pytest.mark.usefixtures("true_double")
def test_both_rows_of_a_contrast_have_the_override(model, folder, tokenizer):
    """With beta = 0 the contrast is off; with SCMoE there is no hand-over, and the text is that of no cache."""
    inputs = batch(tokenizer, texts(9, 6))
    found = []
    for cached in (True, False):
        with adapt(model, tokenizer, [c3po(folder), ttr.SCMoE(beta=0.9)]) as adapted:
            found.append(adapted.generate(**inputs, max_new_tokens=NEW, use_cache=cached, **DICT))
            value = values(adapted)
    assert torch.equal(found[0].sequences, found[1].sequences)
    torch.testing.assert_close(found[0].logits, found[1].logits, atol=1e-5, rtol=1e-5)
    with adapt(model, tokenizer, c3po(folder)) as adapted:
        adapted.generate(**inputs, max_new_tokens=1, **DICT)
        torch.testing.assert_close(values(adapted), value, atol=1e-9, rtol=0)


def test_rerouting_adapts_again_while_the_override_stays(olmoe64, folder, tokenizer):
    """A refilled cache has the override at the last prompt token, at no other."""
    inputs = batch(tokenizer, texts(18, 20, seed=30))
    strategies = [c3po(folder), ttr.Rerouting(steps=2, lr=0.2, interval=2, layers="all")]
    call = {**DICT, "max_new_tokens": 6}
    with adapt(olmoe64, tokenizer, strategies) as adapted:
        cached, plain = (adapted.generate(**inputs, use_cache=use, **call) for use in (True, False))
        assert len(adapted.report.sequences[0].strategies["rerouting"]["adaptations"]) == 3
    assert torch.equal(cached.sequences, plain.sequences)
    for a, b in zip(cached.logits, plain.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


# --- state ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("true_double")
@pytest.mark.parametrize("scope", ["last_prompt_token", "all"])
def test_state_gives_what_generate_had(model, folder, tokenizer, scope, tmp_path):
    inputs = batch(tokenizer, texts(9, 6))
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    with adapt(model, tokenizer, c3po(folder, scope=scope)) as adapted, torch.no_grad():
        out = adapted.generate(**inputs, max_new_tokens=2, num_return_sequences=2, num_beams=2, do_sample=False)
        one = adapted.generate(**inputs, max_new_tokens=1, **DICT)
        state = adapted.state
        ttr.save(tmp_path / "state", state)
        for learned in (state, ttr.load(tmp_path / "state")):
            logits = adapted(**inputs, position_ids=positions, state=learned).logits[:, -1]
            torch.testing.assert_close(logits.float(), one.logits[0], atol=1e-6, rtol=1e-6)
        assert torch.equal(
            adapted(**inputs, position_ids=positions).logits, model(**inputs, position_ids=positions).logits
        )
        # a new call asks anew: what an earlier one learned does not stay
        again = adapted.generate(**inputs, max_new_tokens=1, state=state, **DICT)
        torch.testing.assert_close(again.logits, one.logits, atol=1e-6, rtol=1e-6)
        adapted.generate(**inputs, max_new_tokens=1, num_return_sequences=2, do_sample=True)
        assert len(values(adapted)) == len(out) == 4
        assert torch.equal(values(adapted)[::2], values(adapted)[1::2])
        with pytest.raises(ttr.UnsupportedCallError, match="4 sequences"):
            adapted(**inputs, state=adapted.state)


def test_a_state_of_other_shape_is_refused(olmoe, folder, tokenizer):
    inputs = batch(tokenizer, texts(9))
    with adapt(olmoe, tokenizer, c3po(folder)) as adapted:
        adapted.generate(**inputs, max_new_tokens=1)
        good = adapted.state
        for key, change, words in (
            ("value", lambda t: t[:, :3], r"shape \(1, 3, 8\), the call needs \(1, 4, 8\)"),
            ("value", lambda t: t * float("nan"), "NaN or infinite"),
        ):
            tensors = {"c3po": {**good.tensors["c3po"], key: change(good.tensors["c3po"][key])}}
            with pytest.raises((ttr.UnsupportedCallError, ttr.ConfigError), match=words):
                adapted(**inputs, state=type(good)(tensors, good.fingerprint))


# --- cost -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("surrogate", "call"),
    [("ngd", {}), ("ngd", {"num_beams": 2}), ("kernel_regression", {"num_return_sequences": 2, "do_sample": True})],
    ids=str,
)
def test_the_prompt_is_read_once_and_neighbours_once_below_the_critical_layers(
    olmoe64, folder, tokenizer, call, surrogate
):
    """Shapes that the lowest layer sees: no second pass embeds the question, no step runs lower layers again."""
    inputs = batch(tokenizer, texts(9, 6))
    low, high = [], []
    layers = olmoe64.model.layers
    with adapt(olmoe64, tokenizer, c3po(folder, surrogate=surrogate, k=3)) as adapted:
        adapted.generate(**inputs, max_new_tokens=3, **call)  # short cuts are tried at the first call
        for layer, seen in ((layers[0], low), (layers[-1], high)):
            layer.mlp.register_forward_pre_hook(
                lambda _module, args, seen=seen: seen.append(tuple(args[0].shape[:2]))
            )
        adapted.generate(**inputs, max_new_tokens=3, **call)
    rows = 2 * max(call.get("num_beams", 1), call.get("num_return_sequences", 1))
    neighbours = [shape for shape in low if shape[0] == 6]
    # all but the last token; that one before and after the fit; then as generate reads it
    assert [shape for shape in low if shape[0] != 6] == [(2, 8), (2, 1), (2, 1)] + [(rows, 1)] * 3
    assert len(neighbours) == 1
    fits = 3 if surrogate == "ngd" else 15
    assert [shape for shape in high if shape[0] == 6] == neighbours * (1 + fits + 1)


# --- no trace ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["last_prompt_token", "all"])
def test_nothing_is_left_behind(olmoe, folder, tokenizer, untouched, scope):
    inputs = batch(tokenizer, texts(9, 6))
    own = olmoe.generate(**inputs, max_new_tokens=4, do_sample=False)
    with untouched(olmoe):
        adapted = adapt(olmoe, tokenizer, c3po(folder, scope=scope))
        adapted.generate(**inputs, max_new_tokens=4)
        adapted.generate(**inputs, max_new_tokens=4, num_beams=2)
        adapted(**inputs, state=None)
        adapted.close()
    assert torch.equal(olmoe.generate(**inputs, max_new_tokens=4, do_sample=False), own)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), torch.cuda.OutOfMemoryError("memory")], ids=repr)
@pytest.mark.parametrize("when", ["first reading", "neighbours", "descent"])
def test_nothing_is_left_behind_by_an_interruption(olmoe, folder, tokenizer, untouched, monkeypatch, error, when):
    armed, original = [], OlmoeAttention.forward
    last = olmoe.model.layers[-1].self_attn

    def forward(self, hidden_states, *args, **kwargs):
        here = {
            "first reading": tuple(hidden_states.shape[:2]) == (2, 8),
            "neighbours": hidden_states.shape[0] == 4,
            "descent": torch.is_grad_enabled(),
        }[when]
        if armed and self is last and here:
            armed.pop()
            if not armed:
                raise error
        return original(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(OlmoeAttention, "forward", forward)
    inputs = batch(tokenizer, texts(9, 6))
    with untouched(olmoe), adapt(olmoe, tokenizer, c3po(folder)) as adapted:
        expected = adapted.generate(**inputs, max_new_tokens=4, do_sample=False)
        armed.extend([None] * (2 if when == "descent" else 1))
        with pytest.raises(type(error)):
            adapted.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert not armed
        assert torch.is_grad_enabled()
        assert torch.equal(adapted.generate(**inputs, max_new_tokens=4, do_sample=False), expected)
