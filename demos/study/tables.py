"""Which tables does the results page have? Each from comparisons, as Markdown; a bold difference is no luck."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from demos.study.arithmetic import DROPPED, Comparison, Gap, Results, cell, gaps, only, saved, scored
from demos.study.plan import SELF_CONSISTENCY, SHIFTED, TRAINED, VARIANTS, WORKED
from ttrouting.evaluation.report.markdown import NONE, number, p_value, ranged, score, times
from ttrouting.evaluation.statistics import combined_interval

ABOUT = {v.name: v.about for v in VARIANTS} | {
    SELF_CONSISTENCY: f"base, {max(v.samples for v in VARIANTS)} answers vote"
}
# of the same idea: as published, as users get it, as it works best here
SETTINGS = {
    "Rerouting": ("rerouting_paper", "rerouting", "rerouting_answers"),
    "C3PO": ("c3po_mode_finding_paper", "c3po_kernel_regression_paper", "c3po_ngd_paper", "c3po", "c3po_all_tokens"),
    "SCMoE": ("scmoe", "scmoe_tuned"),
}
SEEN = 0.005  # share of the expert calls that is worth a number
SLACK = 0.005  # mean difference that is worth no second strategy
KINDS = (
    "Use",  # helps on a third of the shifted sets or more, and hurts nowhere
    "Helps now and then",  # on fewer
    "No better than a part of it",  # a combination
    "Use for fewer experts",  # no set differs
    "With care",  # helps here and hurts there
    "Not for accuracy",
    "Nothing can be told",
)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table whose first `left` columns hold words."""
    marks = ["---"] * left + ["--:"] * (len(header) - left)
    return "\n".join(f"| {' | '.join(one)} |" for one in (header, marks, *rows))


def change(one: Mapping[str, Any]) -> str:
    """A difference with its interval: bold where it helps, bold and marked where it hurts."""
    told = ranged(one["difference"], one["difference_interval"], True, signed=True)
    head, _, interval = told.partition(" ")
    marked = {"helps": f"**{head}**", "hurts": f"**{head}** ▼"}.get(one["verdict"], head)
    return f"{marked} {interval}"


def overview(results: Results, comparison: Comparison, shots: int) -> str:
    """What each variant comes to over the shifted sets, and what it costs."""
    part = {name: one for name, one in comparison["tasks"].items() if name in SHIFTED}
    closed = gaps(results, shots)
    header = ["variant", "accuracy", "difference", "helps", "hurts", "gap closed", "FLOPs", "first token"]
    header += ["experts/token", "rolled back"]
    accuracy = _accuracy([one["base"] for one in part.values()])
    rows = [["base", accuracy, "", "", "", "", "1x", "1x", *_experts(part, None), ""]]
    for name in scored(part):
        there = [one["variants"][name] for one in part.values() if name in one["variants"]]
        complete, verdicts = len(there) == len(part), [c["verdict"] for c in there]
        rolled = [c["rolled_back"] for c in there if c["rolled_back"] is not None]
        rows.append(
            [
                name,
                _accuracy(there) if complete else NONE,
                _mean(there) if complete else NONE,
                *(str(verdicts.count(word)) if complete else NONE for word in ("helps", "hurts")),
                share(closed.get(name)),
                *(_ratio(there, which) for which in ("flops", "first_token_seconds")),
                *_experts(part, name),
                f"{100 * fmean(rolled):.0f} %" if rolled else NONE,
            ]
        )
    return markdown(header, rows)


def by_set(comparison: Comparison, sets: Sequence[str]) -> str:
    """Variants by sets: accuracy, and the paired difference."""
    part = {name: one for name, one in comparison["tasks"].items() if name in sets}
    rows = [["base", *(score(one["base"]["mean"], True) for one in part.values())]]
    for name in scored(part):
        cells = [one["variants"].get(name) for one in part.values()]
        rows.append([name, *(NONE if c is None else f"{score(c['mean'], True)} {change(c)}" for c in cells)])
    return markdown(["variant", *part], rows)


def _accuracy(cells: Sequence[Mapping[str, Any]]) -> str:
    return score(fmean(c["mean"] for c in cells), True)


def share(gap: Gap | None) -> str:
    """Of the gap, with its interval."""
    if gap is None:
        return NONE
    middle, low, high = (f"{round(100 * one)}" for one in (gap.share, *gap.interval))
    return f"{middle} % [{low}, {high}]".replace("-", "−")


