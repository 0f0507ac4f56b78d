"""Kernels against their formulas, one number at a time."""

import math

import numpy as np
import pytest

from ttrouting.errors import ConfigError
from ttrouting.refsets.kernels import KERNELS, weights
from ttrouting.refsets.neighbours import Neighbours


def near(distance, similarity=None, index=None) -> Neighbours:
    distance = np.array(distance, dtype=np.float32)
    similarity = 1 - distance**2 / 2 if similarity is None else np.array(similarity, dtype=np.float32)
    index = np.arange(distance.size).reshape(distance.shape) if index is None else np.array(index)
    return Neighbours(index, similarity, distance)


def formula(kernel: str, distance: float, cosine: float, sigma: float) -> float:
    if kernel == "gaussian":
        return math.exp(-(distance**2) / (2 * sigma**2))
    if kernel == "matern":
        return (1 + math.sqrt(3) * distance / sigma) * math.exp(-math.sqrt(3) * distance / sigma)
    return max(0.0, cosine) if kernel == "linear" else (1 + cosine) ** 2


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sigma", [None, 0.3])
def test_formulas(kernel, sigma):
    found = near([[0.2, 0.5, 0.9, 1.3], [0.4, 0.4, 1.6, 1.9]])
    got = weights(kernel, found, sigma)
    assert got.dtype == np.float32
    for row, distance in enumerate(found.distance.tolist()):
        ordered = sorted(distance)
        width = (ordered[1] + ordered[2]) / 2 if sigma is None else sigma
        value = [formula(kernel, d, 1 - d**2 / 2, width) for d in distance]
        np.testing.assert_allclose(got[row], [v / sum(value) for v in value], atol=1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_missing_neighbours_weigh_nothing(kernel):
    index = [[4, 7, -1], [-1, -1, -1], [3, -1, -1]]
    distance = [[0.2, 0.6, math.inf], [math.inf] * 3, [0.8, math.inf, math.inf]]
    cosine = [[0.98, 0.82, math.nan], [math.nan] * 3, [0.68, math.nan, math.nan]]
    got = weights(kernel, near(distance, cosine, index))
    alone = weights(kernel, near([[0.2, 0.6]], [[0.98, 0.82]]))
    np.testing.assert_allclose(got[0], [*alone[0], 0], atol=1e-7)
    assert got[1].tolist() == [0, 0, 0]
    assert got[2].tolist() == [1, 0, 0]


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_columns_and_no_rows(kernel):
    assert weights(kernel, near(np.zeros((2, 0)))).shape == (2, 0)
    assert weights(kernel, near(np.zeros((0, 3)))).shape == (0, 3)


@pytest.mark.parametrize("kernel", ["gaussian", "matern"])
def test_bandwidth_where_the_median_is_zero(kernel):
    # the mean stands in, and 1 where every distance is 0
    got = weights(kernel, near([[0.0, 0.0, 0.9], [0.0, 0.0, 0.0]]))
    value = [formula(kernel, d, 0, 0.3) for d in (0.0, 0.0, 0.9)]
    np.testing.assert_allclose(got, [[v / sum(value) for v in value], [1 / 3] * 3], atol=1e-6)


@pytest.mark.parametrize("kernel", ["gaussian", "matern"])
def test_a_narrow_bandwidth_is_no_division_by_zero(kernel):
    got = weights(kernel, near([[1.0, 1.0, 1.5]]), sigma=1e-3)  # exp(-500000) is 0 in floating point
    np.testing.assert_allclose(got, [[0.5, 0.5, 0]], atol=1e-6)


def test_all_pointing_away():
    assert weights("linear", near([[1.5, 1.6]], [[-0.1, -0.3]])).tolist() == [[0.5, 0.5]]
    assert weights("linear", near([[1.2, 1.6]], [[0.3, -0.3]])).tolist() == [[1, 0]]
    assert weights("polynomial", near([[2.0, 2.0]], [[-1, -1]])).tolist() == [[0.5, 0.5]]


def test_refused():
    found = near([[0.5, 0.6]], [[math.nan, math.nan]])
    with pytest.raises(ConfigError, match="Did you mean 'gaussian'"):
        weights("gausian", found)
    for sigma in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match="sigma is a distance above 0, got"):
            weights("gaussian", found, sigma)
    for kernel in ("linear", "polynomial"):
        with pytest.raises(ConfigError, match="found without"):
            weights(kernel, found)
    assert weights("gaussian", found).sum() == pytest.approx(1)
