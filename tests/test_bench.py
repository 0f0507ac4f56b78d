"""Do the straightforward versions compute what the strategies do, and does the benchmark count and report rightly?"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ttrouting as ttr
from commands import assert_refused, invoke
from oracles.double import InDouble, build_double
from ttrouting.baselines import dynamic_k_baseline, rerouting_baseline, scmoe_baseline
from ttrouting.baselines.routers import find_routers
from ttrouting.bench import bounds
from ttrouting.bench.expected import DECODE, FIRST, MEMORY, expected
from ttrouting.bench.measure import LiveBytes, Spread, interleaved, peak_bytes
from ttrouting.bench.models import FAMILIES, Spec
from ttrouting.bench.run import cut_prompts, random_prompts
from ttrouting.bench.versions import ADAPTED, ALL_LAYERS, BARE, STRAIGHTFORWARD, contenders, readings
from ttrouting.cli.bench import make_groups
from ttrouting.errors import ConfigError

TINY = "olmoe:3x32:experts=4,top_k=2,ffn=16,vocab=50,heads=2"
CASE = ("--random", TINY, "--prompt", "20,30")
NEW = 6
CPU = torch.device("cpu")


# --- fast paths equal straightforward versions --------------------------------------------------------


@pytest.fixture(params=["olmoe", "mixtral"])
def double(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Of a family that keeps raw weights and of one that renormalises them, in true double precision."""
    options = {"sliding_window": None} if request.param == "mixtral" else {}
    with InDouble():
        yield build_double(request.param, **options)


def prompts(rows: int = 2, length: int = 40) -> Tensor:
    return torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(1))


def adapted_ids(model: Any, strategy: Any, ids: Tensor, no_harm: bool = False) -> tuple[Tensor, Any]:
    with ttr.adapt(model, strategy, no_harm=no_harm) as adapted:
        out = adapted.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False
        )
        return out, adapted


def bare_ids(model: Any, ids: Tensor) -> Tensor:
    out: Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
    return out


@pytest.mark.parametrize("no_harm", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"layers": "all"},
        {"layers": "highest:0.5"},
        {"layers": "last:2", "interval": 4},
        {"layers": "highest:0.5", "interval": 4},
    ],
    ids=lambda o: "-".join(str(v) for v in o.values()),
)
def test_rerouting_equals_full_forwards_and_backwards(double: Any, options: dict[str, Any], no_harm: bool) -> None:
    ids = prompts()
    out, adapted = adapted_ids(double, ttr.Rerouting(lr=0.2, **options), ids, no_harm)
    expected_ids, delta = rerouting_baseline.generate(double, ids, NEW, lr=0.2, no_harm=no_harm, **options)
    assert torch.equal(out, expected_ids)
    torch.testing.assert_close(adapted.state.tensors["rerouting"]["delta"], delta, rtol=0, atol=1e-9)
    if not no_harm:
        assert delta.abs().max() > 0.3, "nothing was learned: the test cannot tell"


