"""Where is the pocket model, and how is it loaded?

The pocket model is a small OLMoE (six MoE layers, sixteen experts, two per token) that ships inside
the package: a fixture for trying and testing routing strategies without a download. Its model card
is `weights/README.md`; what it can be asked is in `ttrouting.pocket.skills`.

    >>> model, tokenizer = load_pocket()

Importing this module is cheap: torch and transformers are imported by `load_pocket`.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttrouting.errors import TTRoutingError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

POCKET_DIR = Path(__file__).parent / "weights"

__all__ = ["POCKET_DIR", "PocketWeightsMissing", "load_pocket"]


class PocketWeightsMissing(TTRoutingError, FileNotFoundError):
    """The folder of the pocket model lacks a file that is needed to load it."""


def load_pocket(
    dtype: "torch.dtype | None" = None, device: "torch.device | str" = "cpu"
) -> "tuple[PreTrainedModel, PreTrainedTokenizerFast]":
    """Load the pocket model from the package, without network access.

    Args:
        dtype: of the loaded weights; default `torch.float32` (they are stored in bf16).
        device: where the model is put.

    Returns:
        `(model, tokenizer)`: an `OlmoeForCausalLM` in eval mode and its character tokenizer
        (left padding).

    Raises:
        PocketWeightsMissing: a file of the model is not in `POCKET_DIR`.
    """
    needed = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json")
    missing = [name for name in needed if not (POCKET_DIR / name).is_file()]
    if missing:
        raise PocketWeightsMissing(
            f"the pocket model needs {', '.join(missing)} in {POCKET_DIR}; reinstall ttrouting, "
            "or train it in a checkout: python demos/train_pocket.py --out ttrouting/pocket/weights"
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(POCKET_DIR, local_files_only=True)
    model: Any = AutoModelForCausalLM.from_pretrained(
        POCKET_DIR, dtype=torch.float32 if dtype is None else dtype, local_files_only=True
    )
    return model.to(device).eval(), tokenizer
