"""Inspections: differences counted by hand, what each view shows, and the command around them."""

import base64
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import ttrouting as ttr
from families.build import build
from inspections import E, K, L, T, inspection, made
from ttrouting.cli import app
from ttrouting.cli.models import encode, load_model
from ttrouting.inspection.compare import compare
from ttrouting.inspection.page import page, write_page
from ttrouting.inspection.record import Inspection, inspect_prompt
from ttrouting.inspection.terminal import TerminalView
from ttrouting.trace import RoutingTrace

# --- differences ------------------------------------------------------------------------------------------


def test_gained_and_lost_are_set_differences():
    base, adapted = made(0), made(1, drop=0.3)
    found = {change.index: change for change in compare(base, adapted).layers()}
    for layer in range(L):
        gained, lost, changed = {}, {}, 0
        for t in range(T):
            before, after = (set(trace.ids[t, layer].tolist()) - {-1} for trace in (base, adapted))
            changed += before != after
            for expert in after - before:
                gained[expert] = gained.get(expert, 0) + 1
            for expert in before - after:
                lost[expert] = lost.get(expert, 0) + 1
        change = found[layer]
        assert change.changed == pytest.approx(changed / T)
        for counts, mean, experts in (
            (gained, change.gained, change.experts_gained),
            (lost, change.lost, change.experts_lost),
        ):
            assert mean == pytest.approx(sum(counts.values()) / T)
            assert {expert: round(share * T) for expert, share in experts} == counts
            shares = [share for _, share in experts]
            assert shares == sorted(shares, reverse=True)
        assert change.k == pytest.approx(tuple(float((t.ids[:, layer] >= 0).sum()) / T for t in (base, adapted)))
        assert change.entropy == pytest.approx(tuple(float(t.entropy[:, layer].mean()) for t in (base, adapted)))


def test_the_most_changed_layer_comes_first():
    base = made(0)
    ids = base.ids.clone()
    ids[:, 2] = base.ids[:, 2].roll(1, 0)
    ids[0, 1] = (base.ids[0, 1] + 1) % E
    found = compare(
        base, RoutingTrace.from_arrays(ids, num_experts=E, tokens=base.tokens, layers=base.layers)
    ).layers()
    assert [change.index for change in found] == [2, 1, 0]
    assert (found[2].changed, found[2].experts_gained, found[2].entropy) == (0.0, [], None)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: made(1, tokens=11), r"differ in their tokens \(12 and 11"),
        (lambda: made(1, words=["x"] * T), "differ in their tokens"),
        (lambda: made(1, layers=2), r"differ in their layers \(3 and 2"),
        (lambda: made(1, experts=9), r"differ in their num_experts \(8 and 9\)"),
    ],
)
def test_what_cannot_be_compared(other, words):
    with pytest.raises(ttr.ConfigError, match=f"{words}.*Trace the same text on the same model"):
        compare(made(0), other())


# --- a prompt ---------------------------------------------------------------------------------------------


def prompt_of(tokenizer, text):
    return tokenizer(text, return_tensors="pt", return_token_type_ids=False)


def test_a_prompt_is_traced_twice_on_the_same_tokens(olmoe64, tokenizer):
    inputs = prompt_of(tokenizer, "some words to read, and some more of them")
    delta = torch.randn(4, E, generator=torch.Generator().manual_seed(5))
    with ttr.adapt(olmoe64, ttr.StaticRouting(delta=delta), tokenizer=tokenizer) as adapted:
        found = inspect_prompt(adapted, tokenizer, inputs, 3)
        text = adapted.generate(**inputs, max_new_tokens=3, do_sample=False)
        after = adapted(inputs["input_ids"]).logits[0, -1].softmax(-1)
        with adapted.tracing() as traces:
            adapted(text)
            with adapted.paused():
                adapted(text)
    before = olmoe64(inputs["input_ids"]).logits[0, -1].softmax(-1)
    for trace, expected in zip((found.adapted, found.base), traces, strict=True):
        assert torch.equal(trace.ids.sort(-1).values, expected.ids.sort(-1).values)
        assert trace.tokens == expected.tokens
        assert trace.prompt_tokens == inputs["input_ids"].shape[1]
    assert found.difference.changed.any()
    letters = {tokenizer.decode([i]): i for i in range(96)}
    for one in found.next_tokens:
        assert one.before == pytest.approx(float(before[letters[one.text]]), abs=1e-6)
        assert one.after == pytest.approx(float(after[letters[one.text]]), abs=1e-6)
    shown = [one.after for one in found.next_tokens]
    assert shown == sorted(shown, reverse=True)
    assert {int(after.argmax()), int(before.argmax())} <= {letters[one.text] for one in found.next_tokens}


def test_without_strategies_there_is_base_alone(olmoe, tokenizer):
    with ttr.adapt(olmoe, [], tokenizer=tokenizer) as adapted:
        found = inspect_prompt(adapted, tokenizer, prompt_of(tokenizer, "some words"))
    assert (found.adapted, found.difference, found.curves) == (None, None, ())
    assert len(found.base.tokens) == 10
    assert all(one.after is None for one in found.next_tokens)


