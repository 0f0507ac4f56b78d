"""Of which task is a question? The classifier beside scipy's minimiser, plain softmax and nearest neighbours."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from ttrouting.refsets.task_classifier import HELD_OUT, PENALTIES, TaskClassifier, fit_classifier

D, T = 12, 4


def drawn(n, noise=1.0, seed=0):
    """Questions of four tasks: unit vectors around a centre of each."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(9).normal(size=(T, D))
    tasks = np.arange(n) % T
    rows = centres[tasks] + noise * random.normal(size=(n, D))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), tasks


def softmax(rows, weight, bias):
    powers = np.exp(rows.astype(float) @ weight.T + bias)
    return powers / powers.sum(1, keepdims=True)


def by_scipy(rows, tasks, penalty):
    """Weight and bias at the minimum of the penalised mean loss."""
    own = np.eye(T)[tasks]

    def loss(flat):
        weight, bias = flat[: T * D].reshape(T, D), flat[T * D :]
        found = softmax(rows, weight, bias)
        slope = (found - own) / len(rows)
        value = -np.log((found * own).sum(1)).mean() + penalty / 2 * (weight**2).sum()
        return value, np.concatenate([(slope.T @ rows + penalty * weight).ravel(), slope.sum(0)])

    flat = minimize(loss, np.zeros(T * D + T), jac=True, method="L-BFGS-B", options={"maxiter": 5000}).x
    return flat[: T * D].reshape(T, D), flat[T * D :]


def test_probabilities_are_a_softmax_also_of_large_logits():
    random = np.random.default_rng(0)
    weight, bias = random.normal(size=(T, D)).astype(np.float32), random.normal(size=T).astype(np.float32)
    rows = drawn(7)[0]
    found = TaskClassifier(weight, bias).probabilities(rows)
    np.testing.assert_allclose(found, softmax(rows, weight, bias), rtol=1e-9)
    large = TaskClassifier(2000 * weight, bias).probabilities(rows)
    np.testing.assert_allclose(large.sum(1), 1)


def test_the_penalty_is_chosen_on_unseen_questions_and_the_fit_is_the_minimum():
    rows, tasks = drawn(160, noise=1.2)
    questions = np.arange(160)
    held = questions % HELD_OUT == HELD_OUT - 1
    judged = {}
    for penalty in PENALTIES:
        weight, bias = by_scipy(rows[~held], tasks[~held], penalty)
        found = softmax(rows[held], weight, bias)
        losses = -np.log(found[np.arange(held.sum()), tasks[held]])
        judged[penalty] = losses.mean(), losses.std() / np.sqrt(held.sum()), (found.argmax(1) == tasks[held]).mean()
    mean, error, _ = min(judged.values())
    chosen = max(penalty for penalty in PENALTIES if judged[penalty][0] <= mean + error)
    fitted = fit_classifier(rows, tasks, questions, T)
    assert fitted.penalty == chosen
    assert fitted.loss == pytest.approx(judged[chosen][0], rel=0.02)
    assert fitted.right == pytest.approx(judged[chosen][2], abs=0.04)
    expected = softmax(rows, *by_scipy(rows, tasks, chosen))
    np.testing.assert_allclose(fitted.classifier.probabilities(rows), expected, atol=0.01)


def test_rows_of_one_question_are_held_out_together():
    """Labels are drawn by lot: only who has seen a question's other row can know its task."""
    random, n = np.random.default_rng(3), 61
    rows = random.normal(size=(n, 80)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    tasks = random.integers(0, T, size=n)
    twice, labels = np.concatenate([rows, rows]), np.concatenate([tasks, tasks])
    apart = fit_classifier(twice, labels, np.arange(2 * n), T)
    together = fit_classifier(twice, labels, np.concatenate([np.arange(n)] * 2), T)
    assert together.right < 0.6
    assert apart.right == 1


def test_it_tells_apart_what_neighbours_cannot():
    """Two tasks that differ in one dimension of little variance."""
    random = np.random.default_rng(0)

    def questions(n):
        tasks = np.arange(n) % 2
        rows = random.normal(size=(n, D))
        rows[:, 0] = 0.4 * (2 * tasks - 1) + 0.1 * random.normal(size=n)
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), tasks

    (rows, tasks), (asked, wanted) = questions(200), questions(200)
    nearest = tasks[(asked @ rows.T).argsort(1)[:, -8:]].mean(1) > 0.5
    found = fit_classifier(rows, tasks, np.arange(200), 2).classifier.probabilities(asked).argmax(1)
    assert (nearest == wanted).mean() < 0.85
    assert (found == wanted).mean() > 0.97


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_the_type_that_models_are_loaded_in_does_not_matter(default):
    rows, tasks = drawn(40)
    expected = fit_classifier(rows, tasks, np.arange(40), T).classifier
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        found = fit_classifier(rows, tasks, np.arange(40), T).classifier
    finally:
        torch.set_default_dtype(before)
    assert np.array_equal(found.weight, expected.weight)


def test_few_questions_and_one_task():
    rows, tasks = drawn(3)
    assert fit_classifier(rows, tasks, np.arange(3), T).classifier.probabilities(rows).argmax(1).tolist() == [0, 1, 2]
    alone = fit_classifier(rows, np.zeros(3, np.int64), np.arange(3), 1)
    assert alone.classifier.probabilities(rows).tolist() == [[1.0]] * 3
