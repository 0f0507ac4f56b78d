"""Read texts once and keep how they were routed: scores at one token, a mean hidden state, the losses of a span.

Legend: `B` texts, `T` tokens, `L` MoE layers, `E` experts, `D` hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ttrouting.context import Context
from ttrouting.errors import UnsupportedModelError
from ttrouting.keyed import sequence_keys
from ttrouting.plan import Plan
from ttrouting.rows import Rows
from ttrouting.session import Session
from ttrouting.sites import Site
from ttrouting.taps import Call
from ttrouting.target import Target


@dataclass
class PathwayRecorder:
    """Filled by the forwards inside `recording`; one row for each forward row of the model's own stream.

    Attributes:
        at: `[B]` int64, position inside its sequence of the token whose scores are kept.
        scores: by layer `[B, E]` fp32, the family's own scores before bias at that token.
        over: `[B, P]` bool, by position: of which tokens the mean hidden state is taken; None: all of them.
        total: `[B, D]` fp32, sum of the last hidden states of these tokens up to `at`. count: `[B]`, how many.
    """

    at: Tensor
    over: Tensor | None = None
    scores: dict[int, Tensor] = field(default_factory=dict)
    total: Tensor | None = None
    count: Tensor | None = None

    def omega(self) -> Tensor:
        """The pathway `[B, L, E]` fp32; layers with fewer experts end in zeros."""
        widest = max(s.shape[1] for s in self.scores.values())
        rows = [self.scores[i] for i in sorted(self.scores)]
        return torch.stack([nn.functional.pad(s, (0, widest - s.shape[1])).to(self.at.device) for s in rows], 1)

    def pooled(self) -> Tensor:
        """Mean hidden state `[B, D]` fp32 of the tokens up to `at` (of those in `over`), padding left out."""
        if self.total is None or self.count is None:
            raise UnsupportedModelError(
                "The model's base did not return hidden states, so it cannot embed texts. Use another embedder."
            )
        return self.total / self.count[:, None].to(self.total)

    def observe(self, site: Site, call: Call, ids: Tensor, weights: Tensor, rows: Rows) -> None:
        """An observer for `Session.observers`."""
        batch = rows.batch // rows.streams
        here = self._here(rows, batch)  # [B, S]
        scores = call.raw_scores().detach()[: batch * rows.length].float()  # [N, E]
        # chosen, not multiplied: what stands at padding may be no number
        own = torch.where(here[..., None].to(scores.device), scores.view(batch, rows.length, -1), 0)
        picked = own.sum(1)  # [B, E]
        self.scores[site.index] = self.scores[site.index] + picked if site.index in self.scores else picked

    def pool(self, hidden: Tensor, rows: Rows) -> None:
        """Add the last hidden states of a forward, `[B, S, D]`."""
        batch = rows.batch // rows.streams
        position = rows.position[:batch]
        inside = rows.valid[:batch] & (position <= self.at[:, None])  # [B, S]
        if self.over is not None:
            inside = inside & self.over.gather(1, position.clamp_max(self.over.shape[1] - 1))
        inside = inside.to(hidden.device)
        total = torch.where(inside[..., None], hidden[:batch].float(), 0).sum(1)  # [B, D]
        self.total = total if self.total is None else self.total + total
        self.count = inside.sum(1) if self.count is None else self.count + inside.sum(1)

    def _here(self, rows: Rows, batch: int) -> Tensor:
        return rows.valid[:batch] & (rows.position[:batch] == self.at[:, None])


@contextmanager
def recording(session: Session, at: Tensor, over: Tensor | None = None) -> Iterator[PathwayRecorder]:
    """Record the forwards inside the block; a text may be read in several parts. Arguments as in the recorder."""
    recorder = PathwayRecorder(at, over)

    def pool(_module: nn.Module, _args: Any, output: Any) -> None:
        hidden = getattr(output, "last_hidden_state", None)
        if hidden is not None and session.rows is not None:
            recorder.pool(hidden.detach(), session.rows)

    hook = getattr(session.model, "base_model", session.model).register_forward_hook(pool)
    session.observers.append(recorder.observe)
    try:
        yield recorder
    finally:
        session.observers.remove(recorder.observe)
        hook.remove()


@dataclass(frozen=True)
class Reading:
    """What one forward over prompts with their answers tells.

    Attributes:
        omega: `[B, L, E]` fp32, scores before bias at the last prompt token.
        pooled: `[B, D]` fp32, mean last hidden state of the prompt's tokens.
        log_likelihood: `[B]`, of the whole answer given the prompt, in nats.
        greedy: `[B]` bool, whether greedy decoding would write the answer, token by token.
    """

    omega: Tensor
    pooled: Tensor
    log_likelihood: Tensor
    greedy: Tensor


def encode(tokenizer: Any, prompts: Sequence[str], answers: Sequence[str]) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of prompts, and of the answers that go on from them.

    A prompt that begins with the tokenizer's own first token, as chat templates write it, gets no second one.
    """
    first = getattr(tokenizer, "bos_token", None)
    asked: list[list[int]] = []
    answered: list[list[int]] = []
    for prompt, answer in zip(prompts, answers, strict=True):
        special = not (first and prompt.startswith(first))
        ids = tokenizer(prompt, add_special_tokens=special)["input_ids"]
        whole = tokenizer(prompt + answer, add_special_tokens=special)["input_ids"]
        # some tokenizers end a text with a token, or split an answer by itself in another way
        same = len(whole) > len(ids) and whole[: len(ids)] == ids
        asked.append(ids)
        answered.append(whole[len(ids) :] if same else tokenizer(answer, add_special_tokens=False)["input_ids"])
    return asked, answered


