"""Every error that ttrouting raises on purpose: what was wrong, what was found, what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TTRoutingError(Exception):
    """Base of all errors of this package."""


class NotMoEError(TTRoutingError):
    """No MoE layer was found in the model."""


class UnsupportedModelError(TTRoutingError):
    """The model has MoE layers which cannot be adapted, or not by this strategy."""


class UnsupportedCallError(TTRoutingError):
    """The model can be adapted, but not in the way this call asks for."""


class ConfigError(TTRoutingError, ValueError):
    """An option is unknown, of the wrong type or out of range."""


class CompositionError(TTRoutingError):
    """These strategies cannot be used together."""


class ModelBusy(TTRoutingError):
    """The model is adapted already, or another thread is inside an adapted call."""


class ArtefactError(TTRoutingError):
    """A saved file is damaged, of another schema, or belongs to another model."""


class CoverageError(TTRoutingError):
    """A strategy did not reach every MoE layer on every token in its scope."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The closest known name as a question, followed by all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"{hint} Known: {', '.join(known)}."
