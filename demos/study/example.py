"""One worked example: a question that the model gets wrong and adapted gets right, with what changed in between."""

from __future__ import annotations

from typing import Any

import ttrouting as ttr
from demos.study.place import Place
from demos.study.plan import ANSWERS
from ttrouting.pocket.measure import LONGEST_ANSWER
from ttrouting.pocket.skills import parse_answer

SET = "reverse_letters"
LOOKED_AT = 40  # questions
STRATEGY = ttr.Rerouting(steps=10, lr=0.1, layers="all", loss_on=ANSWERS, interval=None)


def worked_example(place: Place) -> dict[str, Any]:
    """The first of the set's test questions that the adaptation puts right; if none is, the first of all.

    Returns:
        `prompt`, `answer`, `base` and `adapted` answer lines, `strategy`, `report`: what was done to the question.
    """
    asked = place.questions(SET, "test", LOOKED_AT)
    inputs = place.tokenizer([q.prompt for q in asked], return_tensors="pt", padding=True)
    options = {"do_sample": False, "max_new_tokens": LONGEST_ANSWER}
    said: dict[str, list[str]] = {}
    for name, strategies in (("base", []), ("adapted", [STRATEGY])):
        with ttr.adapt(place.model, strategies, tokenizer=place.tokenizer) as adapted:
            ids = adapted.generate(**inputs, **options)
            report = adapted.report
        texts = place.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        said[name] = [parse_answer(text) for text in texts]
    right = {name: [a == q.answer for a, q in zip(one, asked, strict=True)] for name, one in said.items()}
    turned = [i for i in range(len(asked)) if right["adapted"][i] and not right["base"][i]]
    number = turned[0] if turned else 0
    own = report.sequences[number].strategies[STRATEGY.name]
    kept = ("outcome", "loss_before", "loss_after", "held_back_before", "held_back_after", "kl", "curve", "experts")
    return {
        "set": SET,
        "shots": place.shots,
        "number": number,
        "looked_at": len(asked),
        "put_right": len(turned),
        "prompt": asked[number].prompt,
        "answer": asked[number].answer,
        "base": said["base"][number],
        "adapted": said["adapted"][number],
        "strategy": STRATEGY.to_dict(),
        "report": {name: own[name] for name in kept if name in own},
    }
