"""Does a comparison say what the journals of a run say, and do table, pictures and page show it whole?"""

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binomtest

import commands
from ttrouting.errors import ArtefactError, ConfigError
from ttrouting.evaluation.compare import compare, comparison_of
from ttrouting.evaluation.report import canvas, pictures
from ttrouting.evaluation.report.colours import ON_DARK, style
from ttrouting.evaluation.report.markdown import COLUMNS, amount, markdown, p_value, score, table, times
from ttrouting.evaluation.report.overall import overall, pareto, shared_tasks
from ttrouting.evaluation.report.pictures import Cost
from ttrouting.evaluation.report.write import write_report

LONG = "bbh_cot_fewshot_tracking_shuffled_objects_seven_objects"


# --- folders of runs --------------------------------------------------------------------------------------


def cost(seconds: float = 0.5, **changes: Any) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "first_token_seconds": 0.1 * seconds,
        "adapt_seconds": 0.0,
        "prompt_tokens": 30,
        "new_tokens": 10,
        "experts_per_token": 2.0,
        "experts_per_layer": [2.0, 2.0, 2.0],
        "flops": 1e6,
        "outcomes": {},
        **changes,
    }


def line(task: str, number: int, value: float | None, paid: Any = None, **changes: Any) -> dict[str, Any]:
    """One document; None is one that failed."""
    failed = value is None
    return {
        "task": task,
        "doc_id": number,
        "doc_hash": f"d{task}{number}",
        "prompt_hash": f"p{task}{number}",
        "target": "x",
        "arguments": [["question"]],
        "responses": [] if failed else ["answer"],
        "filtered": {},
        "metrics": {} if failed else {"exact_match,none": value},
        "cost": None if failed else paid or cost(),
        "error": "ValueError: bad" if failed else None,
        **changes,
    }


