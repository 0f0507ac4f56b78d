"""What does the file of results already tell? A study takes a night: what was found and kept is not run again.

Results count as long as they are of this model and of as many questions; those of strategies that read the shipped
reference set, as long as it is the same, and so with the deltas that were fitted on it. Nothing else is looked at:
after a change of code that matters, start anew with --results naming a file that is not there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ttrouting as ttr
from demos.study.place import Place

RESULTS = Path("docs/results.json")
SET = Path("refsets/shipped/pocket")
READ_BY = {"manifest": "refset", "deltas": "deltas"}  # part of the set, and the option of strategies that read it


def made_from(place: Place) -> dict[str, Any]:
    """What results depend on: the model, how many questions, the shipped set and the deltas fitted on it."""
    shipped = {name: json.loads((SET / f"{name}.json").read_bytes())["sha256"] for name in ("manifest", "deltas")}
    return {"fingerprint": place.fingerprint, "n": place.n, **shipped}


def earlier(place: Place, file: Path = RESULTS) -> dict[str, Any]:
    """Results that were kept and still hold: `runs`, `options`, `oracles`, by the number of examples.

    Raises:
        ArtefactError: the file is no JSON.
    """
    nothing: dict[str, Any] = {"runs": {}, "options": {}, "oracles": {}, "about": None}
    if not file.exists():
        return nothing
    try:
        found = json.loads(file.read_bytes())
    except ValueError as fault:
        raise ttr.ArtefactError(f"{file} is damaged ({fault}). Take it from the repository again.") from fault
    was, now = found["about"].get("made_from", {}), made_from(place)
    if any(was.get(name) != now[name] for name in ("fingerprint", "n")):
        return nothing
    for what, option in READ_BY.items():
        if was.get(what) != now[what]:
            _forget(found, {name for name, options in found["options"].items() if _has(option, options)})
    return {name: found[name] for name in nothing}


def _has(option: str, options: Mapping[str, list[dict[str, Any]]]) -> bool:
    return any(option in strategy for strategies in options.values() for strategy in strategies)


def _forget(found: dict[str, Any], names: set[str]) -> None:
    """Drop variants. A set whose base stands alone keeps it: what comes is compared with what runs beside it."""
    for name in names:
        del found["options"][name]
    for sets in found["runs"].values():
        for one in sets.values():
            one["variants"] = {k: v for k, v in one["variants"].items() if k not in names}
