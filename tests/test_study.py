"""The study on the pocket model: its arithmetic, its page from a small file, its plan, its oracles, a small run."""

import json
import random

import numpy as np
import pytest
from scipy.stats import binomtest

import ttrouting as ttr

pytest.importorskip("lm_eval")

from demos import artefacts
from demos.study import arithmetic, collect, earlier, example, oracles, page, pictures, tables
from demos.study import run as study
from demos.study.place import Asked, Place
from demos.study.plan import CONTROLS, SEARCHES, SHIFTED, TRAINED, VARIANTS, WORKED, planned
from ttrouting.evaluation.tuning import trials
from ttrouting.pocket.measure import complete
from ttrouting.pocket.skills import is_correct, sample, shifted_pairs, trained_pairs

N = 200


def answers(share, seed, n=N):
    draw = random.Random(seed)
    return "".join("01"[draw.random() < share] for _ in range(n))


def better(right, share, seed):
    """The same answers, of the wrong ones a share put right."""
    draw = random.Random(seed)
    return "".join("1" if one == "1" or draw.random() < share else "0" for one in right)


def cost(times=1.0, experts=2.0):
    names = ("seconds", "first_token_seconds", "adapt_seconds", "prompt_tokens", "new_tokens", "tokens_per_second")
    return {**dict.fromkeys(names, times), "experts_per_token": experts, "flops": 1e9 * times}


def variant(right, times=1.0, experts=2.0):
    ratios = dict.fromkeys(("seconds", "first_token_seconds", "tokens_per_second", "flops"), times)
    return {"right": right, "cost": cost(times, experts), "ratios": ratios, "rolled_back": 0.25, "adapted": 0.75}


@pytest.fixture
def results():
    """Seven shifted sets with room, four trained ones; one variant helps, one saves, one hurts."""
    sets, measured = {}, {}
    for i, name in enumerate((*SHIFTED, *WORKED)):
        base = answers(0.4 if name in SHIFTED else 0.95, i)
        hurt = "".join("0" if random.Random(f"{i}{j}").random() < 0.2 else one for j, one in enumerate(base))
        sets[name] = {
            "base": base,
            "cost": cost(),
            "variants": {
                "rerouting": variant(better(base, 0.4, i + 50), 6.0),
                "dynamic_k_top_p": variant(base, 0.9, 1.4),
                "scmoe": variant(hurt, 1.8),
            },
        }
        if name in SHIFTED:
            right = {
                "base": base,
                "own_label": better(base, 0.9, i),
                "wrong_label": hurt,
                "transfer": better(base, 0.6, i),
            }
            paired = {k: {"difference": share(v) - share(base), "interval": [0.1, 0.3]} for k, v in right.items()}
            forced = {"base": "0" * N, "wrong_label": answers(0.7, i + 90)}
            measured[name] = {"n": N, "right": right, "forced": forced, "paired": paired}
    about = {
        "fingerprint": "0123456789abcdef",
        "n": N,
        "seed": 0,
        "versions": {"torch": "2"},
        "hardware": {"system": "Linux", "processor": "", "threads": 1},
        "started": "2026-01-01T00:00:00",
    }
    report = {
        "outcome": "accepted",
        "loss_before": 2.0,
        "loss_after": 1.0,
        "held_back_before": 2.1,
        "held_back_after": 1.5,
        "curve": [2.0, 1.4, 1.1],
        "experts": [{"layer": "layers.0", "gained": [(3, 0.2)], "lost": [(5, -0.1)]}],
    }
    shown = {"set": "reverse_letters", "number": 4, "looked_at": 40, "put_right": 9, "prompt": "Q: a\nA:"}
    shown |= {"answer": "b", "base": "c", "adapted": "b", "strategy": ttr.Rerouting().to_dict(), "report": report}
    options = {"rerouting": {"6": [ttr.Rerouting().to_dict()]}, "scmoe": {"6": [ttr.SCMoE(beta=0.1).to_dict()]}}
    found = {"schema": 1, "runs": {"6": sets}, "oracles": {"6": measured}, "options": options, "example": shown}
    return json.loads(json.dumps({**found, "about": about}))


def share(right):
    return right.count("1") / len(right)


# --- arithmetic ----------------------------------------------------------------------------------------------