def write(out: Path, journals: Mapping[str, Iterable[dict[str, Any]]], **changes: Any) -> Path:
    """A run; journals by `<variant>.<rank>`."""
    (out / "journal").mkdir(parents=True)
    for name, lines in journals.items():
        (out / "journal" / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    variants = {
        name.rpartition(".")[0]: [{"strategy": part} for part in name.rpartition(".")[0].split("+")]
        for name in journals
    }
    variants["base"] = []
    run = {
        "ttrouting": "0",
        "model": {"name": "pocket"},
        "tasks": ["sums"],
        "seed": 1,
        "variants": variants,
        **changes,
    }
    (out / "run.json").write_text(json.dumps(run))
    return out


@pytest.fixture
def known(tmp_path: Path) -> Path:
    """Two tasks, two variants, numbers that can be checked by hand."""
    adapted = [
        cost(1.0, flops=3e6, adapt_seconds=0.2, experts_per_token=1.5, experts_per_layer=[1.0, 1.5, 2.0], outcomes=o)
        for o in ({"r": "accepted"}, {"r": "rolled back: held-back loss 1 -> 2"}, {"r": "skipped: 3 loss tokens"})
    ]
    return write(
        tmp_path / "known",
        {
            "base.0": [line("sums", i, float(i < 4)) for i in range(12)],
            "base.1": [line("words", i, float(i < 6)) for i in range(8)],
            "rerouting.0": [line("sums", i, float(i < 12), adapted[min(i, 2)]) for i in range(12)]
            + [line("words", i, float(2 <= i < 7), adapted[0]) for i in range(8)],
            "scmoe.0": [line("sums", i, float(i < 3)) for i in range(12)]
            + [line("words", i, float(i < 6)) for i in range(8)],
        },
    )


def many(out: Path, tasks: Sequence[str], variants: Sequence[str], n: int = 20, **options: Any) -> Path:
    """Right answers that differ a little between variants; `failing`: every such document fails in variants."""
    failing, costs = options.get("failing", 0), options.get("costs", True)
    journals: dict[str, list[dict[str, Any]]] = {}
    for k, variant in enumerate(("base", *variants)):
        journals[f"{variant}.0"] = [
            line(
                task,
                i,
                None if k and failing and i % failing == 0 else float((3 * i + t + (k if i % 4 == 0 else 0)) % 7 < 4),
                cost(0.5 * (1 + k), flops=1e6 * (1 + k), experts_per_layer=[2.0 - 0.1 * k] * 6),
                **({} if costs else {"cost": None}),
            )
            for t, task in enumerate(tasks)
            for i in range(n)
        ]
    return write(out, journals)


VARIANTS = (
    "rerouting",
    "scmoe",
    "rerouting+scmoe",
    "dynamic_k",
    "c3po",
    "rerouting+scmoe+dynamic_k",
    "expert_mask-2",
    "x",
)
RUNS: dict[str, dict[str, Any]] = {
    "one-document": {"tasks": ["sums"], "variants": ("scmoe",), "n": 1},
    "no-variant": {"tasks": ["sums", "words"], "variants": ()},
    "failures": {"tasks": ["sums", LONG], "variants": ("scmoe", "c3po"), "failing": 3},
    "all-failed": {"tasks": ["sums"], "variants": ("scmoe",), "failing": 1},
    "no-costs": {"tasks": ["sums"], "variants": ("scmoe",), "costs": False},
    "long-and-many": {"tasks": [f"{LONG}_{i}" for i in range(24)], "variants": VARIANTS[:5], "n": 8},
    "many-variants": {"tasks": ["sums", "words", LONG], "variants": VARIANTS},
}


@pytest.fixture(params=list(RUNS))
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return many(tmp_path / request.param, **RUNS[request.param])


# --- comparison -------------------------------------------------------------------------------------------


def test_a_comparison_is_what_the_journals_say(known: Path) -> None:
    found = compare(known)
    assert json.loads((known / "comparison.json").read_text()) == found
    assert sorted(f.name for f in known.iterdir()) == ["comparison.json", "journal", "run.json"]  # no draft is left
    assert found["run"] == json.loads((known / "run.json").read_text())
    assert (found["level"], found["family"], list(found["tasks"])) == (0.95, 4, ["sums", "words"])
    sums = found["tasks"]["sums"]
    assert (sums["metric"], sums["n"], sums["failed"]) == ("exact_match,none", 12, 0)
    assert sums["base"]["mean"] == pytest.approx(4 / 12)
    exact = binomtest(4, 12).proportion_ci()
    assert sums["base"]["interval"] == pytest.approx([exact.low, exact.high])
    helped, words = sums["variants"]["rerouting"], found["tasks"]["words"]["variants"]["rerouting"]
    assert (helped["n"], helped["won"], helped["lost"], helped["mean"]) == (12, 8, 0, 1.0)
    assert helped["difference"] == pytest.approx(8 / 12)
    assert helped["difference_interval"][0] > 0
    assert helped["p_value"] == pytest.approx(2 / 2**8)
    assert helped["p_holm"] == pytest.approx(4 * 2 / 2**8)  # the smallest of four
    assert helped["verdict"] == "helps"
    assert (words["won"], words["lost"], words["p_holm"], words["verdict"]) == (1, 2, 1.0, "cannot tell")
    hurt = sums["variants"]["scmoe"]
    assert (hurt["won"], hurt["lost"], hurt["p_value"], hurt["verdict"]) == (0, 1, 1.0, "cannot tell")


def test_costs_are_means_over_documents(known: Path) -> None:
    found = comparison_of(known)["tasks"]["sums"]
    base = {"seconds": 0.5, "first_token_seconds": 0.05, "flops": 1e6, "tokens_per_second": 20.0}
    assert {name: found["base"]["cost"][name] for name in base} == pytest.approx(base)
    own = found["variants"]["rerouting"]
    assert own["cost"]["experts_per_layer"] == pytest.approx([1.0, 1.5, 2.0])
    assert own["cost"]["adapt_seconds"] == pytest.approx(0.2)
    ratios = {"seconds": 2, "first_token_seconds": 2, "tokens_per_second": 0.5, "flops": 3}
    assert own["ratios"] == pytest.approx(ratios)
    assert (own["adapted"], own["rolled_back"]) == pytest.approx((1 / 12, 1 / 12))  # ten were skipped


def test_tasks_without_generation_count_prompt_tokens(tmp_path: Path) -> None:
    paid = cost(2.0, new_tokens=0, first_token_seconds=None, flops=None)
    out = write(tmp_path / "r", {name: [line("sums", 0, 1.0, paid)] for name in ("base.0", "scmoe.0")})
    found = comparison_of(out)["tasks"]["sums"]
    assert found["base"]["cost"]["tokens_per_second"] == pytest.approx(15)
    assert found["variants"]["scmoe"]["ratios"] == {
        "seconds": 1,
        "first_token_seconds": None,
        "tokens_per_second": 1,
        "flops": None,
    }
    assert comparison_of(out)["summary"]["scmoe"].endswith("it costs 1.0x the time per document")


def test_pairs_need_both_sides(tmp_path: Path) -> None:
    base = [line("sums", i, 1.0 if i != 2 else None) for i in range(6)]
    other = [line("sums", 0, 0.0), line("sums", 1, None), line("sums", 2, 1.0), line("sums", 4, 0.0)]
    out = write(tmp_path / "r", {"base.0": base, "scmoe.0": [*other, line("sums", 99, 1.0)]})
    task = comparison_of(out)["tasks"]["sums"]
    cell = task["variants"]["scmoe"]
    assert (task["n"], task["failed"]) == (5, 2)
    assert (cell["n"], cell["failed"], cell["missing"], cell["lost"]) == (2, 2, 2, 2)
    assert (cell["mean"], cell["base"], cell["difference"]) == (0.0, 1.0, -1.0)


def test_ranks_torn_lines_and_duplicates(tmp_path: Path) -> None:
    first = [line("sums", i, 1.0) for i in (0, 2)]
    second = [line("sums", 1, 1.0), line("sums", 0, 0.0), line("sums", 3, 0.0)]
    third = [line("sums", 3, 1.0), line("sums", 2, 0.0)]
    out = write(tmp_path / "r", {"base.0": first, "base.2": second, "base.10": third, "a.b.0": first})
    with (out / "journal" / "base.2.jsonl").open("a") as opened:
        opened.write('{"task": "sums", "doc_id": 4, "metr')
    task = comparison_of(out)["tasks"]["sums"]
    assert (task["n"], task["base"]["mean"]) == (4, 0.75)  # 0 as rank 0 has it, 3 as rank 2 has it, nothing of 4
    assert task["variants"]["a.b"]["n"] == 2


def test_a_damaged_line_is_an_error(known: Path) -> None:
    file = known / "journal" / "base.0.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*lines[:3], lines[3][:20] + "\n", *lines[4:]]))
    with pytest.raises(ArtefactError, match=r"Line 4 of .*base\.0\.jsonl is damaged"):
        comparison_of(known)


@pytest.mark.parametrize("part", ["doc_hash", "prompt_hash"])
def test_other_documents_are_no_pair(tmp_path: Path, part: str) -> None:
    lines = [line("sums", i, 1.0) for i in range(3)]
    out = write(tmp_path / "r", {"base.0": lines, "scmoe.0": [*lines[:2], {**lines[2], part: "other"}]})
    with pytest.raises(ArtefactError, match="document 2 of sums has another"):
        comparison_of(out)


def test_which_metric_is_compared(tmp_path: Path) -> None:
    metrics = {"bypass": [1, 2], "f1,none": 0.1, "acc,none": 0.0, "acc_norm,a": 1.0, "acc_norm,b": 0.5}
    lines = [line("sums", 0, 1.0, metrics=metrics), line("words", 0, 1.0, metrics={"mine,x": True})]
    out = write(tmp_path / "r", {"base.0": lines, "scmoe.0": lines})

    def compared(metric: str | None = None) -> list[str]:
        return [one["metric"] for one in comparison_of(out, metric)["tasks"].values()]

    assert compared() == ["acc_norm,a", "mine,x"]
    assert compared("acc_norm,b") == ["acc_norm,b", "mine,x"]
    assert compared("f1") == ["f1,none", "mine,x"]
    with pytest.raises(ConfigError, match=r"No task .* 'acc_nrm'\. Did you mean 'acc_norm"):
        compared("acc_nrm")


def test_where_less_is_better(tmp_path: Path) -> None:
    base = [line("sums", i, 1.0, metrics={"perplexity,none": 9.0 + i}) for i in range(12)]
    other = [line("sums", i, 1.0, metrics={"perplexity,none": 8.0 + 0.9 * i}) for i in range(12)]
    out = write(tmp_path / "r", {"base.0": base, "scmoe.0": other})
    cell = comparison_of(out)["tasks"]["sums"]["variants"]["scmoe"]
    assert (cell["won"], cell["lost"], cell["verdict"]) == (12, 0, "helps")
    assert cell["difference"] < 0
    assert " −1.55 [" in markdown(comparison_of(out))  # in its own unit, not in points


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_folder_that_holds_no_run(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(ArtefactError, match=r"run\.json"):
        compare(tmp_path)


def test_a_run_without_a_finished_document(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="no finished document of base"):
        compare(write(tmp_path / "r", {"base.0": []}))


def test_a_comparison_that_cannot_be_written(known: Path) -> None:
    (known / "comparison.json").mkdir()
    with pytest.raises(ArtefactError, match=r"Cannot write .*comparison\.json"):
        compare(known)


# --- words and tables -------------------------------------------------------------------------------------


def test_verdicts_in_words(known: Path) -> None:
    told = comparison_of(known)["summary"]
    assert list(told) == ["rerouting", "scmoe"]
    cost = "it costs 2.0x the time to first token"
    assert told["rerouting"] == f"rerouting helps on 1 of 2 tasks, hurts on 0, cannot tell on 1; {cost}"
    cost = "it costs 1.0x the time to first token"
    assert told["scmoe"] == f"scmoe helps on 0 of 2 tasks, hurts on 0, cannot tell on 2; {cost}"


def test_the_table_is_markdown_with_the_numbers(known: Path) -> None:
    lines = table(comparison_of(known)).splitlines()
    cells = [[cell.strip() for cell in text.strip("|").split("|")] for text in lines]
    assert all(len(row) == len(COLUMNS) for row in cells)
    assert len({len(text) for text in lines}) == 1
    assert all(re.fullmatch("-+:?", cell) for cell in cells[1])
    assert [row[:4] for row in cells[2:5]] == [
        ["sums", "exact_match", "base", "12"],
        ["", "", "rerouting", "12"],
        ["", "", "scmoe", "12"],
    ]
    row = dict(zip(cells[0], cells[3], strict=True))
    assert row["score"].startswith("100.0 [")
    assert row["difference"].startswith("+66.7 [+")
    assert (row["won/lost"], row["p (Holm)"], row["verdict"]) == ("8/0", "0.031", "helps")
    assert (row["experts/token"], row["adaptation"], row["adapted/rolled back"]) == ("1.50", "200 ms", "8/8 %")
    assert (row["first token"], row["tokens/s"], row["FLOPs"]) == ("2.00x", "0.50x", "3.00x")
    assert dict(zip(cells[0], cells[2], strict=True))["FLOPs"] == "1.00 M"
    assert cells[4][5].startswith("−8.3 [−")


def test_what_was_left_out_is_in_the_table(tmp_path: Path) -> None:
    text = markdown(comparison_of(many(tmp_path / "r", **RUNS["failures"])))
    assert "| 13 (7 failed) |" in text
    assert "| 0 (20 failed) |" in markdown(comparison_of(many(tmp_path / "s", **RUNS["all-failed"])))


def test_numbers_are_told_shortly() -> None:
    assert [amount(v) for v in (0, 3.14159, 31.4159, 999.9, 1234, 2.5e9, 7e16, None)] == [
        "0.00",
        "3.14",
        "31.4",
        "1.00 k",
        "1.23 k",
        "2.50 G",
        "70.0 P",
        "–",
    ]
    assert [times(v) for v in (0.333, 12.34, 250.0, None)] == ["0.33x", "12.3x", "250x", "–"]
    assert [p_value(v) for v in (1.0, 0.0312, 0.0009, None)] == ["1.000", "0.031", "< 0.001", "–"]
    assert [score(v, True, True) for v in (0.1, -0.1, -0.0001, 0.0001)] == ["+10.0", "−10.0", "0.0", "0.0"]


# --- means over tasks -------------------------------------------------------------------------------------


def test_the_mean_weighs_tasks_alike(known: Path) -> None:
    found = overall(comparison_of(known))
    assert found["base"].score == pytest.approx((4 / 12 + 6 / 8) / 2)
    assert found["rerouting"].difference == pytest.approx((8 / 12 - 1 / 8) / 2)
    assert found["rerouting"].score == pytest.approx((1 + 5 / 8) / 2)
    assert found["rerouting"].costs["flops"] == pytest.approx(3e6)
    assert found["base"].experts_per_layer == [2.0, 2.0, 2.0]


def test_a_task_that_a_variant_lacks_is_in_no_mean(tmp_path: Path) -> None:
    base = [line(task, i, 1.0) for task in ("sums", "words") for i in range(4)]
    out = write(tmp_path / "r", {"base.0": base, "scmoe.0": base[:4]})
    assert shared_tasks(comparison_of(out)) == ["sums"]


@pytest.mark.parametrize("seed", range(3))
def test_the_pareto_front_by_brute_force(seed: int) -> None:
    import random

    chance = random.Random(seed)
    points = [(chance.randrange(8), chance.randrange(8)) for _ in range(12)]
    points = list(dict.fromkeys(points))

    def beaten(p: tuple[int, int]) -> bool:
        return any(q[0] <= p[0] and q[1] >= p[1] and q != p for q in points)

    expected = sorted(p for p in points if not beaten(p))
    assert [points[i] for i in pareto(points)] == expected
    assert pareto([(1, 1), (1, 1), (2, 1)]) == [0]


# --- pictures ---------------------------------------------------------------------------------------------


def figures(found: Mapping[str, Any], name: str = "run") -> dict[str, Any]:
    drawn = {
        "cost": pictures.accuracy_against_cost({name: found}, Cost.FLOPS),
        "differences": pictures.differences(found),
        "experts": pictures.experts_per_layer(found),
    }
    return {kind: figure for kind, figure in drawn.items() if figure is not None}


def words_of(figure: Any) -> dict[str, Any]:
    """Everything written in a picture that is seen, with its place in pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    FigureCanvasAgg(figure).draw()
    texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]
    hidden = [
        t for axis in figure.axes for one in (axis.xaxis, axis.yaxis) for t in _outside(one) if t.get_text().strip()
    ]
    shown = [t for t in texts if all(t is not h for h in hidden)]
    return {f"{i}: {t.get_text()}": t.get_window_extent() for i, t in enumerate(shown)}


def _outside(axis: Any) -> list[Any]:
    """Labels of ticks that matplotlib keeps beyond the ends of an axis and does not draw."""
    low, high = sorted(axis.get_view_interval())
    ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
    drawn = {id(t) for t in axis._update_ticks()}
    return [
        label
        for tick in ticks
        for label in (tick.label1, tick.label2)
        if id(tick) not in drawn or not low <= tick.get_loc() <= high
    ]


def test_nothing_overlaps_or_is_cut_off(run: Path) -> None:
    found = comparison_of(run)
    with canvas.styled():
        for kind, figure in figures(found).items():
            places = words_of(figure)
            assert places
            width, height = figure.bbox.width, figure.bbox.height
            for text, box in places.items():
                assert box.x0 >= -1, (kind, text)
                assert box.y0 >= -1, (kind, text)
                assert box.x1 <= width + 1, (kind, text)
                assert box.y1 <= height + 1, (kind, text)
            for (text, box), (other, there) in combinations(places.items(), 2):
                apart = (
                    box.x1 <= there.x0 + 1
                    or there.x1 <= box.x0 + 1
                    or box.y1 <= there.y0 + 1
                    or there.y1 <= box.y0 + 1
                )
                assert apart, (kind, text, other)


def test_pictures_show_the_numbers(known: Path) -> None:
    found = comparison_of(known)
    with canvas.styled():
        drawn = figures(found)
    cell = found["tasks"]["sums"]["variants"]["rerouting"]
    panel = drawn["differences"].axes[0]
    segments = [one.get_xdata() for one in panel.lines if list(one.get_ydata()) == [0, 0]]
    assert [pytest.approx(100 * end) for end in cell["difference_interval"]] in [list(s) for s in segments]
    filled = {one.get_ydata()[0]: one.get_markerfacecolor() for one in panel.lines if len(one.get_xdata()) == 1}
    assert filled[0] == style(0)[0]  # helps
    assert filled[1] != style(0)[0]  # cannot tell
    points = {one.get_label(): (one.get_xdata()[0], one.get_ydata()[0]) for one in drawn["cost"].axes[0].lines}
    assert points["base"] == pytest.approx((1e6, 100 * (4 / 12 + 6 / 8) / 2))
    assert points["rerouting"] == pytest.approx((3e6, 100 * (1 + 5 / 8) / 2))
    layers = drawn["experts"].axes[0]
    assert list(layers.lines[0].get_ydata()) == pytest.approx([1.0, 1.5, 2.0])
    assert [bar.get_height() for bar in layers.patches] == [2.0, 2.0, 2.0]


def test_runs_over_other_tasks_have_a_panel_of_their_own(tmp_path: Path) -> None:
    runs = {
        name: comparison_of(many(tmp_path / name, tasks, ("scmoe",)))
        for name, tasks in (("a", ["sums"]), ("b", ["sums"]), ("c", ["words"]))
    }
    with canvas.styled():
        figure = pictures.accuracy_against_cost(runs, Cost.SECONDS)
    labels = [set(axis.get_legend_handles_labels()[1]) - {"Pareto front"} for axis in figure.axes]
    assert labels == [{"a: base", "a: scmoe", "b: base", "b: scmoe"}, {"c: base", "c: scmoe"}]


def contrast(colour: str, ground: str) -> float:
    def light(text: str) -> float:
        parts = [int(text[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((light(colour), light(ground)))
    return (high + 0.05) / (low + 0.05)


def test_colours_can_be_seen_on_both_themes() -> None:
    grounds = next((light, dark) for light, (name, dark) in ON_DARK.items() if name == "ground")
    for light, (name, dark) in ON_DARK.items():
        if name not in ("ground", "grid"):
            least = 4.5 if name in ("ink", "faint") else 3.0
            assert contrast(light, grounds[0]) >= least, name
            assert contrast(dark, grounds[1]) >= least, name
    assert len({style(i) for i in range(49)}) == 49


# --- the page ---------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Tags that are closed as they were opened, and what is in them."""

    VOID = ("meta", "br", "wbr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip() and self.open:
            self.words.append((self.open[-1], data.strip()))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.mark.parametrize("run", ["no-variant", "failures", "many-variants"], indirect=True)
def test_the_page_needs_nothing_else(run: Path, tmp_path: Path) -> None:
    _, files = write_report([run], tmp_path / "report")
    text = (tmp_path / "report" / "index.html").read_text()
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "embed", "base", "a"}
    assert "://" not in text
    assert "@import" not in text
    assert all(found.startswith("#") for found in re.findall(r"url\(([^)]*)\)", text))
    names = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(names) == len(set(names))
    used = {str(a.get("xlink:href") or a.get("href")) for a in page.all("use")} | set(
        re.findall(r"url\((#[^)]*)\)", text)
    )
    assert used <= {f"#{name}" for name in names}
    drawings = page.all("svg")
    assert len(drawings) == sum(file.suffix == ".png" for file in files)
    assert all(drawing["role"] == "img" and drawing["aria-label"] for drawing in drawings)
    body = text[text.index("<main") :]
    assert not re.findall(r"#[0-9a-fA-F]{6}\b", body)  # every colour is one of the theme
    used = set(re.findall(r"var\(--([a-z0-9]+)\)", text))
    assert used <= set(re.findall(r"--([a-z0-9]+):", text))
    assert text.count("prefers-color-scheme: dark") == 1


def test_tables_of_the_page_are_accessible(known: Path, tmp_path: Path) -> None:
    write_report([known], tmp_path / "report")
    page = Page((tmp_path / "report" / "index.html").read_text())
    assert [a.get("lang") for a in page.all("html")] == ["en"]
    assert len(page.all("caption")) == len(page.all("table")) == 2
    scopes = [a.get("scope") for a in page.all("th")]
    assert None not in scopes
    assert scopes.count("rowgroup") == 4  # two tasks in two tables
    assert scopes.count("row") == 12
    assert ("td", "▲ helps") in page.words  # not by colour alone
    assert all(a.get("tabindex") == "0" and a.get("aria-label") for a in page.all("div"))


def test_names_are_no_markup(tmp_path: Path) -> None:
    name = "a<b>&\"c'|d_$x$"
    out = many(tmp_path / "x&y", [name], ("scmoe",))
    write_report([out], tmp_path / "report")
    text = (tmp_path / "report" / "index.html").read_text()
    assert "<b>" not in text
    assert "a&lt;b&gt;&amp;&quot;c&#x27;|d_<wbr>$x$" in text
    row = (tmp_path / "report" / "report.md").read_text().splitlines()[4]
    assert row.count("|") == len(COLUMNS) + 1


# --- the command ------------------------------------------------------------------------------------------


def invoke(*arguments: str) -> Any:
    return commands.invoke("report", *arguments)


def test_the_command_writes_and_prints(known: Path) -> None:
    done = invoke(str(known))
    assert done.exit_code == 0, done.stderr
    place = known / "report"
    assert sorted(f.name for f in place.iterdir()) == [
        "accuracy-cost.png",
        "differences.png",
        "experts.png",
        "index.html",
        "report.md",
    ]
    assert all(f.read_bytes().startswith(b"\x89PNG\r\n") for f in place.glob("*.png"))
    assert done.stdout == (place / "report.md").read_text() == markdown(comparison_of(known))
    assert str(place / "index.html") in done.stderr.replace("\n", "")
    again = {f.name: f.read_bytes() for f in place.iterdir()}
    assert invoke(str(known)).exit_code == 0
    assert {f.name: f.read_bytes() for f in place.iterdir()} == again  # the same run is the same report


def test_several_runs(known: Path, tmp_path: Path) -> None:
    other = many(tmp_path / "elsewhere" / "known", ["sums"], ("c3po",))
    done = invoke(str(known), str(other), "--out", str(tmp_path / "both"), "--cost", "seconds", "--json")
    found = json.loads(done.stdout)
    assert list(found["runs"]) == ["known", "known-2"]
    assert found["runs"]["known"] == comparison_of(known)
    assert sorted(Path(f).name for f in found["files"]) == [
        "accuracy-cost.png",
        "index.html",
        "known-2-differences.png",
        "known-2-experts.png",
        "known-differences.png",
        "known-experts.png",
        "report.md",
    ]
    text = (tmp_path / "both" / "report.md").read_text()
    assert re.findall("^## (.*)$", text, re.MULTILINE) == ["known", "known-2"]


def test_the_journals_count_and_not_an_old_comparison(known: Path, tmp_path: Path) -> None:
    compare(known)
    with (known / "journal" / "base.0.jsonl").open("a") as opened:
        opened.write(json.dumps(line("sums", 12, 1.0)) + "\n")
    assert re.search(r"\| +13 \|", invoke(str(known)).stdout)
    kept = tmp_path / "kept"
    kept.mkdir()
    (known / "comparison.json").rename(kept / "comparison.json")
    assert not re.search(r"\| +13 \|", invoke(str(kept)).stdout)
    (kept / "comparison.json").write_text("{}")
    done = invoke(str(kept))
    assert (done.exit_code, "is no comparison" in done.stderr) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such"], "There is no no/such/run.json"),
        (["RUN", "--metric", "accuracy"], "No task of"),
        (["RUN", "--out", "RUN/run.json"], "Cannot make"),
    ],
)
def test_what_is_asked_wrongly_is_one_line(known: Path, arguments: list[str], message: str) -> None:
    commands.assert_refused(invoke(*(argument.replace("RUN", str(known)) for argument in arguments)), message)


def test_without_matplotlib_the_extra_is_named(known: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = invoke(str(known))
    assert done.exit_code == 2
    assert 'pip install "ttrouting[eval]"' in done.stderr
    assert not (known / "report").exists()


def test_a_cost_that_no_run_knows_is_said(tmp_path: Path) -> None:
    done = invoke(str(many(tmp_path / "r", **RUNS["no-costs"])))
    assert done.exit_code == 0
    assert "No picture of accuracy against cost: no run knows FLOPs per document" in done.stderr


def test_comparing_brings_no_heavy_package() -> None:
    script = (
        "import sys, ttrouting.cli.report, ttrouting.evaluation.compare, ttrouting.evaluation.report.write\n"
        "print([name for name in ('matplotlib', 'scipy', 'lm_eval', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