def _mean(cells: Sequence[Mapping[str, Any]]) -> str:
    differences = [c["difference"] for c in cells]
    interval = combined_interval(differences, [c["difference_interval"] for c in cells])
    return ranged(fmean(differences), interval, True, signed=True)


def _ratio(cells: Sequence[Mapping[str, Any]], which: str) -> str:
    known = [c["ratios"][which] for c in cells if c["ratios"].get(which)]
    return times(fmean(known)) if known else NONE


def _experts(part: Mapping[str, Any], variant: str | None) -> list[str]:
    parts = [one["base"] if variant is None else one["variants"].get(variant) for one in part.values()]
    known = [p["cost"]["experts_per_token"] for p in parts if p is not None and p["cost"]]
    return [number(fmean(known)) if known else NONE]


def room(results: Results, shots: int) -> str:
    """What the oracles show, by set."""
    header = [
        "set",
        "base",
        "transfer",
        "gain",
        "own label",
        "wrong label: right",
        "wrong label: wrong answer forced",
    ]
    rows = []
    known = results["oracles"].get(str(shots), {})
    for name in (n for n in (*SHIFTED, *TRAINED) if n in known):
        one = known[name]
        right = {kind: 100 * text.count("1") / len(text) for kind, text in one["right"].items()}
        paired, forced = one["paired"]["transfer"], one["forced"]["wrong_label"]
        rows.append(
            [
                name,
                *(f"{right[kind]:.1f}" for kind in ("base", "transfer")),
                ranged(paired["difference"], paired["interval"], True, signed=True),
                *(f"{right[kind]:.1f}" for kind in ("own_label", "wrong_label")),
                f"{100 * forced.count('1') / len(forced):.1f}",
            ]
        )
    return markdown(header, rows)


def harm(comparison: Comparison) -> str:
    """On sets that the model was trained on, for each variant: the mean, the worst, and what is more than luck."""
    header = ["variant", "no-harm", "sets", "difference", "worst", "on", "helps", "hurts"]
    tasks = {name: one for name, one in comparison["tasks"].items() if name in TRAINED}
    rules = {v.name: "on" if v.no_harm else "off" for v in VARIANTS} | {SELF_CONSISTENCY: ""}
    rows = []
    for name in scored(tasks):
        cells = {t: one["variants"][name] for t, one in tasks.items() if name in one["variants"]}
        worst = min(cells, key=lambda t: cells[t]["difference"])
        verdicts = [c["verdict"] for c in cells.values()]
        counts = [str(verdicts.count(word)) for word in ("helps", "hurts")]
        rows.append(
            [name, rules[name], str(len(cells)), _mean(list(cells.values())), change(cells[worst]), worst, *counts]
        )
    return markdown(header, rows, left=2)


def fewer_experts(comparison: Comparison) -> str:
    """What dynamic-k saves, over all sets; FLOPs with what its no-harm check reads."""
    header = ["variant", "options", "expert calls dropped", "difference", "sets", "hurts", "FLOPs"]
    rows = []
    for variant in (v.name for v in VARIANTS if "dynamic_k" in v.name):
        found = saved(comparison, variant)
        if found is not None:
            cells = [o["variants"][variant] for o in comparison["tasks"].values() if variant in o["variants"]]
            hurt = sum(c["verdict"] == "hurts" for c in cells)
            told = ranged(found.difference, found.interval, True, signed=True)
            counts = [str(found.sets), str(hurt), _ratio(cells, "flops")]
            rows.append([variant, ABOUT[variant], f"{100 * found.dropped:.1f} %", told, *counts])
    return markdown(header, rows, left=2)


def worked(results: Results, comparison: Comparison, shots: int) -> str:
    """SCMoE and votes where answers have worked steps; the last column is beside votes without SCMoE."""
    names = ("scmoe", "scmoe_tuned", "task_delta+scmoe", SELF_CONSISTENCY, "scmoe_tuned+self_consistency")
    part = only(comparison, WORKED, names)["tasks"]
    sets = results["runs"].get(str(shots), {})
    header = ["set", "base", *names, "votes with SCMoE beside votes without"]
    rows = []
    for name, one in part.items():
        cells = [one["variants"].get(v) for v in names]
        votes = [sets[name]["variants"].get(v) for v in names[3:]]
        beside = NONE
        if all(votes):
            plain = cell(votes[0]["right"], votes[1]["right"])
            told = ranged(plain["difference"], plain["difference_interval"], True, signed=True)
            beside = f"{told}, p {p_value(plain['p_value'])}"
        rows.append(
            [
                name,
                score(one["base"]["mean"], True),
                *(NONE if c is None else f"{score(c['mean'], True)} {change(c)}" for c in cells),
                beside,
            ]
        )
    return markdown(header, rows)