def test_differences_and_p_values(results):
    """McNemar's exact test by scipy's binomial test, Holm's correction in plain lines."""
    (comparison,) = arithmetic.comparisons(results).values()
    p_values = {}
    for name, one in comparison["tasks"].items():
        kept = results["runs"]["6"][name]
        for other, found in one["variants"].items():
            pairs = list(zip(kept["base"], kept["variants"][other]["right"], strict=True))
            won, lost = pairs.count(("0", "1")), pairs.count(("1", "0"))
            assert (found["won"], found["lost"], found["n"]) == (won, lost, N)
            assert found["difference"] == pytest.approx((won - lost) / N)
            p = binomtest(won, won + lost).pvalue if won + lost else 1.0
            assert found["p_value"] == pytest.approx(p)
            assert found["difference_interval"][0] <= found["difference"] <= found["difference_interval"][1]
            p_values[name, other] = p
    assert comparison["family"] == len(p_values) == 3 * (len(SHIFTED) + len(WORKED))
    ordered = sorted(p_values, key=p_values.get)
    for rank, (name, other) in enumerate(ordered):
        holm = max(min(1.0, (len(ordered) - i) * p_values[key]) for i, key in enumerate(ordered[: rank + 1]))
        found = comparison["tasks"][name]["variants"][other]
        assert found["p_holm"] == pytest.approx(holm)
        expected = "cannot tell" if holm >= 0.05 else "helps" if found["difference"] > 0 else "hurts"
        assert found["verdict"] == expected


def test_questions_that_were_not_answered_are_left_out():
    found = arithmetic.cell("110-0", "01100")
    assert (found["n"], found["failed"], found["won"], found["lost"]) == (4, 1, 1, 1)
    with pytest.raises(ValueError, match="5 questions of base are paired with 4"):
        arithmetic.cell("11000", "1100")


def test_the_share_of_the_gap():
    base = {"a": "1000000000", "b": "1000000000", "c": "1111111111"}
    other = {"a": "1100000000", "b": "1110000000", "c": "1111111111"}
    transfer = {"a": "1111100000", "b": "1111000000", "c": "1111111111"}
    gap = arithmetic.gap_closed(base, other, transfer)
    assert gap.sets == pytest.approx({"a": 1 / 4, "b": 2 / 3})
    assert gap.share == pytest.approx((1 / 4 + 2 / 3) / 2)
    assert gap.left_out == ("c",)
    assert gap.interval[0] < gap.share < gap.interval[1]
    assert arithmetic.gap_closed({"c": base["c"]}, {"c": other["c"]}, {"c": transfer["c"]}) is None


def test_the_interval_of_the_gap_holds_the_truth():
    """Simulated: base 0.4, variant 0.55, oracle 0.7, so half of the gap is closed."""
    held = 0
    for seed in range(40):
        u = np.random.default_rng(seed).random((3, 300))
        texts = [{str(i): "".join("01"[int(x < p)] for x in u[i]) for i in range(3)} for p in (0.4, 0.55, 0.7)]
        low, high = arithmetic.gap_closed(*texts, seed=seed).interval
        held += low <= 0.5 <= high
    assert held >= 34  # 38 expected


def test_targets(results):
    room, closed, harm, saved, worked = arithmetic.targets(results, arithmetic.comparisons(results)[6], 6)
    gains = [share(o["right"]["transfer"]) - share(o["right"]["base"]) for o in results["oracles"]["6"].values()]
    assert min(gains) > 0.15
    assert [one.met for one in (room, closed, harm, saved, worked)] == [True, True, False, True, False]
    shares = []
    for name in SHIFTED:
        right = results["oracles"]["6"][name]["right"]
        gained = share(results["runs"]["6"][name]["variants"]["rerouting"]["right"]) - share(right["base"])
        shares.append(gained / (share(right["transfer"]) - share(right["base"])))
    assert f"rerouting closes {100 * sum(shares) / len(shares):.0f} %" in closed.facts
    assert "dynamic_k_top_p drops 30 %" in saved.facts
    assert "scmoe on " in harm.facts


