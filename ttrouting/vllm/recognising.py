"""TaskDelta in an engine: a prompt is read, its task is recognised, and it is read again under the task's delta.

Legend: `L` MoE layers, `E` experts, `D` hidden size, `V` vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ttrouting.errors import ConfigError, UnsupportedCallError
from ttrouting.objective import divergence
from ttrouting.spans import last_match, leading_special
from ttrouting.strategies._task_recognition import mean_deltas, recognise, refusal, told, verdict

if TYPE_CHECKING:
    from ttrouting.vllm.bookkeeping import Held


def check_task_delta(task_delta: Any, shape: tuple[int, int], fingerprint: str) -> None:
    """Raise unless an engine can do what is asked for.

    Args:
        shape: `(L, E)` of the engine's model. fingerprint: of it; empty where it is not known.

    Raises:
        ConfigError, ArtefactError, UnsupportedCallError: what to ask for instead.
    """
    references = task_delta.references
    if task_delta.embedder is not None or references.embedder_name != "model":
        raise UnsupportedCallError("task_delta in vLLM takes reference sets that were embedded by the model itself.")
    if fingerprint:
        references.check_model(fingerprint)
    found = task_delta.bank.values.shape[1:]
    if found != shape:
        raise ConfigError(f"The task deltas are for {list(found)} layers and experts, this model has {list(shape)}.")


def compared(task_delta: Any, ids: list[int], tokenizer: Any) -> tuple[int, int]:
    """What of a prompt is compared with references: its first so many tokens, and those from a position on.

    Raises:
        UnsupportedCallError: the question is to be found in the text, and the engine has no tokenizer.
    """
    if task_delta.question is None:
        return 0, 0
    if tokenizer is None:
        raise UnsupportedCallError(
            "task_delta looks for the question in the prompt's text, and this engine has no tokenizer "
            "(skip_tokenizer_init). Start it with one, or compare whole prompts: embed_on='all'."
        )
    start = last_match(ids, task_delta.question, tokenizer) or 0
    return min(start, leading_special(ids, tokenizer)), start


def read_again(held: Held, hidden: Tensor, logits: Tensor) -> bool:
    """Whether the prompt is to be read again: with the delta of its task, or without it after all.

    Args:
        hidden: `[n, D]` fp32, of the prompt's tokens in a forward. logits: `[V]` of the last of them.
    """
    _, count, before = held.rows
    leading, start = held.compared
    if held.before is None:
        compares = hidden[: max(0, leading - before)].sum(0) + hidden[max(0, start - before) :].sum(0)  # [D]
        held.total = compares if held.total is None else held.total + compares
    if before + count < held.prompt:
        return False
    options, no_harm, again = held.wanted.task_delta, held.wanted.no_harm, False
    log_p = logits.float().log_softmax(-1)
    if held.before is not None:
        kl = float(divergence(log_p, held.before))
        outcome = verdict(options, kl, no_harm)
        held.facts |= {"outcome": outcome, "kl": kl}
        again, held.read, held.before = outcome != "accepted", True, None
        held.learned = None if again else held.learned
    elif held.total is not None:
        held.learned, facts = delta_of(options, held.total / (leading + held.prompt - start), no_harm)
        held.facts |= facts
        again = held.learned is not None
        held.read, held.before = not again, log_p if again else None
    return again


def delta_of(task_delta: Any, pooled: Tensor, no_harm: bool) -> tuple[Tensor | None, dict[str, Any]]:
    """The delta `[L, E]` of a prompt's task, or None where it keeps its base routing.

    Args:
        pooled: `[D]` mean hidden state of what is compared.

    Returns:
        The delta, and facts for the report.
    """
    (recognised,) = recognise(task_delta, pooled.double().cpu().numpy()[None])
    outcome = refusal(task_delta, recognised, no_harm)
    facts = told(task_delta, recognised)
    if outcome:
        return None, {"outcome": outcome, **facts}
    _, layers, experts = task_delta.bank.values.shape
    return mean_deltas(task_delta, [recognised], torch.zeros(1, layers, experts))[0], facts
