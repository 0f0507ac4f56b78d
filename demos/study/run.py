"""Tune on dev, score on test: every variant of the plan, from where it was left.

    python -m demos.study.run --list                 what there is, what is done, about how long the rest takes
    python -m demos.study.run                        everything; hours, and it may be stopped at any moment
    python -m demos.study.run --shots 0 --only scmoe,rerouting --sets shifted

Each variant has a folder of its own for each set, with base beside it on the same documents: what `ttrouting eval`
writes, so `ttrouting report` draws it. So a variant can be added later, and base is compared with at the same load.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

import ttrouting as ttr
from demos.study.earlier import RESULTS, earlier
from demos.study.place import OUT, Place
from demos.study.plan import SEARCHES, SHIFTED, SHOTS, TRAINED, VARIANTS, Variant, planned
from ttrouting.cli.output import Output
from ttrouting.evaluation import question
from ttrouting.evaluation.compare import COMPARISON

GROUPS = {"shifted": SHIFTED, "trained": TRAINED, "all": SHIFTED + TRAINED}


def score(place: Place, variant: Variant, name: str) -> Path:
    """One variant on one set; nothing that was answered before is asked again. Returns the folder."""
    frozen = None if variant.search is None else place.recipe(variant.search)
    one = question.Variant(variant.name, variant.make(place, name), frozen)
    folder = place.folder / "runs" / variant.name / name
    place.evaluate(
        folder, [one], [name], split="test", limit=place.n, no_harm=variant.no_harm, samples=variant.samples
    )
    return folder


def todo(place: Place, variants: Sequence[Variant], sets: Sequence[str]) -> list[tuple[Variant, str]]:
    """Variants on sets, what adapting is for before where nothing is wrong: the main table is there first."""
    groups = [[name for name in sets if (name in SHIFTED) == shifted] for shifted in (True, False)]
    return [
        (variant, name)
        for group in groups
        for variant in variants
        if place.shots in variant.shots
        for name in group
        if name in variant.sets
    ]


def kept_of(kept: Mapping[str, Any], place: Place, variant: Variant, name: str) -> bool:
    """Whether earlier results tell of a variant on a set."""
    return variant.name in kept["runs"].get(str(place.shots), {}).get(name, {"variants": ()})["variants"]


def finished(place: Place, kept: Mapping[str, Any], variant: Variant, name: str) -> bool:
    """Whether a variant was scored on a set: before, or in the study's folder."""
    here = place.folder / "runs" / variant.name / name / COMPARISON
    return kept_of(kept, place, variant, name) or here.exists()


def overview(place: Place, kept: Mapping[str, Any], variants: Sequence[Variant], sets: Sequence[str]) -> Table:
    """What is planned, what is done, and about how long the rest takes."""
    table = Table(title=f"{place.shots} solved examples", box=None, pad_edge=False, header_style="bold")
    for column in ("variant", "options", "sets", "done", "hours left"):
        table.add_column(column, justify="left" if column in ("variant", "options") else "right")
    hours = 0.0
    for variant in variants:
        own = [name for one, name in todo(place, [variant], sets) if one is variant]
        done = sum(finished(place, kept, variant, name) for name in own)
        left = variant.seconds(place.shots, place.n, len(own) - done) / 3600 if own else 0.0
        hours += left
        if own:
            table.add_row(variant.name, variant.about, str(len(own)), str(done), f"{left:.1f}")
    table.add_row("", "", "", "", f"{hours:.1f}", style="bold")
    return table


def chosen_sets(text: str) -> tuple[str, ...]:
    """Sets by the names of groups or their own."""
    found = tuple(
        dict.fromkeys(name for part in text.split(",") for name in GROUPS.get(part.strip(), (part.strip(),)))
    )
    unknown = [name for name in found if name not in GROUPS["all"]]
    if unknown:
        raise ttr.ConfigError(f"No set {unknown[0]!r}. Known: {', '.join([*GROUPS, *GROUPS['all']])}.")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shots", type=int, choices=SHOTS, help="solved examples before each question; default: both"
    )
    parser.add_argument("--only", default="", metavar="NAME,...", help=f"of {', '.join(v.name for v in VARIANTS)}")
    parser.add_argument("--sets", default="all", metavar="NAME,...", help="shifted, trained, or single ones")
    parser.add_argument("--n", type=int, default=500, help="test questions of each set")
    parser.add_argument("--dev", type=int, default=40, help="dev questions of each set that options are chosen on")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of all studies")
    parser.add_argument("--list", action="store_true", help="what is planned and done; runs nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, help="results that were kept; not run again")
    options = parser.parse_args()
    sets, output = chosen_sets(options.sets), Output()
    only = tuple(filter(None, options.only.split(",")))
    for shots in SHOTS if options.shots is None else (options.shots,):
        place = Place(shots, SEARCHES, options.out, options.n, options.dev, output.notes)
        variants, kept = planned(only, shots), earlier(place, options.results)
        if options.list:
            output.show(overview(place, kept, variants, sets))
            continue
        for variant, name in todo(place, variants, sets):
            if kept_of(kept, place, variant, name):
                continue
            output.note(f"{shots} solved examples, {name}: {variant.name}")
            score(place, variant, name)


if __name__ == "__main__":
    main()