def test_advice(results):
    """A variant's kind follows from what the fixture made of it; a combination must beat its parts."""
    sets = results["runs"]["6"]
    for i, name in enumerate(sets):
        both = better(sets[name]["base"], 0.4 if name == SHIFTED[0] else 0.0, i)
        sets[name]["variants"]["c3po"] = variant(both, 20.0)
        sets[name]["variants"]["task_delta"] = dict(sets[name]["variants"]["rerouting"])
        sets[name]["variants"]["task_delta+dynamic_k"] = {
            **sets[name]["variants"]["rerouting"],
            "cost": cost(5.0, 1.2),
        }
        sets[name]["variants"]["task_delta+scmoe"] = dict(sets[name]["variants"]["rerouting"])
    kinds, kind = {}, ""
    lines = tables.advice(arithmetic.comparisons(results)[6]).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    for line in lines[2:]:
        told, name = (one.strip("*` ") for one in line.split("|")[1:3])
        kind = told or kind
        kinds[name] = kind
    assert kinds == {
        "rerouting": "Use",
        "task_delta": "Use",
        "task_delta+dynamic_k": "Use",
        "c3po": "Helps now and then",
        "task_delta+scmoe": "No better than a part of it",
        "dynamic_k_top_p": "Use for fewer experts",
        "scmoe": "Not for accuracy",
    }


def test_what_is_not_there_is_not_judged(results):
    results["runs"]["6"], results["oracles"]["6"] = {}, {}
    assert [one.met for one in arithmetic.targets(results, arithmetic.comparisons(results)[6], 6)] == [None] * 5


# --- page ----------------------------------------------------------------------------------------------------


def test_the_page_from_its_file_alone(results, tmp_path, monkeypatch):
    file = tmp_path / "results.json"
    file.write_text(collect.written(results))
    assert page.read_results(file) == results
    monkeypatch.setattr("sys.argv", ["page", "--results", str(file), "--page", str(tmp_path / "results.md")])
    page.main()
    text = (tmp_path / "results.md").read_text()
    one = results["runs"]["6"]["reverse_letters"]
    gain = 100 * (share(one["variants"]["rerouting"]["right"]) - share(one["base"]))
    means, row = (line for line in text.splitlines() if line.startswith("| rerouting |") and line.count("|") > 9)
    assert f"| {100 * share(one['variants']['rerouting']['right']):.1f} **{gain:+.1f}** [" in row
    rights = [results["runs"]["6"][name]["variants"]["rerouting"]["right"] for name in SHIFTED]
    bases = [results["runs"]["6"][name]["base"] for name in SHIFTED]
    mean, before = (100 * sum(map(share, several)) / len(SHIFTED) for several in (rights, bases))
    assert means.startswith(f"| rerouting | {mean:.1f} | {mean - before:+.1f} [")
    assert means.count(f"| {len(SHIFTED)} | 0 |") == 1  # it helps everywhere
    assert "**met**" in text
    assert "**missed**" in text
    assert "- `c3po`, after six solved examples: every set" in text
    for line in (line for line in text.splitlines() if line.startswith("![")):
        assert (tmp_path / line.partition("](")[2].rstrip(")")).stat().st_size > 5000
    assert {f.name for f in (tmp_path / "pictures").iterdir()} == {
        f"results_{name}.png" for name in ("front_6", "room_6", "shifted_6", "trained_6", "example")
    }


def test_a_part_that_is_missing_is_said(results, tmp_path):
    del results["runs"]["6"]["reverse_letters"]["variants"]["rerouting"]
    results["oracles"]["6"] = {}
    found = arithmetic.comparisons(results)
    files = pictures.write(results, found, tmp_path)
    text = page.page(results, found, files)
    assert "`rerouting`, after six solved examples: reverse_letters" in text
    assert "oracles, after six solved examples" in text
    assert "no oracle was measured" in text
    means, row, *_ = (line for line in text.splitlines() if line.startswith("| rerouting |"))
    assert means.startswith(f"| rerouting | {tables.NONE} | {tables.NONE} |")
    assert row.count(f" {tables.NONE} |") == 1


@pytest.mark.parametrize("content", ["{", "[]", '{"schema": 0}'])
def test_a_damaged_file_of_results(content, tmp_path):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ttr.ArtefactError, match=r"python -m demos\.study\.collect"):
        page.read_results(tmp_path / "results.json")


# --- plan ----------------------------------------------------------------------------------------------------


def test_sets():
    assert set(SHIFTED) == {f"{s}_{d}" for s, d in shifted_pairs()}
    assert set(TRAINED) == {f"{s}_{d}" for s, d in trained_pairs()}
    assert set(CONTROLS + WORKED) <= set(TRAINED)