def settings(comparison: Comparison) -> str:
    """The papers' settings beside ours: mean differences, over sets on which all of a method were scored."""
    header = [
        "method",
        "variant",
        "options",
        "shifted sets",
        "helps, hurts there",
        "trained sets",
        "helps, hurts there",
        "FLOPs",
    ]
    rows = []
    for method, names in SETTINGS.items():
        seen = {v for one in comparison["tasks"].values() for v in one["variants"]}
        there = [name for name in names if name in seen]
        shared = {t: o for t, o in comparison["tasks"].items() if there and all(v in o["variants"] for v in there)}
        for name in there if shared else []:
            row = [method, name, ABOUT[name]]
            for group in (SHIFTED, TRAINED):
                cells = [one["variants"][name] for t, one in shared.items() if t in group]
                row += [_mean(cells) if cells else NONE, _verdicts(cells)]
            rows.append([*row, _ratio([one["variants"][name] for one in shared.values()], "flops")])
    return markdown(header, rows, left=3)


def advice(comparison: Comparison) -> str:
    """When to use what, and when not: by kinds of variants, the largest gain first."""
    tasks = comparison["tasks"]
    cells = {
        name: {t: one["variants"][name] for t, one in tasks.items() if name in one["variants"]}
        for name in scored(tasks)
    }
    dropped = {name: found.dropped for name in cells if (found := saved(comparison, name)) is not None}
    kinds = {name: _kind(cells, name, dropped[name] >= DROPPED) for name in cells}
    header = ["", "variant", "what it is", "on shifted sets", "helps, hurts", "on trained sets", "helps, hurts"]
    header += ["FLOPs", "expert calls dropped"]
    rows = []
    for kind in KINDS:
        names = sorted((n for n in cells if kinds[n] == kind), key=lambda n: -_gain(cells[n]))
        for name in names:
            row = [f"**{kind}**" if name == names[0] else "", f"`{name}`", ABOUT[name]]
            for group in (SHIFTED, TRAINED):
                there = [cells[name][t] for t in group if t in cells[name]]
                row += [_mean(there), f"{_verdicts(there)} of {len(there)}"] if there else [NONE, ""]
            fewer = f"{100 * dropped[name]:.0f} %" if dropped[name] >= SEEN else ""
            rows.append([*row, _ratio(list(cells[name].values()), "flops"), fewer])
    return markdown(header, rows, left=3)


def _kind(cells: Mapping[str, Mapping[str, Any]], name: str, saves: bool) -> str:
    """Which of `KINDS` a variant is, among all (variant to set to cell); whether it saves experts is known."""
    own = cells[name]
    verdicts = {t: c["verdict"] for t, c in own.items()}
    if "hurts" in verdicts.values():
        return "With care" if "helps" in verdicts.values() else "Not for accuracy"
    if "helps" not in verdicts.values():
        return "Use for fewer experts" if saves else "Nothing can be told"
    parts = [cells.get(part, {}) for part in name.split("+") if part != name]
    alone = [_gain({t: part[t] for t in own}) for part in parts if own.keys() <= part.keys()]
    if not saves and any(gain >= _gain(own) - SLACK for gain in alone):
        return "No better than a part of it"
    shifted = [v for t, v in verdicts.items() if t in SHIFTED]
    return "Use" if shifted.count("helps") >= len(shifted) / 3 else "Helps now and then"


def _gain(cells: Mapping[str, Mapping[str, Any]]) -> float:
    """Mean difference over the shifted sets, or over all where there are none."""
    shifted = [c["difference"] for t, c in cells.items() if t in SHIFTED]
    return fmean(shifted or [c["difference"] for c in cells.values()])


def _verdicts(cells: Sequence[Mapping[str, Any]]) -> str:
    helps, hurts = (sum(c["verdict"] == word for c in cells) for word in ("helps", "hurts"))
    return f"{helps}, {hurts}"
