"""The results page, `docs/results.md`, with its pictures: from `docs/results.json` alone, without a run.

    python -m demos.study.page

Every number and every verdict is computed here. Why a target was missed is no number: that is told in `why.md` beside
this script, which is put into the page as it is.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ttrouting as ttr
from demos.study import pictures, tables
from demos.study.arithmetic import LEAST_GAP, Comparison, Results, comparisons, gaps, targets
from demos.study.collect import RESULTS, SCHEMA
from demos.study.plan import SHIFTED, SHOTS, TRAINED, VARIANTS
from ttrouting.evaluation.files import write_text
from ttrouting.registry import list_strategies

PAGE = Path("docs/results.md")
WHY = Path(__file__).with_name("why.md")
NAMES = {0: "questions alone", 6: "after six solved examples"}
LONG = ("calibration", "sensitivity", "fingerprint", "mask")  # options that no table has room for
MET = {True: "met", False: "missed", None: "not known yet"}
LEGEND = (
    "Means over the sets. *Difference*: to base, paired, in points with its 95 % interval. *Helps*, *hurts*: on so "
    "many sets it is told apart from luck, at 5 % by an exact McNemar test after Holm's correction over all {family} "
    "comparisons of the study. *Gap closed*: (variant − base) / (transfer oracle − base), over the sets where that "
    "oracle gains at least {gap:.0f} points. FLOPs and first token: as ratios to base. Rolled back: questions whose "
    "adaptation the no-harm rule undid."
)
IN_FULL = (
    "Accuracy in percent, then the difference in points with its interval. **Bold**: told apart from luck; ▼: for "
    "the worse."
)


def page(results: Results, found: Mapping[int, Comparison], files: Mapping[str, Path]) -> str:
    """The whole text; `found` are the comparisons of the results, `files` the pictures of both."""
    about = results["about"]
    parts = [
        "# Results on the pocket model",
        f"What the strategies gain and cost on {len(SHIFTED)} sets that the pocket model was never trained on "
        f"(skills that it knows, in another spelling or with longer lists) and on {len(TRAINED)} that it was. "
        f"{about['n']} test questions a set, greedy answers, exact match; options were chosen on dev questions, and "
        "test questions were scored once. The model is a fixture of 4M parameters: what holds here is no claim about "
        "large models.",
        "`python -m demos.study.page` makes this page from `results.json`; `make artefacts` makes all of it, model "
        "included. No number in its tables was typed.",
        "## In short",
        summary(results, found),
        "## When to use what, and when not",
        "*Use*: told apart from luck as a help on a third of the shifted sets or more, as a harm on none. *Helps "
        "now and then*: on fewer. *No better than a part of it*: a combination that one of its parts equals to half "
        "a point. *Nothing can be told*: no set differs. [How to choose](choosing.md) is for models that are no "
        "fixture.",
        *_advice(found),
    ]
    for shots in (s for s in SHOTS if found.get(s, {}).get("tasks")):
        parts += _with_shots(results, found[shots], shots, files)
    parts += [
        "## One worked example",
        example(results["example"], files),
        *([WHY.read_text(encoding="utf-8").strip()] if WHY.exists() else []),
        "## What is missing",
        missing(results),
        "## How it was done",
        _method(results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def summary(results: Results, found: Mapping[int, Comparison]) -> str:
    """Targets, met and missed."""
    told = {shots: targets(results, found[shots], shots) for shots in SHOTS if found.get(shots, {}).get("tasks")}
    rows = [
        [several[0].words, *(f"**{MET[one.met]}**: {one.facts}" for one in several)]
        for several in zip(*told.values(), strict=True)
    ]
    return tables.markdown(["target", *(NAMES[shots] for shots in told)], rows, left=1 + len(told))


def _with_shots(results: Results, comparison: Comparison, shots: int, files: Mapping[str, Path]) -> list[str]:
    family = comparison["family"]
    parts = [f"## Shifted sets, {NAMES[shots]}", tables.overview(results, comparison, shots)]
    parts += [LEGEND.format(family=family, gap=100 * LEAST_GAP), _best(results, shots)]
    parts += [_picture(files, f"front_{shots}", "Accuracy against FLOPs, mean over the shifted sets")]
    parts += _each(comparison, SHIFTED, _picture(files, f"shifted_{shots}", "Difference by variant and shifted set"))
    if measured := results["oracles"].get(str(shots)):
        asked = max(len(one["right"]["own_label"]) for one in measured.values())
        parts += [
            f"### How much room there is, {NAMES[shots]}",
            tables.room(results, shots),
            "*Transfer*: one delta for the set, fitted on labelled dev questions and scored on these. *Own label*: a "
            "delta optimised on the question's own answer; *wrong label*: the same towards a wrong answer. Where a "
            "wrong answer can be forced as well, the own label proves nothing. These two were asked the first "
            f"{asked} questions of each set.",
            _picture(files, f"room_{shots}", "Base and oracles by set"),
        ]
    parts += [f"### Where nothing is wrong, {NAMES[shots]}", tables.harm(comparison)]
    parts += _each(comparison, TRAINED, _picture(files, f"trained_{shots}", "Difference by variant and trained set"))
    parts += [f"### Fewer experts, {NAMES[shots]}", tables.fewer_experts(comparison)]
    parts += [f"### Worked steps, {NAMES[shots]}", tables.worked(results, comparison, shots)]
    parts += [f"### The papers' settings beside ours, {NAMES[shots]}", tables.settings(comparison)]
    return parts


def _each(comparison: Comparison, sets: Sequence[str], picture: str) -> list[str]:
    """Every set: as a picture, and in full behind a line that opens it."""
    if not any(name in sets for name in comparison["tasks"]):
        return []
    table = tables.by_set(comparison, sets)
    told = "Points over base; bold: told apart from luck." if picture else ""
    return [picture, told, "<details markdown>\n<summary>Each set in numbers</summary>", IN_FULL, table, "</details>"]


def _best(results: Results, shots: int) -> str:
    found = gaps(results, shots)
    if not found:
        return ""
    best = max(found, key=lambda name: found[name].share)
    each = ", ".join(f"{name} {100 * one:.0f} %" for name, one in found[best].sets.items())
    out = f" Without a gap to close: {', '.join(found[best].left_out)}." if found[best].left_out else ""
    return f"`{best}` closes most of the gap: {each}.{out}"


def example(one: Mapping[str, Any], files: Mapping[str, Path]) -> str:
    """Prompt, answers, what was done and which experts came and went."""
    report, strategy = one["report"], one["strategy"]
    options = ", ".join(f"{k}={strategy[k]!r}" for k in ("steps", "lr", "layers", "loss_on"))
    rows = [
        [c["layer"], *(", ".join(f"{e} ({100 * s:+.0f})" for e, s in c[way]) for way in ("gained", "lost"))]
        for c in report.get("experts", [])
    ]
    parts = [
        f"Question {one['number']} of {one['set']}. `Rerouting({options})` turns {one['put_right']} of the first "
        f"{one['looked_at']} test questions from wrong to right"
        + ("; this is the first of them." * (one["put_right"] > 0)),
        "```text\n" + one["prompt"] + "\n```",
        tables.markdown(
            ["right", "base", "adapted", "loss on the solved answers", "held back", "outcome"],
            [
                [
                    f"`{one['answer']}`",
                    f"`{one['base']}`",
                    f"`{one['adapted']}`",
                    _fell(report, "loss"),
                    _fell(report, "held_back"),
                    report["outcome"],
                ]
            ],
            left=6,
        ),
        _picture(files, "example", "Loss by step"),
        "Experts that more and fewer of its tokens chose afterwards, with the change in percent of tokens:"
        if rows
        else "",
        tables.markdown(["layer", "gained", "lost"], rows, left=3) if rows else "",
    ]
    return "\n\n".join(part for part in parts if part)


def _fell(report: Mapping[str, Any], name: str) -> str:
    before, after = (report.get(f"{name}_{when}") for when in ("before", "after"))
    return tables.NONE if before is None or after is None else f"{before:.3f} → {after:.3f}"


def _advice(found: Mapping[int, Comparison]) -> list[str]:
    parts = []
    for shots, comparison in found.items():
        if comparison["tasks"]:
            parts += [f"**{NAMES[shots].capitalize()}**", tables.advice(comparison)]
    return parts


def missing(results: Results) -> str:
    """What the plan has and the results have not."""
    lines = []
    installed = {info.name for info in list_strategies()}
    for shots in SHOTS:
        sets, oracles = (results[kind].get(str(shots), {}) for kind in ("runs", "oracles"))
        for variant in (v for v in VARIANTS if shots in v.shots):
            absent = [name for name in variant.sets if variant.name not in sets.get(name, {}).get("variants", {})]
            if absent:
                which = "every set" if len(absent) == len(variant.sets) else ", ".join(absent)
                needs = [name for name in variant.needs if name not in installed]
                why = f" ({', '.join(needs)} is not installed)" if needs else ""
                lines.append(f"- `{variant.name}`, {NAMES[shots]}: {which}{why}")
        without = [name for name in SHIFTED if name not in oracles]
        if without:
            lines.append(f"- oracles, {NAMES[shots]}: {', '.join(without)}")
    return "\n".join(lines) or "Nothing: all that was planned was run."


def _method(results: Results) -> str:
    about = results["about"]
    hardware, own = about["hardware"], about["versions"]
    versions = ", ".join(f"{name} {version}" for name, version in own.items())
    options = [
        [f"`{name}`", " and ".join(f"`{json.dumps(_brief(s))}`" for s in next(iter(by_shots.values())))]
        for name, by_shots in results["options"].items()
    ]
    return (
        f"Model fingerprint `{about['fingerprint'][:12]}`, seed {about['seed']}, begun {about['started'][:10]} on "
        f"{hardware['system']}, {hardware['processor'] or 'an unnamed processor'}, {hardware['threads']} thread; "
        "other jobs may have run beside, so times are upper bounds and FLOPs are what to compare. Versions: "
        f"{versions}.\n\nOptions, as they were run ({NAMES[6]} where both were):\n\n"
        + tables.markdown(["variant", "options"], options, left=2)
    )


def _brief(options: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is as usual or too long for a table."""
    usual: dict[str, Any] = {}
    for info in list_strategies():
        if info.name == options["strategy"] and info.name not in ("expert_mask", "static_routing"):
            usual = info.cls().to_dict()
    kept = {k: v for k, v in options.items() if k == "strategy" or usual.get(k, v) != v}
    return {k: v for k, v in kept.items() if k not in LONG}


def _picture(files: Mapping[str, Path], name: str, words: str) -> str:
    return f"![{words}](pictures/{files[name].name})" if name in files else ""


def read_results(file: Path) -> dict[str, Any]:
    """What `collect` wrote.

    Raises:
        ArtefactError: missing, damaged, or of another schema.
    """
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ttr.ArtefactError(f"Cannot read {file}: {error}. Make it: python -m demos.study.collect") from None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise ttr.ArtefactError(f"{file} is of another schema. Make it again: python -m demos.study.collect")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE, help="pictures go into pictures/ beside it")
    options = parser.parse_args()
    results = read_results(options.results)
    found = comparisons(results)
    files = pictures.write(results, found, options.page.parent / "pictures")
    write_text(options.page, page(results, found, files))
    print(options.page)


if __name__ == "__main__":
    main()
