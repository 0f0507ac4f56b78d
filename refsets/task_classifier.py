"""Of which task of a set is a question? Multinomial logistic regression on the vectors that are compared.

Nearest references cannot tell tasks apart that differ in little, such as counting in lists of six and of seven: they
are near by all of a vector. A linear map weighs the part that tells the tasks apart.

Legend: `n` questions, `D` embedding dimension, `T` tasks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

PENALTIES = (1e-4, 1e-5, 1e-6, 1e-7, 1e-8)  # on half of the squared weights, beside the mean loss
HELD_OUT = 5  # every fifth question chooses the penalty
STEPS = 300


@dataclass(frozen=True)
class TaskClassifier:
    """`softmax(W v + b)` of a vector `v`.

    Attributes:
        weight: `[T, D]` fp32. bias: `[T]` fp32.
    """

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]

    def probabilities(self, vectors: NDArray[np.float32]) -> NDArray[np.float64]:
        """`[B, T]` for vectors `[B, D]`."""
        logits = vectors.astype(np.float64) @ self.weight.T.astype(np.float64) + self.bias
        return torch.from_numpy(logits).softmax(1).numpy()


@dataclass(frozen=True)
class Fitted:
    """A classifier, and how well one fitted to the rest knew every fifth question.

    Attributes:
        penalty: that was chosen. right: share of those whose task it knew. loss: mean over them, in nats.
    """

    classifier: TaskClassifier
    penalty: float
    right: float
    loss: float


def fit_classifier(
    vectors: NDArray[np.float32], tasks: NDArray[np.int64], questions: NDArray[np.int64], count: int
) -> Fitted:
    """Fit to all questions, with a penalty chosen on those that a first fit has not seen.

    It is the largest whose loss there is within one standard error of the lowest (Hastie, Tibshirani and Friedman,
    The Elements of Statistical Learning, 7.10): nothing is surer than it need be.

    Args:
        vectors: `[n, D]`, as `ReferenceSet.compared` gives them. tasks: `[n]`, the task of each, below `count`.
        questions: `[n]`; rows of one question, alone and in longer texts, are held out together.
    """
    _, order = np.unique(questions, return_inverse=True)
    held = torch.from_numpy(order % HELD_OUT == HELD_OUT - 1)
    given, wanted = torch.from_numpy(np.asarray(vectors, np.float32)), torch.from_numpy(tasks)
    seen = ~held
    if not bool(held.any()):
        held = seen  # of fewer than five questions none can be spared
    judged: dict[float, tuple[Tensor, float]] = {}
    for penalty in PENALTIES:
        weight, bias = _descend(given[seen], wanted[seen], count, penalty)
        logits = given[held] @ weight.T + bias
        losses = nn.functional.cross_entropy(logits, wanted[held], reduction="none").double()
        judged[penalty] = losses, float((logits.argmax(1) == wanted[held]).double().mean())
    best, _ = min(judged.values(), key=lambda one: float(one[0].mean()))
    limit = float(best.mean() + best.std(correction=0) / len(best) ** 0.5)
    chosen = max(penalty for penalty, (losses, _) in judged.items() if float(losses.mean()) <= limit)
    weight, bias = _descend(given, wanted, count, chosen)
    losses, right = judged[chosen]
    return Fitted(TaskClassifier(weight.numpy(), bias.numpy()), chosen, right, float(losses.mean()))


@torch.enable_grad()
def _descend(vectors: Tensor, tasks: Tensor, count: int, penalty: float) -> tuple[Tensor, Tensor]:
    """Weight `[T, D]` and bias `[T]` at the minimum, by L-BFGS from 0."""
    # in the vectors' type, whatever the default type is that a model is loaded under
    weight = vectors.new_zeros(count, vectors.shape[1]).requires_grad_()
    bias = vectors.new_zeros(count).requires_grad_()
    optimiser = torch.optim.LBFGS(
        [weight, bias], max_iter=STEPS, tolerance_grad=1e-7, tolerance_change=1e-10, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(vectors @ weight.T + bias, tasks) + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return weight.detach(), bias.detach()