def test_the_curve_of_each_optimisation_ends_with_the_loss_after_it(olmoe64, tokenizer):
    inputs = prompt_of(tokenizer, "a longer text, so that there is something to learn from: " * 2)
    strategy = ttr.Rerouting(steps=3, interval=2)
    with ttr.adapt(olmoe64, strategy, tokenizer=tokenizer, no_harm=False) as adapted:
        found = inspect_prompt(adapted, tokenizer, inputs, 3)
    phases = found.report.sequences[0].strategies["rerouting"]["adaptations"]
    assert [curve.name for curve in found.curves] == ["rerouting, 1 of 2", "rerouting, 2 of 2"]
    for curve, phase in zip(found.curves, phases, strict=True):
        assert curve.losses == (*phase["curve"], phase["loss_after"])
        assert len(curve.losses) == 4


# --- terminal ---------------------------------------------------------------------------------------------


def shown(found, width=100, colour=None):
    console = Console(width=width, color_system=colour, force_terminal=colour is not None, markup=False, emoji=False)
    with console.capture() as capture:
        console.print(TerminalView(found))
    return capture.get()


def test_the_terminal_names_what_changed():
    found = inspection()
    text = shown(found)
    assert "10 prompt tokens, 2 written, 3 MoE layers, 8 experts, 3.00 a token; adapted" in text
    first = found.difference.layers()[0]
    (line,) = [li for li in text.splitlines() if re.match(rf"\s+{first.index} +\d+ %", li)]
    assert f"{first.gained:.2f}" in line
    assert f"{first.experts_gained[0][0]} +{100 * first.experts_gained[0][1]:.0f} %" in line
    assert "25.0 %" in text
    assert "rerouting" in text


def test_loads_are_bars_one_for_each_expert():
    text = shown(Inspection("one", made(0)))
    load = made(0).load
    for layer in range(L):
        (bars,) = re.findall(rf"^{layer} ([·▁▂▃▄▅▆▇█]{{{E}}})\s*$", text, re.MULTILINE)
        heights = ["·▁▂▃▄▅▆▇█".index(bar) for bar in bars]
        assert (np.argsort(heights, kind="stable")[-1]) in np.flatnonzero(load[layer] == load[layer].max())
        assert [h == 0 for h in heights] == (load[layer] == 0).tolist()
    assert f"full bar {100 * float(load.max()):.0f} %" in text


def test_many_experts_are_folded_into_the_width():
    text = shown(Inspection("wide", made(0, experts=128)), width=50)
    assert "each column the busiest of 3" in text
    assert max(map(len, text.splitlines())) <= 50


def test_tokens_have_their_top_expert_as_colour_or_number():
    found = inspection()
    layer = found.difference.layers()[0].index
    text = shown(found)
    top, changed = found.adapted.top[:, layer].tolist(), found.difference.changed[:, layer].tolist()
    assert f"Ab[{top[0]}{'*' if changed[0] else ''}]" in text
    assert "[b][" in text  # no markup
    assert ":smile:" in text
    coloured = shown(found, colour="truecolor")
    assert "\x1b[1;4;30;48;2;" in coloured  # another set of experts: underlined
    assert "\x1b" not in text


def test_long_texts_are_cut_and_told():
    assert "the last 240 of 1000 tokens" in shown(Inspection("long", made(0, tokens=1000)))


def test_a_terminal_without_unicode():
    console = Console(width=100, color_system=None, legacy_windows=False)
    options = console.options.copy()
    options.encoding = "ascii"
    with console.capture() as capture:
        for part in TerminalView(Inspection("one", made(0))).__rich_console__(console, options):
            console.print(part)
    assert not set("▁▂▃▄▅▆▇█") & set(capture.get())


# --- page and picture -------------------------------------------------------------------------------------


def facts_of(text):
    return json.loads(re.search(r'<script type="application/json" id="facts">(.*?)</script>', text, re.DOTALL)[1])


def array(text, dtype, *shape):
    return np.frombuffer(base64.b64decode(text), dtype).reshape(shape)


def test_the_page_holds_the_traces_and_ends_where_it_should():
    found = inspection()
    text = page(found)
    facts = facts_of(text)
    for name in ("base", "adapted"):
        trace = getattr(found, name)
        assert (array(facts[name]["ids"], "<i2", T, L, K) == trace.ids.numpy()).all()
        assert (array(facts[name]["weights"], "<f4", T, L, K) == trace.weights.numpy()).all()
        assert (array(facts[name]["entropy"], "<f4", T, L) == trace.entropy.numpy()).all()
    assert facts["tokens"] == list(found.base.tokens)
    assert facts["curves"] == [{"name": "rerouting", "losses": [2.5, 2.25, None, 2.0], "outcome": "accepted"}]
    assert text.count("</script>") == 2  # the token of that name did not end anything
    assert "<h1>a &lt;title&gt;</h1>" in text
    assert not re.findall(r"""(?:src|href)\s*=|url\(|@import|https?://(?!www\.w3\.org/2000/svg)""", text)
    assert "{{" not in text


