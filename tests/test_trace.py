"""Traces of calls against plain hooks on the bare model, and traces of arrays from elsewhere."""

import base64
import io
import json

import numpy as np
import pytest
import torch

import ttrouting as ttr
from oracles.double import build_double
from oracles.plain_router import family_scores, full_logits, plain_routing, routers
from ttrouting.trace import RoutingTrace, decode_routed_experts

L, E, K = 4, 8, 3
FAMILIES = ("olmoe", "mixtral", "deepseek_v3")


@torch.no_grad()
def plain(model, ids, delta=None):
    """`(ids [T, L, K], weights [T, L, K], entropy [T, L])` of one text, from hooks on the bare model's experts."""
    met, entropies = [], []

    def note(_module, args):
        met.append(args[1:3])

    blocks = [m for m in model.modules() if hasattr(m, "experts") and hasattr(m, "gate")]
    hooks = [block.experts.register_forward_pre_hook(note) for block in blocks]
    with plain_routing(model, delta) as seen:
        full_logits(model, ids[None])
    for hook in hooks:
        hook.remove()
    for router, (logits, _) in zip(routers(model), seen, strict=True):
        scores, _ = family_scores(router, logits)
        pi = scores / scores.sum(-1, keepdim=True)
        entropies.append(-(pi * pi.log()).sum(-1))
    return (*(torch.stack(part, 1) for part in zip(*met, strict=True)), torch.stack(entropies, 1))


def check(trace, expected):
    """Equal as sets with weights: families order the columns in their own way."""
    ids, weights, entropy = expected
    assert trace.ids.shape == ids.shape
    mine, order = trace.ids.long().sort(-1)
    theirs, other = ids.sort(-1)
    assert torch.equal(mine, theirs)
    assert torch.allclose(trace.weights.double().gather(-1, order), weights.double().gather(-1, other), atol=1e-6)
    assert torch.allclose(trace.entropy.double(), entropy.double(), atol=1e-5)


def texts(ids):
    """The rows of a padded batch without their padding."""
    return [row[row != 0] for row in ids]


# --- what is traced ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("true_double")
@pytest.mark.parametrize("family", FAMILIES)
def test_base_is_the_plain_models_own_routing(family, prompts, untouched):
    model, ids = build_double(family), prompts(9, 5)
    with untouched(model), ttr.adapt(model, "scmoe") as adapted, adapted.paused(), adapted.tracing() as traces:
        adapted(ids, attention_mask=(ids != 0).long())
    assert len(traces) == 2
    for trace, text in zip(traces, texts(ids), strict=True):
        check(trace, plain(model, text))
        assert trace.tokens == tuple(str(i) for i in text.tolist())  # no tokenizer
        assert trace.prompt_tokens == len(text)
        assert trace.num_experts == 8


@pytest.mark.usefixtures("true_double")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_generated_text_is_traced_but_for_its_last_token(family, prompts):
    model, ids, delta = (
        build_double(family),
        prompts(9, 6),
        torch.randn(L, E, generator=torch.Generator().manual_seed(3)),
    )
    model.generation_config.eos_token_id = None
    layers = len(routers(model))
    delta = delta[:layers]
    with ttr.adapt(model, ttr.StaticRouting(delta=delta)) as adapted, adapted.tracing() as traces:
        out = adapted.generate(ids, attention_mask=(ids != 0).long(), max_new_tokens=5, do_sample=False)
    for trace, row, prompt in zip(traces, out, texts(ids), strict=True):
        text = torch.cat([prompt, row[ids.shape[1] : -1]])
        check(trace, plain(model, text, delta.double()))
        assert (len(trace.tokens), trace.prompt_tokens) == (len(text), len(prompt))


def test_what_comes_after_the_end_of_a_sequence_is_not_traced(olmoe64, prompts):
    ids = prompts(8, 6)
    with ttr.adapt(olmoe64, ttr.StaticRouting(delta=torch.ones(L, E))) as adapted, adapted.tracing() as traces:
        free = adapted.generate(ids, attention_mask=(ids != 0).long(), max_new_tokens=6, do_sample=False)
        ends = {"eos_token_id": int(free[0, 10]), "pad_token_id": 0}
        out = adapted.generate(ids, attention_mask=(ids != 0).long(), max_new_tokens=6, do_sample=False, **ends)
    new = out[0, 8:].tolist().index(int(free[0, 10]))  # before the end
    assert len(traces[2].tokens) == 8 + new
    assert len(traces[0].tokens) == 8 + 5


