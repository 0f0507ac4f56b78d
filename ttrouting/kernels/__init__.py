"""How are only the experts computed that a token still has? An experts implementation of our own.

`model.set_experts_implementation(NAME)` uses it for good, `with skipping(model):` for a block.
"""

from ttrouting.kernels.ragged import NAME, ragged_experts_forward
from ttrouting.kernels.switch import skipping

__all__ = ["NAME", "ragged_experts_forward", "skipping"]
