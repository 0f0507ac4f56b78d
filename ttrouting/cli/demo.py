"""`ttrouting demo`: what does adapted routing change on a handful of questions, and is that more than luck?

The pocket model knows some skills with digits only. Asked in letters it is off its training text: the case that
test-time routing is for. One set that it was trained on shows the other side.
"""

from __future__ import annotations

from dataclasses import replace
from time import perf_counter
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from ttrouting.cli.generate import versions
from ttrouting.cli.models import POCKET, downloads, few_threads, load_model
from ttrouting.cli.options import Debug, Device, Dtype, DtypeName, Json, ModelName
from ttrouting.cli.output import Output
from ttrouting.cli.trial import Answers, QuestionSet, answer
from ttrouting.evaluation.statistics import Paired, exact_interval, holm, verdict
from ttrouting.registry import get_strategy

SHOTS, SHOWN, SEED = 6, 3, 1
ON_EXAMPLES = ("rerouting", "scmoe", "dynamic_k")
# Skill, dialect, test questions, solved examples before each, ways of answering beside the base. The first pair never
# stood together in the training text, the second did.
SETS: tuple[tuple[str, str, int, int, tuple[str, ...]], ...] = (
    ("reverse", "letters", 40, SHOTS, ON_EXAMPLES),
    ("add", "letters", 20, SHOTS, ON_EXAMPLES),
    ("reverse", "letters", 40, 0, ("c3po", "task_delta")),
)
# What each way of answering runs under, as strategy names and options.
WAYS: dict[str, tuple[tuple[str, dict[str, Any]], ...]] = {
    # the solved answers and their line ends are what is to be learned
    "rerouting": (
        (
            "rerouting",
            {"loss_on": r"A:(.*\n)", "steps": 10, "lr": 0.1, "layers": "all", "interval": None},
        ),
    ),
    "scmoe": (("scmoe", {}),),
    "dynamic_k": (("dynamic_k", {"p": 0.5}),),
    # without solved examples, from those of the shipped reference set
    "c3po": (("c3po", {"scope": "all", "layers": "all", "core_experts": 1.0, "k": 8, "use": "all"}),),
    # the same, learned beforehand
    "task_delta": (("task_delta", {}),),
}