@pytest.mark.parametrize("refresh", [True, False])
def test_with_intervals_it_is_the_routing_that_is_in_the_cache(olmoe64, prompts, refresh):
    ids = prompts(24)
    strategy = ttr.Rerouting(interval=2, lr=0.5, steps=2, layers="all", refresh_kv=refresh)
    with ttr.adapt(olmoe64, strategy, no_harm=False) as adapted:
        with adapted.tracing():
            adapted.generate(ids, max_new_tokens=2, do_sample=False)
        first = adapted.state.tensors["rerouting"]["delta"][0]
        with adapted.tracing() as traces:
            out = adapted.generate(ids, max_new_tokens=4, do_sample=False)
        last = adapted.state.tensors["rerouting"]["delta"][0]
    text = out[0, :-1]
    assert not torch.equal(first, last)
    ids_now, _, _ = plain(olmoe64, text, last)
    ids_before, _, _ = plain(olmoe64, text, first)
    assert not torch.equal(ids_now[:24], ids_before[:24]), "the deltas route alike: the test cannot tell"
    if refresh:
        check(traces[0], plain(olmoe64, text, last))
    else:
        check(
            RoutingTrace.from_arrays(*(p[:24] for p in parts(traces[0])), num_experts=E),
            plain(olmoe64, ids[0], first),
        )


def parts(trace):
    return trace.ids, trace.weights, trace.entropy


def test_what_was_rolled_back_is_not_in_the_trace(olmoe64, prompts):
    ids = prompts(40)
    strategy = ttr.Rerouting(lr=0.5, layers="all", kl_limit=1e-9)  # whatever moves is too far
    with ttr.adapt(olmoe64, strategy) as adapted, adapted.tracing() as traces:
        adapted.generate(ids, max_new_tokens=1, do_sample=False)
    assert "rolled back" in adapted.report.sequences[0].strategies["rerouting"]["outcome"]
    check(traces[0], plain(olmoe64, ids[0]))


def test_a_dropped_expert_is_minus_one(olmoe64, prompts):
    ids = prompts(12)
    with ttr.adapt(olmoe64, ttr.DynamicK(p=0.4)) as adapted, adapted.tracing() as traces:
        adapted(ids)
    trace, (chosen, weights, _) = traces[0], plain(olmoe64, ids[0])
    expected = torch.zeros(12, dtype=torch.int64)
    for t in range(12):  # the first layer: further down the dropped ones have changed the input
        order = weights[t, 0].argsort(descending=True)
        share, kept = 0.0, []
        for column in order.tolist():
            kept.append(int(chosen[t, 0, column]))
            share += float(weights[t, 0, column] / weights[t, 0].sum())
            if share >= 0.4:
                break
        expected[t] = len(kept)
        assert set(trace.ids[t, 0].tolist()) - {-1} == set(kept)
    assert torch.equal(trace.k[:, 0], expected)
    assert 1 <= float(trace.k.float().mean()) < K
    assert bool((trace.weights[trace.ids == -1] == 0).all())


def test_of_two_streams_the_models_own_is_traced(olmoe64, prompts):
    ids = prompts(9, 5)
    with ttr.adapt(olmoe64, ttr.SCMoE(weak="random")) as adapted, adapted.tracing() as traces:
        adapted.generate(ids, attention_mask=(ids != 0).long(), max_new_tokens=1, do_sample=False)
    for trace, text in zip(traces, texts(ids), strict=True):
        check(trace, plain(olmoe64, text))


def test_each_returned_sequence_has_a_trace(olmoe64, prompts):
    ids = prompts(7, 5)
    call = {"attention_mask": (ids != 0).long(), "max_new_tokens": 4, "do_sample": True, "num_return_sequences": 2}
    with ttr.adapt(olmoe64, ttr.StaticRouting(delta=torch.zeros(L, E) + 0.1)) as adapted:
        torch.manual_seed(0)
        with adapted.tracing() as traces:
            out = adapted.generate(ids, **call)
    assert len(traces) == 4
    for trace, row, prompt in zip(traces, out, [t for t in texts(ids) for _ in range(2)], strict=True):
        assert trace.tokens == tuple(str(i) for i in [*prompt.tolist(), *row[7:-1].tolist()])
        check(trace, plain(olmoe64, torch.cat([prompt, row[7:-1]])))


