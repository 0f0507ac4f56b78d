"""From the folders of a study to one file: `docs/results.json`, everything that the page needs.

    python -m demos.study.collect            of the shipped model, as far as its study has come

What the file holds already and still holds true stays (`earlier`). Of each variant and set: which questions were
right, as a string of 0 and 1, and what it cost. A set counts when all of its questions were answered; the page says
what is missing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from math import floor, log10
from pathlib import Path
from typing import Any

import ttrouting as ttr
from demos.study.earlier import RESULTS, earlier, made_from
from demos.study.example import worked_example
from demos.study.oracles import file_of
from demos.study.place import OUT, Place
from demos.study.plan import SEARCHES, SELF_CONSISTENCY, SHOTS, VARIANTS, Variant
from ttrouting.cli.output import Output
from ttrouting.evaluation.compare import COMPARISON, RATIOS, main_metric, read_journal
from ttrouting.evaluation.files import RUN, write_text
from ttrouting.evaluation.question import BASE

SCHEMA = 1
DIGITS = 4  # of costs
ABOUT = ("fingerprint", "n", "seed", "versions", "hardware", "started")


def collect(out: Path = OUT, n: int = 500, file: Path = RESULTS) -> dict[str, Any]:
    """What a study has found so far, beside what `file` keeps of it.

    Raises:
        ArtefactError: a damaged file. ConfigError: nothing was run.
    """
    places = [Place(shots, SEARCHES, out, n) for shots in SHOTS]
    found: dict[str, Any] = {"schema": SCHEMA, **earlier(places[0], file)}
    for place in places:
        shots = str(place.shots)
        runs: dict[str, Any] = found["runs"].setdefault(shots, {})
        for variant in VARIANTS:
            for name in variant.sets if place.shots in variant.shots else ():
                folder = place.folder / "runs" / variant.name / name
                if (folder / COMPARISON).exists():
                    _add(runs, found, shots, variant, name, folder)
        found["runs"][shots] = {name: _settled(one) for name, one in runs.items() if one["base"]}
        asked = [(name, file_of(place, name)) for name in dict.fromkeys(n for v in VARIANTS for n in v.sets)]
        measured = found["oracles"].setdefault(shots, {})
        measured |= {name: _oracle(own) for name, own in asked if own.exists()}
    if found["about"] is None:
        raise ttr.ConfigError(f"{places[0].home} holds no run of this model. Run one: python -m demos.study.run")
    found["about"]["made_from"] = made_from(places[0])
    found["example"] = worked_example(places[0])
    return found


def _add(runs: dict[str, Any], found: dict[str, Any], shots: str, variant: Variant, name: str, folder: Path) -> None:
    """One variant on one set, if all of its questions were asked."""
    asked = json.loads((folder / RUN).read_bytes())
    task = f"pocket_{name}"
    comparison = json.loads((folder / COMPARISON).read_bytes())["tasks"][task]
    one = comparison["variants"][variant.name]
    if one["n"] + one["failed"] < asked["limit"]:
        return
    right = {which: _right(folder, which, task) for which in (BASE, variant.name)}
    here = runs.setdefault(name, {"base": "", "cost": None, "variants": {}})
    kept = {
        "right": right[variant.name],
        "cost": _rounded(one["cost"]),
        "ratios": _rounded(one["ratios"]),
        "rolled_back": one["rolled_back"],
        "adapted": one["adapted"],
    }
    if variant.samples > 1:
        sampled = {
            "right": right[BASE],
            "cost": _rounded(comparison["base"]["cost"]),
            "rolled_back": 0.0,
            "adapted": 0.0,
        }
        here["variants"][SELF_CONSISTENCY] = sampled
        kept.pop("ratios")  # they are to base with samples
    elif not here["base"]:
        here |= {"base": right[BASE], "cost": _rounded(comparison["base"]["cost"])}
    elif right[BASE] != here["base"]:
        kept["base"] = right[BASE]  # another machine may round otherwise: each is paired with what ran beside it
    here["variants"][variant.name] = kept
    found["options"].setdefault(variant.name, {}).setdefault(shots, asked["variants"][variant.name])
    if found["about"] is None:
        asked |= {"fingerprint": asked["model"]["fingerprint"], "n": asked["limit"]}
        found["about"] = {key: asked[key] for key in ABOUT}


def _right(folder: Path, variant: str, task: str) -> str:
    """One letter a document."""
    lines = {number: line for (name, number), line in read_journal(folder, variant).items() if name == task}
    metric = main_metric([line for line in lines.values() if not line.failed])
    return "".join("-" if line.failed else "01"[line.metrics[metric] > 0.5] for _, line in sorted(lines.items()))


def _settled(one: dict[str, Any]) -> dict[str, Any]:
    """With the costs of sampled variants as ratios to base without samples, as all others are."""
    for kept in one["variants"].values():
        if "ratios" not in kept:
            ratios = {
                n: kept["cost"][n] / one["cost"][n] if kept["cost"][n] and one["cost"][n] else None for n in RATIOS
            }
            kept["ratios"] = _rounded(ratios)
    return one


def _oracle(file: Path) -> dict[str, Any]:
    found = json.loads(file.read_bytes())
    return {key: found[key] for key in ("n", "right", "forced", "paired", "transfer_fit", "descent", "seconds")}


def _rounded(costs: Mapping[str, Any] | None) -> dict[str, Any]:
    """To so many digits, without what is told layer by layer."""
    return {k: v if v is None else _round(v) for k, v in (costs or {}).items() if k != "experts_per_layer"}


def _round(value: float) -> float:
    return round(value, DIGITS - 1 - floor(log10(abs(value)))) if value else 0.0


def written(results: Mapping[str, Any]) -> str:
    """As JSON: a line for each variant of a set, so that a change is seen where it is."""
    lines = json.dumps(results, indent=1, ensure_ascii=False, sort_keys=False).splitlines()
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="folder of all studies")
    parser.add_argument("--n", type=int, default=500, help="test questions of each set, as in the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the file to go on with")
    options = parser.parse_args()
    output = Output()
    with output.waiting("reading the study"):
        found = collect(options.out, options.n, options.results)
    write_text(options.results, written(found))
    count = sum(len(one["variants"]) for sets in found["runs"].values() for one in sets.values())
    output.text(f"{options.results}: {count} comparisons, {sum(map(len, found['oracles'].values()))} oracles")


if __name__ == "__main__":
    main()