def test_a_page_has_a_limit_and_a_place(tmp_path):
    with pytest.raises(ttr.ArtefactError, match=r"Cannot write .*Give another --html"):
        write_page(inspection(), tmp_path / "nowhere" / "page.html")
    ids = np.zeros((16_001, 1, 1), dtype=np.int16)
    with pytest.raises(ttr.ConfigError, match=r"shows up to 16000 tokens, this trace has 16001"):
        write_page(Inspection("long", RoutingTrace.from_arrays(ids, num_experts=1)), tmp_path / "page.html")


def test_the_picture_shows_loads_and_changes():
    pytest.importorskip("matplotlib")
    from ttrouting.inspection.picture import picture

    found = inspection()
    base, adapted, shift, gained, *_scales = picture(found).axes
    for axis, expected in (
        (base, found.base.load),
        (adapted, found.adapted.load),
        (shift, found.adapted.load - found.base.load),
        (gained, found.difference.gained.sum(-1).T),
    ):
        assert np.allclose(axis.images[0].get_array(), expected.numpy())
    assert len(picture(Inspection("one", made(0))).axes) == 2  # a map and its scale


# --- command ----------------------------------------------------------------------------------------------

TEXT = "some words to read, and some more of them after these"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("models") / "olmoe"
    model = build("olmoe", max_position_embeddings=512)
    model.generation_config.eos_token_id = None
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def run(*arguments, code=0, stdin=None):
    done = CliRunner().invoke(app, ["inspect", *map(str, arguments)], input=stdin)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.stderr
    return done


def test_the_command_is_adapt_and_trace(folder, tmp_path):
    files = {"html": tmp_path / "page.html", "png": tmp_path / "picture.png", "save": tmp_path / "traces"}
    options = [x for name, path in files.items() for x in (f"--{name}", path)]
    done = run(TEXT, "-m", folder, "-a", "dynamic_k", "-s", "dynamic_k.p=0.4", "--json", *options)
    facts = json.loads(done.stdout)
    model, tokenizer = load_model(folder)
    inputs = encode(model, tokenizer, [TEXT])
    with ttr.adapt(model, ttr.DynamicK(p=0.4), tokenizer=tokenizer) as adapted, adapted.tracing() as traces:
        adapted.generate(**inputs, max_new_tokens=1, do_sample=False)
        with adapted.paused():
            adapted(**inputs)
    for name, trace in zip(("adapted", "base"), traces, strict=True):
        assert torch.equal(ttr.load(files["save"] / name).ids, trace.ids)
        assert facts["traces"][name]["k"] == trace.k.tolist()
        assert np.allclose(facts["traces"][name]["load"], trace.load.numpy())
    assert facts["tokens"] == list(TEXT)
    assert len(facts["changes"]) == 4
    assert facts["files"] == [
        str(files["save"] / "base"),
        str(files["save"] / "adapted"),
        *map(str, (files["html"], files["png"])),
    ]
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    assert facts_of(files["html"].read_text())["tokens"] == list(TEXT)

    again = run("--trace", files["save"] / "base", "--trace", files["save"] / "adapted")
    assert "Layers most changed" in again.stdout
    assert "Layers most changed" not in run("--trace", files["save"] / "base").stdout


def test_tables_go_to_stdout_and_files_are_named_on_stderr(folder, tmp_path):
    done = run("-", "-m", folder, "--max-new-tokens", "2", "--html", tmp_path / "page.html", stdin=TEXT)
    assert f"{len(TEXT)} prompt tokens, 2 written" in done.stdout
    assert "page.html" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Give one prompt"),
        (["a", "b"], "Give one prompt .* got 2"),
        (["a", "--html", "nowhere/page.html"], "there is no folder nowhere. Give --html a file"),
        (["a", "--png", "."], "is a folder. Give --png a file"),
        (["a", "--save", __file__], "is a file. Give --save a folder"),
        (["a", "--trace", "x"], "--trace shows what was saved"),
        (["--trace", "x"], "holds no ttrouting.json"),
        (["--trace", "x", "--trace", "x", "--trace", "x"], "--trace takes one trace, or base and adapted"),
    ],
)
def test_what_the_command_refuses(arguments, words):
    done = run(*arguments, code=2)
    assert done.stdout == ""
    assert re.search(words, done.stderr)


def test_strategies_are_no_trace(tmp_path):
    ttr.save(tmp_path / "s", ttr.SCMoE())
    assert "holds no trace" in run("--trace", tmp_path / "s", code=2).stderr
    assert Path(tmp_path / "s").is_dir()


def test_what_the_documentation_prints_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parent.parent / "docs" / "inspect.md").read_text()
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, {})
    assert isinstance(ttr.load("my_trace"), RoutingTrace)
    assert capsys.readouterr().out.startswith("torch.Size([")


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = run("a", "--png", tmp_path / "picture.png", code=2)
    assert '--png needs matplotlib. Install it: pip install "ttrouting[viz]"' in done.stderr
