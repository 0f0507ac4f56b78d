"""How much does each neighbour count? Kernels of distance or similarity, normalised over a query's neighbours.

With `d` the distance of a neighbour in the space searched, `c` the cosine of the embeddings, `s` a bandwidth:

    gaussian    exp(-d^2 / 2 s^2)
    matern      (1 + sqrt(3) d / s) exp(-sqrt(3) d / s), that is nu = 3/2
    linear      max(0, c)
    polynomial  (1 + c)^2

C3PO (arXiv 2504.07964) does not state its bandwidth; here it is the median distance of a query's neighbours.

Legend: `B` queries, `k` neighbours.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ttrouting.errors import ConfigError, did_you_mean
from ttrouting.refsets.neighbours import Neighbours

KERNELS = ("gaussian", "linear", "polynomial", "matern")


def weights(kernel: str, neighbours: Neighbours, sigma: float | None = None) -> NDArray[np.float32]:
    """Weights `[B, k]` fp32: 0 where there is no neighbour (-1), summing to 1 over the others of a row.

    A row in which a kernel is 0 for all neighbours weighs them equally; a row without neighbours is all 0.

    Args:
        sigma: bandwidth of "gaussian" and "matern", in units of distance; None: the median distance of each row.

    Raises:
        ConfigError: an unknown kernel, a bandwidth that is not positive, or a kernel of similarities for neighbours
            that were found without embeddings.
    """
    if kernel not in KERNELS:
        raise ConfigError(f"No kernel {kernel!r}.{did_you_mean(kernel, KERNELS)}")
    if sigma is not None and not 0 < sigma < math.inf:
        raise ConfigError(f"sigma is a distance above 0, got {sigma}.")
    valid = neighbours.index >= 0  # [B, k]
    if kernel in ("gaussian", "matern"):
        distance = np.where(valid, neighbours.distance, 0).astype(np.float64)
        scaled = distance / (_median(distance, valid) if sigma is None else sigma)
        if kernel == "gaussian":
            log = -0.5 * scaled**2
        else:
            log = np.log1p(math.sqrt(3) * scaled) - math.sqrt(3) * scaled
        log = np.where(valid, log, -np.inf)
        # relative to the nearest: far from everything, exp alone would give 0 / 0
        nearest = np.where(valid.any(1), log.max(1, initial=-np.inf), 0)[:, None]
        value = np.exp(log - nearest)
    else:
        cosine = np.where(valid, neighbours.similarity, 0).astype(np.float64)
        if np.isnan(cosine).any():
            raise ConfigError(
                f"The {kernel} kernel weighs by similarity of embeddings, which these neighbours were found without. "
                "Use 'gaussian' or 'matern'."
            )
        value = np.maximum(cosine, 0) if kernel == "linear" else (1 + cosine) ** 2
        value = np.where(valid, value, 0)
    value = np.where((value == 0).all(1, keepdims=True), valid, value)
    total = value.sum(1, keepdims=True)
    return np.asarray(value / np.where(total > 0, total, 1), dtype=np.float32)


def _median(distance: NDArray[np.float64], valid: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Median over the valid ones of each row, `[B, 1]`; where that is 0 the mean, and 1 where all are 0."""
    rows = [row[own] for row, own in zip(distance, valid, strict=True)]
    medians = [float(np.median(row)) or float(row.mean()) if len(row) else 0.0 for row in rows]
    return np.array([[m or 1.0] for m in medians]).reshape(-1, 1)