def command(
    questions: Annotated[
        int | None, typer.Option(min=1, help="Test questions of each set, instead of its own number.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the questions that are drawn.")] = SEED,
    model: ModelName = POCKET,
    dtype: DtypeName = Dtype.AUTO,
    device: Device = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Base beside adapted answers, their accuracy and their cost; offline, in under a minute."""
    began = perf_counter()
    output = Output(as_json)
    ways = {name: tuple(get_strategy(kind)(**options) for kind, options in way) for name, way in WAYS.items()}
    with output.waiting(f"loading {model}", downloads(model)) as say:
        loaded, tokenizer = load_model(model, dtype.value, device)
    output.show(
        Text(f"{type(loaded).__name__} ({model}): routing is adapted to each question, on the solved", "bold")
    )
    output.show(Text("examples before it or on solved neighbours in a reference set. No weight changes.", "bold"))
    sets = [one for one in SETS if "c3po" not in one[-1] or model == POCKET]
    if len(sets) < len(SETS):
        output.note(
            "Without C3PO and TaskDelta: the shipped reference set is the pocket model's. Build one: "
            "ttrouting refset build."
        )
    results: list[tuple[QuestionSet, dict[str, Answers]]] = []
    with few_threads(loaded):
        for skill, dialect, n, shots, names in sets:
            asked = QuestionSet.draw(skill, dialect, questions or n, shots, seed)
            found: dict[str, Answers] = {}
            with output.waiting(_name(asked)) as say:
                for name, strategies in {"base": (), **{name: ways[name] for name in names}}.items():
                    say(f"{_name(asked)}: {len(asked.questions)} questions, {name}")
                    found[name] = answer(loaded, tokenizer, asked, strategies)
            results.append((asked, found))
            output.show(Text(), _title(asked), _examples(asked, found, output.marks))
    comparisons = sum(len(names) for *_, names in sets)
    output.show(Text(), _accuracy(results))
    output.show(Text(_fine_print(comparisons), style="dim"))
    asked, found = results[0]
    output.show(Text(), Text(f"The report of rerouting, first {SHOWN} questions of {_name(asked)}", "bold"))
    report = found["rerouting"].report
    output.show(replace(report, sequences=report.sequences[:SHOWN]))
    seconds = perf_counter() - began
    output.note(f"{seconds:.0f} s in all. Next: ttrouting generate --help, ttrouting strategies")
    output.data(_facts(model, seed, results, comparisons, seconds))


def _name(asked: QuestionSet) -> str:
    return f"{asked.skill}/{asked.dialect}" if asked.shots else f"{asked.skill}/{asked.dialect}, alone"


def _title(asked: QuestionSet) -> Text:
    told = "trained together" if asked.trained else "never trained together"
    before = f"after {asked.shots} solved examples" if asked.shots else "questions alone"
    title = Text(_name(asked), style="bold")
    shown = min(SHOWN, len(asked.questions))
    return title.append(f"  {told}; {before}; the first {shown} questions", style="not bold dim")


def _examples(asked: QuestionSet, found: dict[str, Answers], marks: tuple[str, str]) -> Table:
    """The first questions, not chosen ones, with every answer marked."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("question", "answer", *found):
        table.add_column(column, overflow="ellipsis", no_wrap=True)
    for i, question in enumerate(asked.questions[:SHOWN]):
        cells = [_marked(answers.texts[i], answers.right[i], marks) for answers in found.values()]
        table.add_row(Text(question.question), Text(question.answer), *cells)
    return table


def _marked(text: str, right: bool, marks: tuple[str, str]) -> Text:
    mark = Text(f"{marks[0] if right else marks[1]} ", style="green" if right else "red")
    return mark.append(text[:16], style="default")


def _accuracy(results: list[tuple[QuestionSet, dict[str, Answers]]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("set", "under", "right", "95 %", "won", "lost", "against base", "experts/token", "seconds"):
        table.add_column(column, justify="left" if column in ("set", "under", "against base") else "right")
    cells = [(found["base"], answers) for _, found in results for answers in found.values()]
    pairs = [Paired.of(base.right, answers.right) for base, answers in cells if answers is not base]
    compared = iter(zip(pairs, holm([paired.p_value for paired in pairs]), strict=True))
    for asked, found in results:
        for name, answers in found.items():
            right, n = sum(answers.right), len(answers.right)
            low, high = exact_interval(right, n)
            first = name == "base"
            paired, p = (None, 1.0) if first else next(compared)
            experts = answers.experts_per_token
            table.add_row(
                _name(asked) if first else "",
                name,
                f"{right}/{n}",
                f"{100 * low:.0f}-{100 * high:.0f}",
                "" if paired is None else str(paired.won),
                "" if paired is None else str(paired.lost),
                "" if paired is None else _verdict(paired, p),
                "" if experts is None else f"{experts:.2f}",
                f"{answers.seconds:.1f}",
            )
    return table


def _verdict(paired: Paired, p: float) -> str:
    if paired.won + paired.lost == 0:
        return "no difference"
    return f"{verdict(paired.difference, p)}, p {'< 0.0001' if p < 0.0001 else f'= {p:.2g}'}"


def _fine_print(comparisons: int) -> str:
    return (
        "won, lost: questions that only the adapted model, only the base got right. p: exact McNemar test, adjusted\n"
        f"(Holm) for all {comparisons} comparisons together; 'helps' and 'hurts' need p < 0.05. "
        "95 %: exact interval (Clopper-Pearson).\n"
        "The pocket model is a fixture: this shows how the machinery works and says nothing about real models."
    )


def _facts(
    model: str,
    seed: int,
    results: list[tuple[QuestionSet, dict[str, Answers]]],
    comparisons: int,
    seconds: float,
) -> dict[str, Any]:
    return {
        "model": model,
        "seed": seed,
        "comparisons": comparisons,
        "sets": [
            {
                "skill": asked.skill,
                "dialect": asked.dialect,
                "shots": asked.shots,
                "trained": asked.trained,
                "questions": [{"question": q.question, "answer": q.answer} for q in asked.questions],
                "ways": {name: answers.facts(found["base"]) for name, answers in found.items()},
            }
            for asked, found in results
        ],
        "report": results[0][1]["rerouting"].report.to_dict(),
        "seconds": seconds,
        "versions": versions(),
    }