def test_a_compiled_model_gives_the_same_trace(olmoe, prompts):
    olmoe.set_experts_implementation("batched_mm")
    ids = prompts(6)
    with ttr.adapt(olmoe, ttr.StaticRouting(delta=torch.randn(L, E))) as adapted:
        with adapted.tracing() as eager:
            adapted.generate(ids, max_new_tokens=3, do_sample=False)
        olmoe.forward = torch.compile(olmoe.forward, backend="eager")
        with adapted.tracing() as compiled:
            adapted.generate(ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(eager[0].ids, compiled[0].ids)


def test_tokens_are_pieces_of_the_text(olmoe, tokenizer):
    ids = tokenizer("hello you\nthere", return_tensors="pt")["input_ids"]
    with ttr.adapt(olmoe, "scmoe", tokenizer=tokenizer) as adapted, adapted.tracing() as traces:
        adapted(ids)
    assert "".join(traces[0].tokens) == tokenizer.decode(ids[0])
    assert traces[0].tokens[-3:] == ("e", "r", "e")


# --- what it leaves alone ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("true_double")
def test_it_changes_nothing_and_ends_with_its_block(prompts, untouched):
    olmoe, ids = build_double("olmoe"), prompts(30, 20)
    call = {"attention_mask": (ids != 0).long(), "max_new_tokens": 4, "do_sample": False}
    with untouched(olmoe), ttr.adapt(olmoe, [ttr.Rerouting(lr=0.2), ttr.SCMoE()]) as adapted:
        before = adapted.generate(ids, **call)
        learned = adapted.state.tensors["rerouting"]["delta"]
        with adapted.tracing() as traces:
            assert torch.equal(adapted.generate(ids, **call), before)
            with adapted.paused():
                report = adapted.report
                own = adapted.generate(ids, **call)
            with adapted.tracing() as inner:
                adapted(ids, attention_mask=call["attention_mask"])
        adapted.generate(ids, **call)
        assert torch.equal(adapted.state.tensors["rerouting"]["delta"], learned)
        assert report.sequences
    assert (len(traces), len(inner)) == (4, 2)
    assert torch.equal(own, olmoe.generate(ids, **call))


def test_an_error_leaves_nothing_behind(olmoe, prompts, untouched):
    ids = prompts(8)
    with untouched(olmoe), ttr.adapt(olmoe, "scmoe") as adapted:
        with pytest.raises(KeyboardInterrupt), adapted.tracing() as traces:
            adapted.generate(ids, max_new_tokens=4, stopping_criteria=[_Interrupt()])
        adapted.generate(ids, max_new_tokens=1)
    assert traces == []


class _Interrupt:
    def __call__(self, *_, **__):
        raise KeyboardInterrupt


def test_what_cannot_be_traced_is_refused(olmoe, prompts):
    with ttr.adapt(olmoe, ttr.StaticRouting(delta=torch.ones(L, E))) as adapted, adapted.tracing() as traces:
        with pytest.raises(ttr.UnsupportedCallError, match=r"num_beams=2 cannot be traced.*Use num_beams=1"):
            adapted.generate(prompts(5), max_new_tokens=2, num_beams=2)
        with pytest.raises(ttr.UnsupportedCallError, match="score is not traced"):
            adapted.score(prompts(5), [[[4]]])
    assert traces == []


# --- arrays -----------------------------------------------------------------------------------------------

IDS = [[[0, 3], [1, 2]], [[0, 1], [3, -1]], [[2, 3], [1, 3]]]  # [3 tokens, 2 layers, 2]


def test_load_k_and_top_by_hand():
    trace = RoutingTrace.from_arrays(
        IDS, [[[0.2, 0.8], [0.5, 0.5]], [[0.7, 0.3], [1, 0]], [[0.1, 0.9], [0.6, 0.4]]], num_experts=4
    )
    assert trace.k.tolist() == [[2, 2], [2, 1], [2, 2]]
    assert (trace.load * 3).round().tolist() == [[2, 1, 1, 2], [0, 2, 1, 2]]
    assert trace.top.tolist() == [[3, 1], [0, 3], [3, 1]]
    assert RoutingTrace.from_arrays(IDS, num_experts=4).top.tolist() == [[0, 1], [0, 3], [2, 1]]
    assert trace.tokens == ("0", "1", "2")
    assert trace.layers == ("0", "1")


@pytest.mark.parametrize(
    ("ids", "options", "words"),
    [
        ([[0, 1]], {}, r"shape \[tokens, layers, k\], got .* of shape \(1, 2\)"),
        ([IDS], {}, "A batch is one trace for each sequence"),
        ([[[0.5]]], {}, "whole numbers"),
        ([[[0, 4]]], {}, "Experts 0 to 4 are named where the model has 4"),
        ([[[0, 70000]]], {}, "Experts 0 to 70000"),
        ([[[-2, 1]]], {}, "-1 where no expert ran"),
        ([[[0, 0]], [[1, 2]]], {}, r"Layer 0 names an expert twice for token 0.*dense layer.*ids\[:, 1:\]"),
        (IDS, {"weights": [[1.0]]}, r"weights has shape \(1, 1\), these ids need \(3, 2, 2\)"),
        (IDS, {"entropy": [[1.0]]}, r"entropy has shape \(1, 1\), these ids need \(3, 2\)"),
        (IDS, {"tokens": ["a"]}, "There are 1 tokens beside ids"),
        (IDS, {"layers": ["a"]}, "There are 1 layers beside ids"),
        (IDS, {"prompt_tokens": 4}, "prompt_tokens is 4 in a trace of 3 tokens"),
        (IDS, {"num_experts": 40_000}, "num_experts must be from 1 to 32767"),
    ],
)
def test_arrays_that_are_no_trace(ids, options, words):
    with pytest.raises(ttr.ConfigError, match=words):
        RoutingTrace.from_arrays(ids, **{"num_experts": 4, **options})


def test_routed_experts_of_servers():
    """As their answers are laid out: base64 of a .npy file (vLLM), base64 of flat int32 (SGLang)."""
    array = np.array([[[0, 0], [0, 3], [1, 2]], [[0, 0], [0, 1], [3, 2]]], dtype=np.uint8)  # the first layer is dense
    file = io.BytesIO()
    np.save(file, array)
    vllm = base64.b64encode(file.getvalue()).decode()
    sglang = base64.b64encode(array.astype(np.int32).tobytes()).decode()
    for found in (decode_routed_experts(vllm), decode_routed_experts(sglang, num_layers=3, top_k=2)):
        assert found.tolist() == array.tolist()
        trace = RoutingTrace.from_arrays(found[:, 1:], num_experts=4)
        assert trace.ids.tolist() == array[:, 1:].tolist()
        assert (trace.weights, trace.entropy) == (None, None)


def test_texts_that_are_no_routed_experts():
    flat = base64.b64encode(np.arange(5, dtype=np.int32).tobytes()).decode()
    objects, numbers = io.BytesIO(), io.BytesIO()
    np.save(objects, np.array([[{}]], dtype=object), allow_pickle=True)
    np.save(numbers, np.zeros((2, 2, 2)))
    for text, options, words in (
        ("no base64!", {}, "no routed experts of vLLM or SGLang"),
        (flat, {}, "Pass num_layers and top_k"),
        (flat, {"num_layers": 2, "top_k": 2}, "no routed experts .*reshape"),
        (base64.b64encode(objects.getvalue()).decode(), {}, "no routed experts .*allow_pickle"),
        (base64.b64encode(numbers.getvalue()).decode(), {}, r"whole numbers .* float64 \(2, 2, 2\)"),
    ):
        with pytest.raises(ttr.ConfigError, match=words):
            decode_routed_experts(text, **options)


# --- files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [True, False])
def test_a_trace_comes_back(tmp_path, weights):
    known = (torch.rand(3, 2, 2), torch.rand(3, 2)) if weights else (None, None)
    trace = RoutingTrace.from_arrays(
        IDS, *known, num_experts=4, tokens=["a\n", "‽", "<"], layers=["x", "y"], prompt_tokens=2, fingerprint="f" * 64
    )
    found = ttr.load(ttr.save(tmp_path / "trace", trace))
    assert isinstance(found, ttr.RoutingTrace)
    assert torch.equal(found.ids, trace.ids)
    for name in ("weights", "entropy"):
        mine, theirs = getattr(found, name), getattr(trace, name)
        assert (mine is None and theirs is None) or torch.equal(mine, theirs)
    for name in ("tokens", "layers", "num_experts", "prompt_tokens", "fingerprint"):
        assert getattr(found, name) == getattr(trace, name)
    manifest = json.loads((tmp_path / "trace" / "ttrouting.json").read_text())
    assert (manifest["schema"], manifest["kind"]) == (1, "trace")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m["trace"].pop("tokens"), "lacks its content"),
        (lambda m: m.pop("trace"), "lacks its content"),
        (lambda m: m["trace"].update(num_experts="4"), "lacks its content"),
        (lambda m: m["trace"].update(num_experts=2), "holds no trace: Experts"),
        (lambda m: m["trace"].update(tokens=["a"]), "holds no trace: There are 1 tokens"),
    ],
)
def test_a_forged_trace(tmp_path, change, words):
    from ttrouting.artefacts import digest

    folder = ttr.save(tmp_path / "trace", RoutingTrace.from_arrays(IDS, num_experts=4))
    manifest = json.loads((folder / "ttrouting.json").read_text())
    change(manifest)
    manifest["sha256"] = digest(manifest)
    (folder / "ttrouting.json").write_text(json.dumps(manifest))
    with pytest.raises(ttr.ArtefactError, match=words):
        ttr.load(folder)
