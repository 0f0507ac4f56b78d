"""Which variants are compared, with which options, on which sets? Data, in the order in which they are run.

A variant's options are one of three: its strategy's defaults, its paper's, or chosen on dev questions (`SEARCHES`).
What is as published runs without the no-harm rule, which no paper has; all else runs with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ttrouting as ttr
from demos.study.place import Place, Search, set_names
from ttrouting.registry import list_strategies
from ttrouting.strategy import Strategy

SHOTS = (6, 0)  # few-shot first: that is where most can be learned from a prompt
SHIFTED, TRAINED = set_names(trained=False), set_names(trained=True)
SPELLED = tuple(name for name in SHIFTED if name.replace("letters", "digits") in TRAINED)  # known skills in letters
WORKED = tuple(f"{skill}_{dialect}" for skill in ("word", "program") for dialect in ("digits", "letters"))
# for what takes hours on all trained sets: room above and below, both spellings, one that the model has mastered
CONTROLS = ("word_letters", "program_letters", "add_letters", "subtract_digits", "sequence_digits", "reverse_digits")
ALL, SOME = SHIFTED + TRAINED, SHIFTED + CONTROLS

BASE_MS = {0: 5.0, 6: 18.0}  # a question of the model as it is; one core, 64 questions at a time
SAMPLES = 16  # answers that vote
ANSWERS = r"A:(.*\n)"  # of the solved examples in a prompt
EVERYWHERE: dict[str, Any] = {"scope": "all", "layers": "all", "core_experts": 1.0, "k": 8, "use": "all"}

SEARCHES: dict[str, Search] = {
    "scmoe_tuned": Search(ttr.SCMoE(), {"beta": (0.1, 0.3, 0.5), "weak": ("rank:2", "random")}, WORKED),
    "rerouting_answers": Search(
        ttr.Rerouting(loss_on=ANSWERS, layers="all", interval=None),
        {"steps": (5, 10, 20), "lr": (0.05, 0.1)},
        SPELLED,
    ),
}


@dataclass(frozen=True)
class Variant:
    """One way to run the model.

    Attributes:
        name: of its folder and its row. about: its options in words.
        make: strategies for a set; what takes time is kept in `place`.
        times: about how often the time of base it takes, by solved examples: of estimates.
        sets, shots: where it is scored. no_harm: whether that rule is on.
        default: whether a user gets these options without asking for any, so that it must do no harm.
        search: the key in `SEARCHES` whose recipe it is. samples: answers that vote.
        needs: strategies that must be installed.
    """

    name: str
    about: str
    make: Callable[[Place, str], tuple[Strategy, ...]]
    times: dict[int, float]
    sets: tuple[str, ...] = ALL
    shots: tuple[int, ...] = SHOTS
    no_harm: bool = True
    default: bool = False
    search: str | None = None
    samples: int = 1
    needs: tuple[str, ...] = ()

    def seconds(self, shots: int, n: int, sets: int) -> float:
        """About how long this many questions of so many sets take, base beside it included; tuning is not."""
        return sets * n * self.samples * BASE_MS[shots] * (1 + self.times[shots]) / 1000


def fixed(*strategies: Strategy) -> Callable[[Place, str], tuple[Strategy, ...]]:
    """The same options on every set."""
    return lambda place, name: strategies


def recipe(name: str) -> Callable[[Place, str], tuple[Strategy, ...]]:
    """Options that were chosen on dev."""
    return lambda place, _: (place.chosen(name),)


def task_delta() -> Strategy:
    return ttr.TaskDelta()


def _free(times: float = 1.2) -> dict[int, float]:
    return {0: times, 6: times}


DYNAMIC_K = tuple(
    Variant(
        f"dynamic_k_{rule}",
        f"rule {rule}, calibrated to drop a quarter of the experts and more",
        lambda place, _, rule=rule, share=share: (place.calibrated(rule, share),),
        _free(),
    )
    # by entropy no fewer than 68 % can be reached here: what holds three quarters of the probability stays
    for rule, share in (("sensitivity", 0.6), ("relative", 0.6), ("top_p", 0.6), ("entropy", 0.7))
)

VARIANTS: tuple[Variant, ...] = (
    Variant("dynamic_k", "defaults: top-p of 0.8", fixed(ttr.DynamicK()), _free(), default=True),
    *DYNAMIC_K,
    Variant("expert_mask", "half of the experts, by 25 dev questions", lambda p, n: (p.mask(n),), _free()),
    Variant(
        "task_delta",
        "defaults: a delta learned for the task that a prompt looks like",
        lambda p, n: (task_delta(),),
        _free(2),
        default=True,
        needs=("task_delta",),
    ),
    Variant(
        "task_delta+dynamic_k",
        "both, dynamic-k by sensitivity, calibrated",
        lambda p, n: (task_delta(), p.calibrated("sensitivity", 0.6)),
        _free(2),
        needs=("task_delta",),
    ),
    Variant("scmoe", "defaults, which are the paper's: beta 0.5", fixed(ttr.SCMoE()), _free(2.3), default=True),
    Variant("scmoe_tuned", "beta and weak routing by dev questions", recipe("scmoe_tuned"), _free(2.3)),
    Variant(
        "task_delta+scmoe",
        "both, SCMoE as tuned",
        lambda p, n: (task_delta(), p.chosen("scmoe_tuned")),
        _free(3),
        sets=WORKED,
        needs=("task_delta",),
    ),
    Variant(
        "scmoe_tuned+self_consistency",
        f"SCMoE as tuned, {SAMPLES} answers vote",
        recipe("scmoe_tuned"),
        _free(2.3),
        sets=WORKED,
        samples=SAMPLES,
    ),
    Variant("rerouting", "defaults", fixed(ttr.Rerouting()), {0: 15, 6: 10}, default=True),
    Variant("c3po", "defaults: NGD at the last prompt token", fixed(ttr.C3PO()), {0: 25, 6: 8}, default=True),
    Variant(
        "rerouting_answers",
        "loss on the answers of the solved examples; steps and rate by dev questions",
        recipe("rerouting_answers"),
        {6: 30},
        sets=SOME,
        shots=(6,),
    ),
    Variant(
        "task_delta+rerouting_answers",
        "both",
        lambda p, n: (task_delta(), p.chosen("rerouting_answers")),
        {6: 31},
        sets=SOME,
        shots=(6,),
        needs=("task_delta",),
    ),
    Variant(
        "rerouting_paper",
        "preset=paper, as published",
        fixed(ttr.Rerouting.preset("paper")),
        {0: 20, 6: 14},
        sets=SOME,
        no_harm=False,
    ),
    *(
        Variant(
            f"c3po_{surrogate}_paper",
            f"preset=paper, {surrogate}, as published",
            fixed(ttr.C3PO.preset("paper", surrogate=surrogate)),
            {0: 25, 6: 8},
            sets=SOME,
            no_harm=False,
        )
        for surrogate in ("mode_finding", "kernel_regression", "ngd")
    ),
    Variant(
        "c3po_all_tokens",
        "NGD on all tokens, all layers, 8 neighbours of any outcome",
        fixed(ttr.C3PO(**EVERYWHERE)),
        {0: 80, 6: 22},
        sets=SOME,
    ),
)
SELF_CONSISTENCY = "self_consistency"  # base where samples vote: run beside the first variant that samples


def planned(only: tuple[str, ...] = (), shots: int | None = None) -> list[Variant]:
    """Variants that can be run here, in their order: those of these names, at so many solved examples.

    Raises:
        ConfigError: a name that is no variant, or one that needs a strategy which is not installed.
    """
    installed = {info.name for info in list_strategies()}
    names = {variant.name for variant in VARIANTS}
    for name in only:
        if name not in names:
            raise ttr.ConfigError(f"No variant {name!r}. Known: {', '.join(sorted(names))}.")
    found = [v for v in VARIANTS if (not only or v.name in only) and (shots is None or shots in v.shots)]
    for variant in found:
        if only and not installed.issuperset(variant.needs):
            raise ttr.ConfigError(f"{variant.name} needs {', '.join(variant.needs)}, which is not installed.")
    return [variant for variant in found if installed.issuperset(variant.needs)]