def test_rerouting_in_single_precision_equals_it_to_rounding() -> None:
    model = Spec.parse(TINY).build(64, torch.float32)
    ids = random_prompts(50, 2, 40, "cpu", seed=3)
    _, adapted = adapted_ids(model, ttr.Rerouting(layers="last:2", optimizer="adam"), ids)
    _, delta = rerouting_baseline.generate(model, ids, NEW, layers="last:2")
    torch.testing.assert_close(adapted.state.tensors["rerouting"]["delta"], delta, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_scmoe_equals_two_forwards_in_turn(double: Any, rank: int) -> None:
    ids = prompts()
    out, _ = adapted_ids(double, ttr.SCMoE(weak=f"rank:{rank}", beta=0.9), ids)
    assert torch.equal(out, scmoe_baseline.generate(double, ids, NEW, rank=rank, beta=0.9))
    assert not torch.equal(out, bare_ids(double, ids)), "the contrast changed nothing: the test cannot tell"


@pytest.mark.parametrize("p", [0.3, 0.5])
def test_dynamic_k_equals_zeroed_weights(double: Any, p: float) -> None:
    ids = prompts()
    out, adapted = adapted_ids(double, ttr.DynamicK(p=p), ids)
    assert torch.equal(out, dynamic_k_baseline.generate(double, ids, NEW, p=p))
    assert adapted.report.sequences[0].experts_per_token < double.config.num_experts_per_tok
    assert not torch.equal(out, bare_ids(double, ids)), "nothing was dropped: the test cannot tell"


def test_baselines_leave_no_trace(olmoe: Any, untouched: Any) -> None:
    ids = prompts()
    with untouched(olmoe):
        rerouting_baseline.generate(olmoe, ids, 1, steps=1)
        scmoe_baseline.generate(olmoe, ids, 2)
        dynamic_k_baseline.generate(olmoe, ids, 1)


def test_baselines_refuse_routers_they_do_not_know() -> None:
    model = build_double("deepseek_v3")
    with pytest.raises(ValueError, match="DeepseekV3TopkRouter"):
        find_routers(model)
    assert readings(model, [ttr.SCMoE()], True) == {}


def test_no_reading_where_a_baseline_lacks_an_option(olmoe: Any) -> None:
    lacking = [
        ttr.Rerouting(optimizer="sgd"),
        ttr.Rerouting(layers="entropy:0.5"),
        ttr.SCMoE(weak="top:1"),
        ttr.DynamicK(rule="relative"),
        ttr.DynamicK(gate=0.1),
    ]
    assert all(readings(olmoe, [strategy], True) == {} for strategy in lacking)
    assert readings(olmoe, [ttr.SCMoE(), ttr.DynamicK()], True) == {}
    assert set(readings(olmoe, [ttr.Rerouting(layers="last:2")], True)) == {STRAIGHTFORWARD, ALL_LAYERS}
    assert set(readings(olmoe, [ttr.Rerouting(layers="highest:0.5")], True)) == {STRAIGHTFORWARD}


# --- random models ------------------------------------------------------------------------------------


def test_a_spec_takes_its_family_s_proportions() -> None:
    assert Spec.parse("olmoe:16x2048") == Spec("olmoe", 16, 2048, 64, 8, 1024, 50304, 16)
    assert Spec.parse("mixtral:32x4096") == Spec("mixtral", 32, 4096, 8, 2, 14336, 32000, 32)
    assert Spec.parse("OLMoE:2x256:vocab=100,experts=16").experts == 16
    spec = Spec.parse("qwen3-moe:2x256")
    assert Spec.parse(str(spec)) == spec


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("olmoe", "FAMILY:LAYERSxHIDDEN"),
        ("olmoe:8", "FAMILY:LAYERSxHIDDEN"),
        ("olmo:8x64", "Did you mean 'olmoe'"),
        ("olmoe:8x64:expert=4", "Did you mean 'experts'"),
        ("olmoe:8x64:experts=four", "whole number"),
        ("olmoe:8x64:", "no option ''"),
        ("olmoe:0x64", "layers must be at least 1"),
        ("olmoe:8x64:vocab=0", "vocab must be at least 1"),
        ("olmoe:8x64:top_k=9,experts=8", "top_k=9 of 8"),
        ("olmoe:8x65", "hidden=65 is no multiple"),
        ("olmoe:8x64:ffn=12", "ffn=12 is no multiple"),
        ("olmoe:8x64:heads=3", "even parts"),
    ],
)
def test_bad_specs_are_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Spec.parse(text)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_spec_builds_what_it_says(family: str) -> None:
    spec = Spec.parse(f"{family}:2x64:experts=6,top_k=3,vocab=40,heads=4")
    model = spec.build(20, torch.float32)
    sites = ttr.find_sites(model)
    assert [(s.num_experts, s.top_k) for s in sites] == [(6, 3)] * 2
    assert model.config.vocab_size == 40
    ids = random_prompts(40, 2, 16, "cpu")
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (2, 20)  # nothing ends it


# --- bounds -------------------------------------------------------------------------------------------

# 2 heads of 8 in 16: four projections; a router of 4 rows; an expert of 3 x 8 x 16; head 50 x 16
TWO = "olmoe:2x16:experts=4,top_k=2,ffn=8,vocab=50,heads=2"
DENSE, EXPERT, HEAD = 4 * 16 * 16 + 4 * 16, 3 * 8 * 16, 50 * 16


@pytest.fixture(scope="module")
def two() -> bounds.Shape:
    model = Spec.parse(TWO).build(64, torch.float32)
    return bounds.Shape.of(model, ttr.find_sites(model))


def test_a_shape_is_read_off_the_model(two: bounds.Shape) -> None:
    assert two.layers == (bounds.Layer(DENSE, EXPERT, experts=4, top_k=2, scores=2 * 16, cached=2 * 16),) * 2
    assert two.head == HEAD
    assert two.homes == (0, 1)


