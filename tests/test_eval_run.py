"""Evaluation runs: files, aggregation, costs, self-consistency, several processes, the command."""

import json
import os
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
from typer.testing import CliRunner

import ttrouting as ttr
from ttrouting.errors import ConfigError

pytest.importorskip("lm_eval")

import lm_eval.evaluator

import toy_tasks
from eval_runs import content, evaluate, journal
from ttrouting.bench.bounds import Shape
from ttrouting.cli.entry import app
from ttrouting.evaluation.adapted_lm import AdaptedLM
from ttrouting.evaluation.costs import Cost, total
from ttrouting.evaluation.documents import Asking, batches, build, judge
from ttrouting.evaluation.processes import Processes
from ttrouting.evaluation.question import Variant, with_base
from ttrouting.evaluation.work import Work

LETTERS = "abcdef "


def chosen(count, seed=0):
    draw = random.Random(seed)
    return [
        {
            "q": "".join(draw.choice(LETTERS) for _ in range(draw.randint(20, 40))) + "?",
            "choices": ["A", "BC", "D E"],
            "gold": draw.randrange(3),
        }
        for _ in range(count)
    ]


def written(count, seed=1):
    return [{"q": row["q"], "a": "A"} for row in chosen(count, seed)]


@pytest.fixture
def model(olmoe):
    olmoe.generation_config.eos_token_id = 2  # the tokenizer's
    return olmoe


@pytest.fixture
def tasks():
    return {"choices": toy_tasks.choices(chosen(8)), "texts": toy_tasks.texts(written(7))}


VARIANTS = ([ttr.DynamicK(p=0.5)], [ttr.Rerouting(steps=1, layers="last:1"), ttr.SCMoE()])


# --- files ---------------------------------------------------------------------------------------------------


def test_a_run_and_its_folder(model, tokenizer, tasks, tmp_path):
    finished = evaluate(tmp_path, model, tokenizer, tasks, *VARIANTS, limit=5, log_samples=True)
    assert (finished.documents, finished.before, finished.failed) == (30, 0, 0)
    asked = json.loads((tmp_path / "run.json").read_text())
    assert list(asked["variants"]) == ["base", "dynamic_k", "rerouting+scmoe"]
    assert asked["variants"]["rerouting+scmoe"][1] == ttr.SCMoE().to_dict()
    assert (asked["limit"], asked["split"], asked["model"]["dtype"]) == (5, "test", "float32")
    assert len(asked["model"]["fingerprint"]) == 64
    assert {"torch", "lm_eval", "transformers", "python"} <= set(asked["versions"])
    assert len(asked["layers"]) == 4
    for variant in asked["variants"]:
        lines = journal(tmp_path, variant)
        assert set(lines) == {(task, i) for task in tasks for i in range(5)}
        (results,) = (tmp_path / variant).glob("results_*.json")
        found = json.loads(results.read_text())
        assert found["n-samples"]["texts"] == {"original": 7, "effective": 5, "failed": 0}
        right = [lines["choices", i]["metrics"]["acc,none"] for i in range(5)]
        assert found["results"]["choices"]["acc,none"] == sum(right) / 5
        assert found["ttrouting"]["model"] == asked["model"]
        assert len(list((tmp_path / variant).glob("samples_*.jsonl"))) == 2
    notes = [json.loads(f.read_text())["ttrouting"]["notes"] for f in sorted(tmp_path.glob("*/results_*.json"))]
    assert notes[:2] == [[], []]
    assert "without the plausibility mask" in notes[2][0]


def test_every_variant_gets_the_same_prompts(model, tokenizer, tasks, tmp_path):
    evaluate(tmp_path, model, tokenizer, tasks, *VARIANTS)
    base = journal(tmp_path)
    for variant in ("dynamic_k", "rerouting+scmoe"):
        for key, line in journal(tmp_path, variant).items():
            for name in ("arguments", "doc_hash", "prompt_hash", "target"):
                assert line[name] == base[key][name]