def test_every_variant_is_made(tmp_path):
    """All but those whose options are searched or made from texts, which are looked at one by one below."""
    names = [v.name for v in VARIANTS]
    assert len(set(names)) == len(names) == len(arithmetic.ORDER) - 1
    place = Place(6, SEARCHES, tmp_path)
    for one in VARIANTS:
        assert set(one.shots) <= set(one.times)
        if one.name in ("dynamic_k", "scmoe", "rerouting", "c3po", "c3po_all_tokens") or "paper" in one.name:
            assert all(isinstance(s, ttr.strategy.Strategy) for s in one.make(place, SHIFTED[0]))
    assert VARIANTS[names.index("rerouting_paper")].make(place, "")[0] == ttr.Rerouting.preset("paper")


def test_every_search_has_trials():
    for search in SEARCHES.values():
        assert len(trials(search.strategy, search.space, 20)) > 3
        assert set(search.sets) <= {*SHIFTED, *TRAINED}


def test_unknown_names():
    with pytest.raises(ttr.ConfigError, match="No variant 'scmo'"):
        planned(("scmo",))
    with pytest.raises(ttr.ConfigError, match="No set 'reverse'"):
        study.chosen_sets("shifted,reverse")


# --- on the model --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return Place(0, SEARCHES, tmp_path_factory.mktemp("study"), n=8, dev=4)


def test_questions_are_those_of_the_evaluation(alone):
    examples = sample("reverse", "letters", "test", 8)
    assert alone.questions("reverse_letters", "test", 8) == [Asked(f"{e.prompt} ", e.answer) for e in examples]
    assert alone.questions("reverse_letters", "test", 8)[0].completion == f"{examples[0].answer}\n"
    few = Place(6, SEARCHES, alone.out).questions("reverse_letters", "test", 2)
    assert few[0].prompt.endswith(examples[0].prompt)
    assert few[0].completion == examples[0].completion


def test_wrong_labels_are_other_answers():
    right = ["a", "b", "a", "c", "a", "b"]
    for seed in range(20):
        wrong = oracles.wrong_labels(right, seed)
        assert all(one != other and one in right for one, other in zip(wrong, right, strict=True))
    with pytest.raises(ttr.ConfigError, match="no other is wrong"):
        oracles.wrong_labels(["a", "a"])


def test_oracles(alone, monkeypatch):
    monkeypatch.setitem(oracles.FIT, "steps", 5)
    monkeypatch.setattr(oracles, "FORCED", 6)
    found = json.loads(json.dumps(oracles.measure(alone, "reverse_letters", 16)))
    examples = sample("reverse", "letters", "test", 8)
    texts = complete(alone.model, alone.tokenizer, [f"{e.prompt} " for e in examples])
    assert found["right"]["base"] == "".join("01"[is_correct(t, e)] for t, e in zip(texts, examples, strict=True))
    right = found["right"]
    assert share(right["own_label"]) >= share(right["base"]) + 0.25
    assert share(right["wrong_label"]) <= share(right["own_label"])
    assert len(found["forced"]["wrong_label"]) == 6
    for kind, paired in found["paired"].items():
        base = right["base"][: len(right[kind])]
        assert paired["difference"] == pytest.approx(share(right[kind]) - share(base))
    assert {kind: len(one) for kind, one in right.items()} == {
        "base": 8,
        "own_label": 6,
        "wrong_label": 6,
        "transfer": 8,
    }
    assert found["transfer_fit"]["pairs"] == 16
    # a label is forced or right, never both
    assert not any(a == b == "1" for a, b in zip(right["wrong_label"], found["forced"]["wrong_label"], strict=True))


def test_thresholds_and_masks_are_kept(alone):
    made = alone.calibrated("top_p", 0.6)
    assert made.calibration.mean_k == pytest.approx(0.6 * 2, abs=0.02)
    assert alone.calibrated("top_p", 0.6) == made
    mask = alone.mask("reverse_letters").mask
    assert mask.sum(1).tolist() == [mask.shape[1] // 2] * len(mask)
    assert (alone.mask("reverse_letters").mask == mask).all()


def test_a_run_and_what_is_collected_of_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(example, "LOOKED_AT", 2)
    flags = ["--shots", "0", "--sets", "reverse_letters,add_digits", "--n", "6", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["run", *flags, "--only", "dynamic_k,scmoe"])
    study.main()
    found = collect.collect(tmp_path, 6)
    sets = found["runs"]["0"]
    assert set(sets) == {"reverse_letters", "add_digits"}
    model, tokenizer = ttr.load_pocket()
    for name, one in sets.items():
        examples = sample(*name.split("_"), "test", 6)
        prompts = [f"{e.prompt} " for e in examples]
        texts = complete(model, tokenizer, prompts)
        assert one["base"] == "".join("01"[is_correct(t, e)] for t, e in zip(texts, examples, strict=True))
        with ttr.adapt(model, ttr.SCMoE(), tokenizer=tokenizer) as adapted:
            texts = complete(adapted, tokenizer, prompts)
        expected = "".join("01"[is_correct(t, e)] for t, e in zip(texts, examples, strict=True))
        assert one["variants"]["scmoe"]["right"] == expected
        assert one["variants"]["dynamic_k"]["cost"]["experts_per_token"] < 2
    assert found["about"]["n"] == 6
    assert page.page(found, arithmetic.comparisons(found), {})
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["run", *flags, "--list"])
    study.main()
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("scmoe "))
    assert row.split()[-3:-1] == ["2", "2"]