def test_shared_experts_count_as_dense_and_grouped_heads_cache_less() -> None:
    model = Spec.parse("qwen2_moe:1x16:experts=4,top_k=2,ffn=8,vocab=50,heads=2").build(8, torch.float32)
    (layer,) = bounds.Shape.of(model, ttr.find_sites(model)).layers
    shared = 3 * 44 * 16 + 16  # an MLP of inner size 11/4 x 16, and its gate
    assert layer.dense == DENSE + shared
    assert layer.expert == EXPERT
    model = Spec.parse("mixtral:1x64:heads=8,experts=4,vocab=50").build(8, torch.float32)
    (layer,) = bounds.Shape.of(model, ttr.find_sites(model)).layers
    kv = model.config.num_key_value_heads
    assert kv < 8
    assert (layer.scores, layer.cached) == (2 * 64, 2 * 8 * kv)


def test_operations_by_hand(two: bounds.Shape) -> None:
    # 3 tokens: linear maps of two layers, 1 + 2 + 3 pairs of query and key, one row of logits
    linear, pairs = 3 * (DENSE + 2 * EXPERT), 6 * 32
    assert two.forward(3, 1) == 2 * (linear + pairs) + HEAD
    assert two.forward(3, 0, first=1) == linear + pairs
    assert two.forward(3, 0, k=[1.5, 2]) == 2 * (linear + pairs) - 3 * 0.5 * EXPERT
    assert two.backward(3, 2, first=0) == linear + 2 * pairs + 2 * HEAD  # only the layer above the delta
    assert two.backward(3, 2, first=1) == 2 * HEAD


def test_rerouting_by_hand(two: bounds.Shape) -> None:
    layer = 20 * (DENSE + 2 * EXPERT) + 210 * 32
    back = layer + 210 * 32
    known = bounds.Rerouting(two, 20, steps=3, first=0, known=True, no_harm=False)
    # the first step's forward is the whole one: 2 more of the tail, the last pass, 3 backwards, 19 rows of logits
    assert known.ours == (1 + 2 + 1) * 2 * layer + 3 * back + (2 * 3 * 19 + 1) * HEAD
    top = bounds.Rerouting(two, 20, steps=3, first=1, known=False, no_harm=True)
    # 8 of 19 are held back and judged twice; the tail is one layer, run for each step and at the end
    assert top.ours == 2 * layer + (3 + 1) * layer + (2 * 3 * 11 + 2 * 8 + 1) * HEAD
    rolled_back = bounds.Rerouting(two, 20, steps=3, first=1, known=False, no_harm=True, kept=False)
    assert rolled_back.ours == top.ours + 2 * layer
    assert known.straightforward(0) == 3 * (2 * layer + back + 2 * 20 * HEAD) + 2 * layer + HEAD
    assert top.straightforward(1) == 3 * (2 * layer + 2 * 20 * HEAD) + 2 * (2 * layer) + 20 * HEAD + HEAD


def test_bytes_by_hand(two: bounds.Shape) -> None:
    # 1 sequence: 2 of 4 experts a layer; 10 tokens of 32 numbers in the cache of each layer
    assert two.read(1, 10) == 2 * (DENSE + 2 * EXPERT) + HEAD + 2 * 10 * 32
    assert two.read(1, 10, rows=2) == 2 * (DENSE + 3 * EXPERT) + HEAD + 2 * 2 * 10 * 32
    # 2 sequences that choose by chance leave an expert out with 1/4; the weak rows find at most 1 new one each
    assert two.read(2, 0) == 2 * (DENSE + 3 * EXPERT) + HEAD
    assert two.read(2, 0, rows=2) == 2 * (DENSE + 4 * EXPERT) + HEAD


def test_the_bounds_of_a_real_shape() -> None:
    hidden = 2048  # OLMoE-1B-7B
    layer = bounds.Layer(4 * hidden**2 + 64 * hidden, 3 * 1024 * hidden, 64, 8, 2 * hidden, 2 * hidden)
    shape = bounds.Shape((layer,) * 16, 50304 * hidden, tuple(range(16)))
    assert shape.read(1, 0, rows=2) / shape.read(1, 0) == pytest.approx(1.09, abs=0.01)
    count = bounds.Rerouting(shape, 512, steps=5, first=11, known=True, no_harm=False)
    # in units of one layer's forward: a head is 1.53, attention scores are left out
    ours, same, every = (16 + 4 * 5 + 5 * 4 + 10 * 1.53 + 5), 5 * (16 + 4 + 3.06) + 16, 5 * (16 + 15 + 3.06) + 16
    assert count.ours / count.straightforward(11) == pytest.approx(ours / same, abs=0.02)
    assert count.ours / count.straightforward(0) == pytest.approx(ours / every, abs=0.02)


# --- measuring ----------------------------------------------------------------------------------------