def test_files_of_base_are_those_of_lm_eval(model, tokenizer, tasks, tmp_path):
    """The same numbers, in the same places, and the same samples but for what we add to them."""
    evaluate(tmp_path, model, tokenizer, tasks, log_samples=True)
    (ours,) = [json.loads(f.read_text()) for f in (tmp_path / "base").glob("results_*.json")]
    lm = AdaptedLM(model, tokenizer=tokenizer, batch_size=4)
    theirs = lm_eval.evaluator.evaluate(lm, {"tasks": tasks, "groups": {}}, log_samples=True, bootstrap_iters=1000)
    for name in ("results", "versions", "n-shot", "higher_is_better", "configs"):
        assert set(ours[name]) == set(theirs[name])
    for task in tasks:
        for metric, value in theirs["results"][task].items():
            expected = pytest.approx(float(value)) if isinstance(value, float) else value
            assert ours["results"][task][metric] == expected
        file = next((tmp_path / "base").glob(f"samples_{task}_*.jsonl"))
        for mine, their in zip(map(json.loads, file.read_text().splitlines()), theirs["samples"][task], strict=True):
            for name in ("doc_id", "doc", "filter", "metrics", "doc_hash", "prompt_hash", "target_hash"):
                assert mine[name] == their[name]
            assert mine["target"] == str(their["target"])
            assert [list(a.values()) for a in mine["arguments"].values()] == [list(a) for a in their["arguments"]]
            assert all(mine[m] == their[m] for m in mine["metrics"])