def test_what_was_kept_is_not_run_again(tmp_path, monkeypatch, capsys, results):
    """A variant that earlier results hold is skipped and stays; one that reads what has changed is forgotten."""
    monkeypatch.setattr(example, "LOOKED_AT", 2)
    file, place = tmp_path / "results.json", Place(0, SEARCHES, tmp_path / "study", 4)
    kept = {"base": "1100", "cost": cost(), "variants": {n: variant("1110") for n in ("scmoe", "task_delta", "c3po")}}
    made = {"scmoe": ttr.SCMoE(), "task_delta": ttr.TaskDelta(), "c3po": ttr.C3PO()}
    options = {name: {"0": [one.to_dict()]} for name, one in made.items()}
    now = earlier.made_from(place)
    results |= {"runs": {"0": {"add_digits": kept}}, "oracles": {}, "options": options}
    for made_from, left in (
        (now, {"scmoe", "task_delta", "c3po"}),
        ({**now, "deltas": "others"}, {"scmoe", "c3po"}),
        ({**now, "manifest": "another"}, {"scmoe"}),
        ({}, None),
    ):
        file.write_text(json.dumps(results | {"about": results["about"] | {"made_from": made_from}}))
        runs = earlier.earlier(place, file)["runs"]
        assert (set(runs["0"]["add_digits"]["variants"]) if runs else None) == left
    file.write_text(json.dumps(results | {"about": results["about"] | {"made_from": now}}))
    flags = ["--shots", "0", "--sets", "add_digits", "--n", "4", "--out", str(place.out), "--results", str(file)]
    monkeypatch.setattr("sys.argv", ["run", *flags, "--only", "dynamic_k,scmoe"])
    study.main()
    assert not (place.folder / "runs" / "scmoe").exists()
    found = collect.collect(place.out, 4, file)
    assert found["runs"]["0"]["add_digits"]["variants"]["scmoe"]["right"] == "1110"
    assert set(found["runs"]["0"]["add_digits"]["variants"]) == {"scmoe", "task_delta", "c3po", "dynamic_k"}
    file.write_text("{")
    with pytest.raises(ttr.ArtefactError, match="damaged"):
        earlier.earlier(place, file)


# --- artefacts -----------------------------------------------------------------------------------------------


def test_a_step_runs_where_what_it_is_made_from_changed(tmp_path):
    step = artefacts.Step("copy", "no time", ("in*.txt",), ("out.txt",), ("cat in*.txt > out.txt",))
    record = {}
    (tmp_path / "in1.txt").write_text("one")
    assert artefacts.stale(step, record, tmp_path) == "there is no out.txt"
    artefacts.run(step, tmp_path)
    record["copy"] = artefacts.made_from(step, tmp_path)
    assert artefacts.stale(step, record, tmp_path) is None
    (tmp_path / "in1.txt").touch()
    assert artefacts.stale(step, record, tmp_path) is None, "dates say nothing"
    (tmp_path / "in2.txt").write_text("two")
    assert "has changed" in artefacts.stale(step, record, tmp_path)
    broken = artefacts.Step("broken", "", (), (), ("false", "touch never"))
    with pytest.raises(SystemExit, match="broken failed: false"):
        artefacts.run(broken, tmp_path)
    assert not (tmp_path / "never").exists()


def test_steps_name_files_that_there_are():
    """All but what a study has still to make."""
    for step in artefacts.STEPS:
        for pattern in step.inputs:
            made = pattern.startswith(("docs/results", "refsets/shipped/pocket/deltas")) or pattern.endswith("why.md")
            assert made or any(artefacts.ROOT.glob(pattern)), pattern
    with pytest.raises(ttr.ConfigError, match="Did you mean 'model'"):
        artefacts.named("modle")
