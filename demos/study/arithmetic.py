"""What do right and wrong answers say? Differences, Holm over the whole study, the gap closed, targets. No text.

Right answers of a set are a string with one letter a question: `1` right, `0` wrong, `-` not answered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from demos.study.plan import SELF_CONSISTENCY, SHIFTED, TRAINED, VARIANTS, WORKED
from ttrouting.evaluation.report.markdown import ranged, score
from ttrouting.evaluation.statistics import ALPHA, LEVEL, Paired, combined_interval, holm, mean_interval, verdict

Results = Mapping[str, Any]  # the content of `docs/results.json`
Comparison = dict[str, Any]  # of one number of solved examples, laid out as `comparison.json` of `ttrouting eval`

# The targets of the study
ROOM, ROOM_SETS = 0.15, 6  # the transfer oracle over base, on so many shifted sets
CLOSED = 0.5  # share of its gap that the best strategy closes, and of the shifted sets on which significantly
DROPPED, WITHIN = 0.25, 0.01  # experts that dynamic-k saves, and the accuracy that may cost

LEAST_GAP = 0.05  # a transfer oracle that gains less leaves no gap to close: its share would be noise over noise
DRAWS = 2000


def scores(right: str) -> np.ndarray:
    """`[n]` 1, 0, and nan where a question was not answered."""
    return np.array([{"1": 1.0, "0": 0.0}.get(letter, np.nan) for letter in right])


def cell(base: str, other: str) -> dict[str, Any]:
    """One variant on one set, as in `comparison.json`, without what the family decides.

    Raises:
        ValueError: another number of questions, or none that both answered.
    """
    if len(base) != len(other):
        raise ValueError(f"{len(base)} questions of base are paired with {len(other)} of a variant")
    first, second = scores(base), scores(other)
    both = ~np.isnan(first) & ~np.isnan(second)
    paired = Paired.of(first[both], second[both])
    return {
        "n": paired.n,
        "failed": int((~both).sum()),
        "missing": 0,
        "mean": paired.second,
        "interval": list(mean_interval(second[both])),
        "base": paired.first,
        "difference": paired.difference,
        "difference_interval": list(paired.interval),
        "p_value": paired.p_value,
        "won": paired.won,
        "lost": paired.lost,
        "detectable": paired.detectable,
    }


def comparisons(results: Results) -> dict[int, Comparison]:
    """By solved examples, everything that was scored, with p values by Holm over the whole study."""
    found: dict[int, Comparison] = {}
    for shots, sets in results["runs"].items():
        tasks = {}
        for name in sorted(sets, key=(*SHIFTED, *TRAINED).index):
            one = sets[name]
            right = scores(one["base"])
            known = right[~np.isnan(right)]
            tasks[name] = {
                "metric": "exact_match",
                "n": known.size,
                "failed": len(right) - known.size,
                "base": {
                    "mean": float(known.mean()),
                    "interval": list(mean_interval(known)),
                    "cost": _shown(one["cost"]),
                },
                "variants": {
                    variant: {**cell(kept.get("base", one["base"]), kept["right"]), **_costs(kept)}
                    for variant, kept in sorted(one["variants"].items(), key=lambda item: ORDER.index(item[0]))
                },
            }
        found[int(shots)] = {"tasks": tasks, "level": LEVEL, "layers": []}
    cells = [c for one in found.values() for task in one["tasks"].values() for c in task["variants"].values()]
    for one, p in zip(cells, holm([c["p_value"] for c in cells]), strict=True):
        one["p_holm"], one["verdict"] = p, verdict(one["difference"], p)
    for comparison in found.values():
        comparison["family"] = len(cells)
    return found


def scored(tasks: Mapping[str, Any]) -> list[str]:
    """Variants that were scored on any of these sets, in the order of the plan."""
    return [name for name in ORDER if any(name in one["variants"] for one in tasks.values())]


ORDER = [name for v in VARIANTS for name in ([SELF_CONSISTENCY] if v.samples > 1 else []) + [v.name]]


def _costs(kept: Mapping[str, Any]) -> dict[str, Any]:
    return {**{name: kept[name] for name in ("ratios", "rolled_back", "adapted")}, "cost": _shown(kept["cost"])}


def _shown(cost: Mapping[str, Any]) -> dict[str, Any]:
    """As pictures want it; of layers nothing is kept."""
    return {**cost, "experts_per_layer": []}


def only(comparison: Comparison, sets: Sequence[str], variants: Sequence[str] | None = None) -> Comparison:
    """A part of a comparison: of these sets, and those variants that were scored on all that are there."""
    tasks = {name: one for name, one in comparison["tasks"].items() if name in sets}
    everywhere = [name for name in ORDER if tasks and all(name in one["variants"] for one in tasks.values())]
    kept = [name for name in everywhere if variants is None or name in variants]
    return {
        **comparison,
        "tasks": {n: {**one, "variants": {v: one["variants"][v] for v in kept}} for n, one in tasks.items()},
    }


# --- the gap ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gap:
    """Share of the transfer oracle's gain that a variant reaches, mean over sets; 1 is all of it.

    Attributes:
        share, interval: with a 95 % bootstrap interval over questions. sets: by name; left_out: those without a gap.
    """

    share: float
    interval: tuple[float, float]
    sets: dict[str, float]
    left_out: tuple[str, ...]


def gap_closed(
    base: Mapping[str, str], variant: Mapping[str, str], transfer: Mapping[str, str], seed: int = 0
) -> Gap | None:
    """`(variant - base) / (transfer - base)` of each set where the oracle gains at least `LEAST_GAP`, and their mean.

    Args:
        base, variant, transfer: right answers by set, of the same questions.

    Returns:
        None where no set has a gap.
    """
    shared = [name for name in transfer if name in base and name in variant]
    kept: dict[str, np.ndarray] = {}
    for name in shared:
        columns = np.stack([scores(one[name]) for one in (base, variant, transfer)])  # [3, n]
        columns = columns[:, ~np.isnan(columns).any(0)]
        if columns.size and columns[2].mean() - columns[0].mean() >= LEAST_GAP:
            kept[name] = columns
    if not kept:
        return None
    shares = {name: float(_share(columns.mean(1))) for name, columns in kept.items()}
    random, means = np.random.default_rng(seed), np.zeros(DRAWS)
    for columns in kept.values():
        kinds, counts = np.unique(columns, axis=1, return_counts=True)  # [3, kinds]: all that a draw depends on
        drawn = random.multinomial(columns.shape[1], counts / columns.shape[1], DRAWS) @ kinds.T  # [draws, 3]
        means += _share(drawn.T / columns.shape[1]) / len(kept)
    low, high = np.quantile(means, (0.025, 0.975))
    left_out = tuple(name for name in shared if name not in kept)
    return Gap(fmean(shares.values()), (float(low), float(high)), shares, left_out)


def _share(means: np.ndarray) -> Any:
    """Of `[3, ...]` means of base, variant and transfer."""
    gap = means[2] - means[0]
    return (means[1] - means[0]) / np.maximum(gap, LEAST_GAP / 5)  # a drawn gap may be next to nothing


def gaps(results: Results, shots: int) -> dict[str, Gap]:
    """By variant, over the shifted sets; of variants that were scored on all of those that have a transfer oracle."""
    sets = results["runs"].get(str(shots), {})
    oracles = results["oracles"].get(str(shots), {})
    transfer = {n: oracles[n]["right"]["transfer"] for n in SHIFTED if n in oracles and n in sets}
    # asked in the order and number of the oracles: both are the first test questions
    transfer = {n: one for n, one in transfer.items() if len(one) == len(sets[n]["base"])}
    found = {}
    for name in ORDER:
        right = {n: sets[n]["variants"][name]["right"] for n in transfer if name in sets[n]["variants"]}
        if transfer and len(right) == len(transfer):
            gap = gap_closed({n: sets[n]["base"] for n in transfer}, right, transfer)
            if gap is not None:
                found[name] = gap
    return found


# --- targets ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """One target. `met`: None where it cannot be told yet; `facts`: what that rests on."""

    words: str
    met: bool | None
    facts: str


def targets(results: Results, comparison: Comparison, shots: int) -> list[Target]:
    """What was aimed for, and what was reached, with so many solved examples, of which the comparison is."""
    return [
        _room(results, shots),
        _closed(results, comparison, shots),
        _no_harm(comparison),
        _dynamic_k(comparison),
        _scmoe(comparison),
    ]


def _room(results: Results, shots: int) -> Target:
    words = f"The transfer oracle is at least {100 * ROOM:.0f} points above base on {ROOM_SETS} shifted sets"
    known = {n: o for n, o in results["oracles"].get(str(shots), {}).items() if n in SHIFTED}
    gains = {name: one["paired"]["transfer"]["difference"] for name, one in known.items()}
    wide = [name for name, gain in gains.items() if gain >= ROOM]
    if not gains:
        return Target(words, None, "no oracle was measured")
    facts = f"{len(wide)} of {len(gains)} that were measured, whose gains are "
    facts += " to ".join(score(end(gains.values()), True, signed=True) for end in (min, max))
    possible = len(wide) + len(SHIFTED) - len(gains) >= ROOM_SETS
    return Target(
        words, True if len(wide) >= ROOM_SETS else None if possible and len(gains) < len(SHIFTED) else False, facts
    )


def _closed(results: Results, comparison: Comparison, shots: int) -> Target:
    words = "The best strategy closes half of the transfer oracle's gap, significantly on half of the shifted sets"
    found = gaps(results, shots)
    if not found:
        return Target(words, None, "no variant was scored on all shifted sets that have an oracle")
    best = max(found, key=lambda name: found[name].share)
    gap, shifted = found[best], [n for n in SHIFTED if n in comparison["tasks"]]
    helped = [n for n in shifted if comparison["tasks"][n]["variants"].get(best, {}).get("verdict") == "helps"]
    met = gap.share >= CLOSED and 2 * len(helped) >= len(SHIFTED)
    facts = (
        f"{best} closes {100 * gap.share:.0f} % [{100 * gap.interval[0]:.0f}, {100 * gap.interval[1]:.0f}] over "
        f"{len(gap.sets)} sets with a gap, and helps on {len(helped)} of {len(shifted)}"
    )
    return Target(words, met, facts)


def _no_harm(comparison: Comparison) -> Target:
    words = "With the no-harm rule no set shows a significant loss under any default recipe"
    defaults = [v.name for v in VARIANTS if v.default and v.no_harm]
    seen = [(t, v, c) for t, one in comparison["tasks"].items() for v, c in one["variants"].items() if v in defaults]
    hurt = [f"{v} on {t} ({100 * c['difference']:+.1f})" for t, v, c in seen if c["verdict"] == "hurts"]
    if not seen:
        return Target(words, None, "no default recipe was scored")
    return Target(
        words, not hurt, f"{len(hurt)} of {len(seen)} comparisons" + (f": {', '.join(hurt)}" if hurt else "")
    )


@dataclass(frozen=True)
class Saved:
    """What a variant of dynamic-k saves, over the sets that it was scored on.

    Attributes:
        dropped: share of expert calls. difference, interval: of accuracy, mean over sets.
    """

    dropped: float
    difference: float
    interval: tuple[float, float]
    sets: int


def saved(comparison: Comparison, variant: str) -> Saved | None:
    """Over all sets; None where it was scored on none."""
    pairs = [
        (one["base"], one["variants"][variant]) for one in comparison["tasks"].values() if variant in one["variants"]
    ]
    if not pairs:
        return None
    calls = [c["cost"]["experts_per_token"] / base["cost"]["experts_per_token"] for base, c in pairs]
    differences = [c["difference"] for _, c in pairs]
    interval = combined_interval(differences, [c["difference_interval"] for _, c in pairs])
    return Saved(1 - fmean(calls), fmean(differences), interval, len(pairs))


def _dynamic_k(comparison: Comparison) -> Target:
    words = f"Dynamic-k drops at least {100 * DROPPED:.0f} % of expert calls within {100 * WITHIN:.0f} point of base"
    names = [v.name for v in VARIANTS if v.name.startswith("dynamic_k")]
    found = {name: one for name in names if (one := saved(comparison, name)) is not None}
    if not found:
        return Target(words, None, "it was not scored")
    enough = {name: one for name, one in found.items() if one.dropped >= DROPPED}
    told = enough or found
    best = max(told, key=lambda name: told[name].difference)
    one = told[best]
    difference = ranged(one.difference, one.interval, True, signed=True)
    facts = f"{best} drops {100 * one.dropped:.0f} % at {difference} points, mean of {one.sets} sets"
    return Target(words, bool(enough) and one.difference >= -WITHIN, facts)


def _scmoe(comparison: Comparison) -> Target:
    words = "SCMoE beats greedy decoding on the skills with worked steps"
    found = {}
    for name in ("scmoe", "scmoe_tuned"):
        cells = [
            one["variants"][name] for t, one in comparison["tasks"].items() if t in WORKED and name in one["variants"]
        ]
        if cells:
            won, lost = sum(c["won"] for c in cells), sum(c["lost"] for c in cells)
            paired = Paired.of([0] * won + [1] * lost, [1] * won + [0] * lost) if won + lost else None
            found[name] = (won, lost, paired.p_value if paired else 1.0, sum(c["n"] for c in cells), len(cells))
    if not found:
        return Target(words, None, "it was not scored there")
    best = max(found, key=lambda name: found[name][0] - found[name][1])
    won, lost, p, n, sets = found[best]
    facts = f"{best} wins {won} and loses {lost} of {n} questions of {sets} sets, exact p {p:.3g}"
    return Target(words, won > lost and p < ALPHA, facts)