def test_the_same_seed_gives_the_same_files(model, tokenizer, tasks, tmp_path):
    options = {"samples": 3, "temperature": 1.0, "log_samples": True}
    for name, seed in (("one", 3), ("two", 3), ("three", 4)):
        evaluate(tmp_path / name, model, tokenizer, tasks, VARIANTS[0], seed=seed, **options)
    one, two, three = (content(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two
    assert one["journal/base"] != three["journal/base"]


def test_batches_are_of_like_length_and_do_not_depend_on_what_is_done(tasks):
    documents = build("texts", tasks["texts"], Asking())
    found = list(batches(documents, 3))
    assert [len(group) for group in found] == [3, 3, 1]
    lengths = [d.length for group in found for d in group]
    assert lengths == sorted(lengths, reverse=True)


def test_limits(tasks):
    assert [len(build("choices", tasks["choices"], Asking(limit))) for limit in (None, 3, 0.5, 0.01)] == [8, 3, 4, 1]


def test_variants_that_are_the_same_are_refused():
    one = Variant("scmoe", (ttr.SCMoE(),))
    with pytest.raises(ConfigError, match="twice"):
        with_base([one, one])
    named = with_base([one, Variant("scmoe", (ttr.SCMoE(beta=0.1),)), Variant("scmoe", (ttr.SCMoE(beta=0.2),))])
    assert [v.name for v in named] == ["base", "scmoe", "scmoe-2", "scmoe-3"]


def test_perplexity_has_documents_too(model, tokenizer, tmp_path):
    task = toy_tasks.perplexity([{"text": "the quick brown fox"}, {"text": "jumps"}])
    evaluate(tmp_path, model, tokenizer, {"perplexity": task}, VARIANTS[0])
    (file,) = (tmp_path / "base").glob("results_*.json")
    value = json.loads(file.read_text())["results"]["perplexity"]["bits_per_byte,none"]
    lm = AdaptedLM(model, tokenizer=tokenizer, batch_size=2)
    theirs = lm_eval.evaluator.evaluate(lm, {"tasks": {"perplexity": task}, "groups": {}}, bootstrap_iters=0)
    assert value == pytest.approx(theirs["results"]["perplexity"]["bits_per_byte,none"])


# --- self-consistency ----------------------------------------------------------------------------------------


def voting_task():
    """The answer is the number after "=", as the task's filter finds it."""
    return toy_tasks.texts(
        [{"q": "1+1", "a": "2"}],
        filter_list=[
            {
                "name": "number",
                "filter": [{"function": "regex", "regex_pattern": r"=(\d)"}, {"function": "take_first"}],
            }
        ],
    )


@pytest.mark.parametrize(
    ("answers", "winner"),
    [
        (["x=3", "y=2", "z=2"], "2"),  # the parsed answers vote, and not the texts
        (["no", "none", "=4"], "4"),  # what could not be parsed does not vote
        (["no", "none", "never"], "[invalid]"),
        (["=5", "=6", "=6", "=5"], "5"),  # of equals the first
    ],
)
def test_parsed_answers_vote(answers, winner):
    task = voting_task()
    (document,) = build("texts", task, Asking(samples=len(answers)))
    assert document.voted
    assert document.instances[0].args[1]["do_sample"] is True
    found = judge(task, document, [answers])
    assert found.filtered == {"number": [winner]}
    assert found.metrics == {"exact_match,number": float(winner == "2")}


def test_samples_of_a_run_vote_and_do_not_depend_on_batches(olmoe64, true_double, tokenizer, tmp_path):
    tasks = {"choices": toy_tasks.choices(chosen(3)), "texts": toy_tasks.texts(written(3))}
    for size in (2, 16):
        options = {"samples": 3, "temperature": 1.5, "no_harm": False, "batch_size": size}
        evaluate(tmp_path / str(size), olmoe64, tokenizer, tasks, VARIANTS[1], **options)
    few, many = (journal(tmp_path / str(size), "rerouting+scmoe") for size in (2, 16))
    for (task, number), line in few.items():
        other = many[task, number]
        assert line["metrics"] == other["metrics"]
        if task == "texts":
            assert line["responses"] == other["responses"]
            (drawn,) = line["responses"]
            assert len(drawn) == 3
            assert Counter(drawn)[line["filtered"]["none"][0]] == max(Counter(drawn).values())
        else:
            assert all(len(samples) == 1 for samples in line["responses"])  # choices are scored once
    (file,) = (tmp_path / "2" / "base").glob("results_*.json")
    assert json.loads(file.read_text())["ttrouting"]["notes"] == [
        "samples vote on texts; the other tasks are answered once"
    ]


# --- costs ---------------------------------------------------------------------------------------------------


def test_costs_of_generation(model, tokenizer, tmp_path):
    """Equal prompts that all end with the limit, so that counting by hand is easy."""
    model.generation_config.eos_token_id = None
    tasks = {"texts": toy_tasks.texts([{"q": "abc def ghi jkl mno pqr " + c, "a": "x"} for c in "stuv"])}
    tasks["texts"].config.generation_kwargs["until"] = ["~~"]
    evaluate(tmp_path, model, tokenizer, tasks, [ttr.SCMoE(judge_on=None)], [ttr.DynamicK(p=0.5)], batch_size=2)
    shape = Shape.of(model, ttr.find_sites(model))
    tokens, new = 25, 8
    plain = 2 * shape.forward(tokens + new - 1, new)
    names = ("base", "scmoe", "dynamic_k")
    costs = {name: [line["cost"] for line in journal(tmp_path, name).values()] for name in names}
    for name, found in costs.items():
        for cost in found:
            assert (cost["prompt_tokens"], cost["new_tokens"]) == (tokens, new)
            assert 0 < cost["first_token_seconds"] < 60
            assert len(cost["experts_per_layer"]) == 4
            assert cost["outcomes"] == ({} if name == "base" else {name: "applied"})
    for cost in costs["base"]:
        assert cost["experts_per_token"] == 3
        assert cost["flops"] == plain
    weak = 2 * shape.forward(tokens + new - 1, new, [1] * 4)
    assert all(cost["flops"] == plain + weak for cost in costs["scmoe"])
    for first, second in zip(costs["dynamic_k"][::2], costs["dynamic_k"][1::2], strict=True):
        assert first["experts_per_token"] < 3
        # the two of a batch share what it cost
        k = [(a + b) / 2 for a, b in zip(first["experts_per_layer"], second["experts_per_layer"], strict=True)]
        assert first["flops"] == second["flops"] == pytest.approx(2 * shape.forward(tokens + new - 1, new, k))


def test_operations_of_an_adaptation_are_counted(model, tokenizer, prompts):
    """A prompt read with its losses, `steps` forwards and backwards of the upper layers, and once more at the end."""
    model.generation_config.eos_token_id = None
    sites, tokens, steps = ttr.find_sites(model), 40, 3
    work, shape = Work(model, sites), Shape.of(model, sites)
    ids = prompts(tokens)
    with ttr.adapt(model, ttr.Rerouting(steps=steps, layers="last:2"), no_harm=False) as adapted:
        adapted.generate(ids, max_new_tokens=1, do_sample=False)  # short cuts are tried on the first call
        with work.counting():
            adapted.generate(ids, max_new_tokens=1, do_sample=False)
    assert adapted.report.sequences[0].strategies["rerouting"]["outcome"] == "accepted"
    read, first = tokens - 1, shape.homes[2]  # all but the last token go into the cache
    last = shape.forward(tokens, 1) - shape.forward(read, 0)  # the last one behind it
    tail, head = shape.forward(read, 0, first=first), read * shape.head
    gradient = shape.backward(read, read, first)
    # read it, look at the next token; fit; read the tail again, look; then generate reads the last token
    expected = (shape.forward(read, 0) + head + last) + steps * (tail + head + gradient) + (tail + head + last) + last
    assert work.flops == pytest.approx(2 * expected)


def test_costs_of_choices_are_those_of_one_adaptation(model, tokenizer, tasks, tmp_path):
    evaluate(tmp_path, model, tokenizer, {"choices": tasks["choices"]}, [ttr.Rerouting()], no_harm=False)
    base, adapted = journal(tmp_path), journal(tmp_path, "rerouting")
    for key, line in adapted.items():
        context = len(tokenizer(line["arguments"][0][0])["input_ids"])
        assert line["cost"]["prompt_tokens"] == base[key]["cost"]["prompt_tokens"] == context
        assert line["cost"]["first_token_seconds"] is None
        assert line["cost"]["outcomes"] == {"rerouting": "accepted"}
        assert 0 < line["cost"]["adapt_seconds"] < line["cost"]["seconds"]
        assert line["cost"]["flops"] > base[key]["cost"]["flops"] > 0


def test_costs_add_up():
    one = Cost(1.0, 0.5, 0.1, 10, 0, 2.0, [1.0, 3.0], 100.0, {"a": "accepted"})
    two = replace(one, first_token_seconds=None, new_tokens=20, experts_per_token=3.0, experts_per_layer=[3.0, 3.0])
    both = one + two
    assert (both.seconds, both.first_token_seconds, both.prompt_tokens, both.new_tokens) == (2.0, 0.5, 20, 20)
    assert both.experts_per_token == pytest.approx((10 * 2 + 30 * 3) / 40)
    assert both.experts_per_layer == pytest.approx([(10 * 1 + 30 * 3) / 40, 3.0])
    assert total([]) is None
    assert (one + replace(two, flops=None)).flops is None


# --- processes -----------------------------------------------------------------------------------------------


class Played(Processes):
    """One of several processes that run one after the other."""

    def wait(self):
        pass

    def share(self, value):
        return value if value is not None else json.loads((self.out / "run.json").read_text())


@pytest.mark.parametrize("world", [2, 3])
def test_results_do_not_depend_on_the_number_of_processes(model, tokenizer, tasks, tmp_path, world):
    evaluate(tmp_path / "one", model, tokenizer, tasks, *VARIANTS, log_samples=True)
    Played.out = tmp_path / "many"
    counts = []
    for rank in reversed(range(world)):  # the first one writes, so it comes last
        if rank == world - 1:  # and what is asked is written down by the first
            asked = json.loads((tmp_path / "one" / "run.json").read_text())
            (tmp_path / "many").mkdir()
            (tmp_path / "many" / "run.json").write_text(json.dumps(asked))
        finished = evaluate(
            tmp_path / "many",
            model,
            tokenizer,
            tasks,
            *VARIANTS,
            log_samples=True,
            resume=True,
            processes=Played(rank, world, rank),
        )
        counts.append(len((tmp_path / "many" / "journal" / f"base.{rank}.jsonl").read_text().splitlines()))
        assert (finished is None) == (rank > 0)
    assert all(counts)
    assert sum(counts) == 15
    assert content(tmp_path / "many") == content(tmp_path / "one")


@pytest.mark.slow
def test_two_processes_of_accelerate_give_what_one_gives(tmp_path):
    asked = ["eval", "--limit", "4", "--batch-size", "2", "--tasks", "pocket_minimum_letters,pocket_units_letters"]
    asked += ["--adapt", "rerouting", "--set", "rerouting.steps=1", "--log-samples", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "ttrouting"]
    command = [sys.executable, "-m", *launch, *asked, "--output-path", str(tmp_path / "two")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pocket_minimum_letters") == 1  # only the first one tells
    result = CliRunner().invoke(app, [*asked, "--output-path", str(tmp_path / "one")])
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "two" / "journal").glob("base.*.jsonl"))) == 2
    assert all(file.stat().st_size for file in (tmp_path / "two" / "journal").glob("*.jsonl"))
    assert content(tmp_path / "two") == content(tmp_path / "one")