def answered_context(
    prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], pad: int, device: torch.device
) -> tuple[Context, Tensor]:
    """Prompts with their answers as one left-padded batch.

    Args:
        prompts, answers: token ids, at least one each. pad: id to pad with.

    Returns:
        A context whose targets are the answers, and `[B]` the position of each last prompt token.
    """
    whole = [[*p, *a] for p, a in zip(prompts, answers, strict=True)]
    longest = max(len(ids) for ids in whole)
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in whole], device=device)  # [B, T]
    column = torch.arange(longest, device=device)
    length = torch.tensor([len(row) for row in whole], device=device)
    answer = torch.tensor([len(a) for a in answers], device=device)
    mask = column >= longest - length[:, None]
    targets = column >= longest - answer[:, None]
    return Context(ids, mask, targets, explicit=True), length - answer - 1


@torch.no_grad()
def read_answers(target: Target, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> Reading:
    """Read prompts with their answers in one batch under the model's own routing."""
    context, at = answered_context(prompts, answers, 0, home(target.model))
    longest = int(context.targets.sum(1).max())  # answers stand at the end of their rows
    keep = torch.arange(context.ids.shape[1] - longest - 1, context.ids.shape[1] - 1, device=context.ids.device)
    recorder, logits = _read(target, context, at, keep)
    if logits.shape[1] != longest:
        logits = logits[:, keep.to(logits.device)]
    logits = logits.float().to(context.ids.device)  # [B, A, V]
    wanted, inside = context.ids[:, -longest:], context.targets[:, -longest:]  # [B, A]
    log_p = logits.log_softmax(-1).gather(2, wanted[..., None])[..., 0]
    hit = logits.argmax(-1) == wanted
    return Reading(
        omega=recorder.omega(),
        pooled=recorder.pooled(),
        log_likelihood=torch.where(inside, log_p, 0).sum(1),
        greedy=(hit | ~inside).all(1),
    )


@torch.no_grad()
def read_prompts(
    target: Target, prompts: Sequence[Sequence[int]], over: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`omega [B, L, E]` and `pooled [B, D]` of prompts without answers, as in `Reading`; `over`: see the recorder."""
    context, at = answered_context(prompts, [[] for _ in prompts], 0, home(target.model))
    last = torch.tensor([context.ids.shape[1] - 1], device=context.ids.device)
    recorder, _ = _read(target, context, at, last, over)
    return recorder.omega(), recorder.pooled()


def home(model: Any) -> torch.device:
    """Where inputs are put; weights on the meta device are loaded for each forward."""
    device = model.get_input_embeddings().weight.device
    return device if device.type != "meta" else torch.device("cpu")


def _read(
    target: Target, context: Context, at: Tensor, keep: Tensor, over: Tensor | None = None
) -> tuple[PathwayRecorder, Tensor]:
    session = Session(Plan(target, (), None), context.mask, sequence_keys(context.ids, context.mask))
    with session.installed(), recording(session, at, None if over is None else over.to(at.device)) as recorder:
        logits: Tensor = session.read(context, keep).logits
    session.check_coverage()
    return recorder, logits