def test_spreads_are_of_ratios_within_a_repetition() -> None:
    spread = Spread.of_ratios([1.0, 20.0, 3.0, 4.0, 5.0], [1.0, 10.0, 1.0, 1.0, 1.0])
    assert (spread.median, spread.low, spread.high, spread.n) == (3, 2, 4, 5)
    assert Spread.of([7.0]) == Spread(7, 7, 7, 1)


def test_versions_take_turns_and_the_warm_up_is_dropped() -> None:
    seen: list[str] = []

    def version(name: str) -> Any:
        def call(clock: Any) -> None:
            seen.append(name)
            for _ in range(3):
                clock(torch.zeros(1, 1, dtype=torch.int64), None)

        return call

    found = interleaved({name: version(name) for name in "abc"}, CPU, repeats=3)
    rounds = ["".join(seen[i : i + 3]) for i in range(0, len(seen), 3)]
    assert all(sorted(r) == list("abc") for r in rounds)
    assert len(rounds) == 4
    assert len(set(rounds)) > 1
    assert all(len(timings) == 3 and all(t.first > 0 for t in timings) for timings in found.values())


def test_live_bytes_follow_what_lives() -> None:
    weight = torch.randn(1000, requires_grad=True)
    with LiveBytes() as live:
        doubled = weight * 2  # 4000 bytes
        root = doubled.exp()  # 4000, kept for the backward pass
        assert live.now == 8000
        del doubled
        assert live.now == 4000
        loss = root.view(10, 100).sum()  # a view is nothing new
        assert live.now == 4004
        del root
        assert live.now == 4004  # the graph holds it
        loss.backward()
        assert live.now == 4004  # the graph is gone, the gradient is there
        weight.grad.add_(1)  # in place
        del loss
        weight.grad = None
        assert live.now == 0
    assert live.peak >= 8004
    torch.ones(10)
    assert live.now == 0


def test_peak_bytes_of_a_call() -> None:
    def call(_clock: Any) -> None:
        for _ in range(3):
            held = torch.zeros(1000), torch.zeros(500)
            del held

    assert peak_bytes(call, CPU) == 4 * 1500


def test_prompts_are_cut_from_different_places_of_a_text() -> None:
    assert cut_prompts(torch.arange(6), 2, 4).tolist() == [[0, 1, 2, 3], [3, 4, 5, 0]]


def test_expected_bounds_follow_the_report() -> None:
    model = Spec.parse(TINY).build(64, torch.float32)
    ids = random_prompts(50, 2, 40, "cpu")
    groups = {
        "rerouting": [ttr.Rerouting(layers="last:2")],
        "dynamic_k": [ttr.DynamicK(p=0.3)],
        "scmoe": [ttr.SCMoE()],
        "both": [ttr.Rerouting(), ttr.DynamicK()],
    }
    with contenders(model, groups, no_harm=False) as found:
        shape = bounds.Shape.of(model, found[0].adapted.sites)
        for contender in found:
            contender.adapted.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
        rerouting, dynamic_k, scmoe, both = (expected(c, shape, 40, 2, 2) for c in found)
        count = bounds.Rerouting(shape, 40, 5, first=1, known=True, no_harm=False)
        of_one = {version: rerouting[FIRST, version] / 2 for version in (ADAPTED, STRAIGHTFORWARD, ALL_LAYERS, BARE)}
        assert of_one == {
            ADAPTED: count.ours,
            STRAIGHTFORWARD: count.straightforward(1),
            ALL_LAYERS: count.straightforward(0),
            BARE: shape.forward(40, 1),
        }
        assert rerouting[DECODE, ADAPTED] == rerouting[DECODE, BARE] == shape.read(2, 41)
        layers = [s.experts_per_layer for s in found[1].adapted.report.sequences]
        k = [(a + b) / 2 for a, b in zip(*layers, strict=True)]
        assert dynamic_k[FIRST, ADAPTED] == pytest.approx(2 * shape.forward(40, 1, k))
        assert dynamic_k[FIRST, ADAPTED] < dynamic_k[FIRST, BARE] == dynamic_k[FIRST, STRAIGHTFORWARD]
        assert dynamic_k[DECODE, ADAPTED] == pytest.approx(shape.read(2, 41, k))
        both_rows = shape.forward(40, 1) + shape.forward(40, 1, [1, 1, 1])
        assert scmoe[FIRST, ADAPTED] == scmoe[FIRST, STRAIGHTFORWARD] == 2 * both_rows
        assert scmoe[DECODE, ADAPTED] == shape.read(2, 41, rows=2)
        assert scmoe[DECODE, STRAIGHTFORWARD] == shape.read(2, 41) + shape.read(2, 41, [1, 1, 1])
        assert both == {}


