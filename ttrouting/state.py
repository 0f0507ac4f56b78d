"""What an adapted call learned, to go on from in the next one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ttrouting.errors import UnsupportedCallError


@dataclass(frozen=True, eq=False)
class AdaptationState:
    """One row for each sequence of the call that made it.

    Attributes:
        tensors: by strategy name, then by name in that strategy, e.g. `{"rerouting": {"delta": [B, L, E]}}`.
        fingerprint: the model it was learned on.
    """

    tensors: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    fingerprint: str = ""

    @property
    def sequences(self) -> int | None:
        """`B`, or None if nothing was learned."""
        for group in self.tensors.values():
            for tensor in group.values():
                return tensor.shape[0]
        return None

    def for_batch(self, sequences: int, fingerprint: str) -> Mapping[str, Mapping[str, Tensor]]:
        """The tensors, checked against a new call.

        Raises:
            UnsupportedCallError: another model, or another number of sequences.
        """
        if self.sequences is None:  # nothing was learned: the state before the first turn of a chat
            return {}
        if self.fingerprint != fingerprint:
            raise UnsupportedCallError(
                f"This state was learned on another model (fingerprint {self.fingerprint[:12]}, this model "
                f"has {fingerprint[:12]}). Start without state."
            )
        if self.sequences != sequences:
            raise UnsupportedCallError(
                f"This state has {self.sequences} sequences, the call has {sequences}. Pass the same "
                "sequences in the same order, or start without state."
            )
        return self.tensors