# --- the command ---------------------------------------------------------------------------------------------


def invoke(*arguments, code=0):
    result = CliRunner().invoke(app, ["eval", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def test_the_command(tmp_path):
    asked = ["--tasks", "pocket_minimum_letters", "--limit", 3, "--adapt", "dynamic_k", "--adapt", "rerouting+scmoe"]
    asked += ["--set", "scmoe.beta=0.3", "--set", "rerouting.steps=1", "--output-path", tmp_path / "out"]
    result = invoke(*asked)
    assert "| rerouting+scmoe |" in result.stdout
    assert "dynamic_k helps on 0 of 1 task" in result.stdout
    found = json.loads((tmp_path / "out" / "run.json").read_text())
    assert found["variants"]["rerouting+scmoe"][1]["beta"] == 0.3
    assert found["model"]["name"] == "pocket"
    assert "holds a run already" in invoke(*asked, code=2).output
    again = invoke(*asked, "--resume", "--json")
    assert "nothing was asked again" in again.stderr
    assert json.loads(again.stdout)["tasks"]["pocket_minimum_letters"]["n"] == 3


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--adapt", "rerouting", "--adapt", "rerouting"], "given twice"),
        (["--adapt", "reroutin"], "Did you mean 'rerouting'"),
        (["--set", "scmoe.beta=0.3"], "scmoe is not used"),
        (["--tasks", " , "], "nothing to score"),
        (["--limit", "0"], "nothing to score"),
        (["--tasks", "pocket_units_letters", "--adapt", "scmoe", "--set", "scmoe.weak=rank:99"], "needs 99 experts"),
    ],
)
def test_what_the_command_refuses(tmp_path, arguments, error):
    result = invoke(*arguments, "--output-path", tmp_path / "out", code=2)
    assert error in " ".join(result.output.split())
    assert not (tmp_path / "out" / "run.json").exists()


def test_saved_strategies_are_a_variant(tmp_path):
    ttr.save(tmp_path / "saved", ttr.SCMoE(beta=0.2))
    asked = ["--tasks", "pocket_minimum_letters", "--limit", 2, "--load", tmp_path / "saved", "--adapt", "scmoe"]
    invoke(*asked, "--output-path", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "run.json").read_text())["variants"]
    assert [v[0]["beta"] for name, v in found.items() if name != "base"] == [0.5, 0.2]


def test_other_commands_do_without_lm_eval():
    code = "import ttrouting, ttrouting.cli.entry, sys; print('lm_eval' in sys.modules, 'datasets' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False False"


def test_a_chat_template_is_applied_where_it_is_asked_for(model, tokenizer, tasks, tmp_path):
    evaluate(tmp_path, model, tokenizer, {"texts": tasks["texts"]}, chat=True, limit=2)
    prompt = journal(tmp_path)["texts", 0]["arguments"][0][0]
    assert prompt.startswith("<|im_start|>user\n")
    assert prompt.endswith("<|im_start|>assistant\n")