# --- the command --------------------------------------------------------------------------------------


def run(*arguments: str) -> Any:
    return invoke("bench", "--repeats", "1", "--new-tokens", "2", "--device", "cpu", *arguments)


def test_the_command_reports_every_comparison() -> None:
    done = run(*CASE, "--batch", "2", "--set", "dynamic_k.p=0.5", "-s", "rerouting.steps=1", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert [(r["prompt"], r["batch"], r["contender"]) for r in found["results"]] == [
        (length, 2, name) for length in (20, 30) for name in ("rerouting", "scmoe", "dynamic_k")
    ]
    for result in found["results"]:
        assert result["model"] == TINY
        assert len(result["outcomes"]) == 2
        assert all(count > 0 for count in result["counts"].values())
        pairs = [(c["against"], c["quantity"]) for c in result["comparisons"]]
        others = (BARE, STRAIGHTFORWARD, *([ALL_LAYERS] if result["contender"] == "rerouting" else []))
        assert pairs == [(v, q) for v in others for q in (FIRST, DECODE, MEMORY)]
        for comparison in result["comparisons"]:
            ours, theirs, ratio = (comparison[name] for name in ("ours", "theirs", "ratio"))
            assert ratio["n"] == 1
            assert ratio["median"] == pytest.approx(ours["median"] / theirs["median"])
            if comparison["quantity"] == MEMORY:
                assert comparison["bound"] is None
            else:
                assert comparison["over_bound"] == pytest.approx(ratio["median"] / comparison["bound"])
    assert found["results"][2]["strategies"][0]["p"] == 0.5
    assert found["machine"]["threads"] == torch.get_num_threads()
    assert found["versions"]["torch"] == torch.__version__


def test_the_table_shows_ratios_and_bounds() -> None:
    done = run("--random", TINY, "--prompt", "20", "-a", "scmoe")
    assert done.exit_code == 0, done.stderr
    title, header, *rows = done.stdout.strip().splitlines()
    assert title.startswith(f"scmoe  1 x 20 tokens, {TINY}")
    assert header.split() == ["quantity", "against", "ours", "theirs", "ratio", "bound", "ratio/bound"]
    assert len(rows) == 6
    assert "tok/s" in rows[1]
    assert "MiB" in rows[2]


def test_values_of_an_option_are_contenders_of_their_own() -> None:
    groups = make_groups(
        ["rerouting", "scmoe,dynamic_k"],
        ["rerouting.steps=2", "dynamic_k.p=0.4"],
        ["rerouting.layers=last:1,all", "scmoe.beta=0.1,0.3"],
    )
    assert list(groups) == [
        "rerouting layers=last:1",
        "rerouting layers=all",
        "scmoe,dynamic_k beta=0.1",
        "scmoe,dynamic_k beta=0.3",
    ]
    assert groups["rerouting layers=all"] == [ttr.Rerouting(steps=2, layers="all")]
    assert groups["scmoe,dynamic_k beta=0.3"] == [ttr.SCMoE(beta=0.3), ttr.DynamicK(p=0.4)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", "64,x"], "--prompt takes whole numbers"),
        (["--batch", "0"], "--batch takes whole numbers"),
        (["--random", "olmoe:4"], "FAMILY:LAYERSxHIDDEN"),
        (["--random", TINY, "--model", "some/model"], "exclude each other"),
        (["--random", TINY, "--file", "text.txt"], "needs a tokenizer"),
        (["--random", TINY, "--device", "map"], "one device"),
        (["--adapt", "reroute"], "Did you mean 'rerouting'"),
        (["-a", "scmoe", "--set", "rerouting.steps=2"], "not used"),
        (["-a", "scmoe", "--vary", "rerouting.steps=2,3"], "not used"),
        (["-a", "scmoe", "--vary", "scmoe.beta"], "scmoe.beta"),
        (["--random", TINY, "--plot", "plot.txt"], "write one of .png"),
        (["--random", TINY, "--plot", "no/such/folder/plot.png"], "there is no folder"),
    ],
)
def test_bad_options_are_refused_in_one_line(arguments: list[str], words: str) -> None:
    assert_refused(run(*arguments), words)


def test_a_plot_without_matplotlib_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = run("--random", TINY, "--plot", str(tmp_path / "plot.png"))
    assert done.exit_code == 2
    assert "pip install 'ttrouting[viz]'" in done.stderr
    assert "warm-up" not in done.stderr


def test_a_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = run(
        "--random", TINY, "--prompt", "20,30", "--batch", "1,2", "-a", "scmoe", "--plot", str(tmp_path / "a.png")
    )
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
