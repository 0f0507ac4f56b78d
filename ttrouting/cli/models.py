"""How are a model and its tokenizer loaded, and what is said when they cannot be?"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from logging import ERROR, getLogger
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from huggingface_hub import constants as hub
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from transformers.utils import logging

from ttrouting.errors import ConfigError, TTRoutingError
from ttrouting.pocket import PocketWeightsMissing, load_pocket

POCKET = "pocket"
# What transformers imports along, and what those tell of themselves while they are imported: missing CUDA libraries,
# and calls between each other that are on their way out. None of it says anything about the model.
CHATTY = ("torchao", "torch.utils._pytree")
SMALL = 50_000_000  # parameters


class ModelLoadError(TTRoutingError):
    """The model or its tokenizer is missing, damaged or of a kind that is not supported."""


def load_model(name: str, dtype: str = "auto", device: str = "auto") -> tuple[Any, Any]:
    """`(model, tokenizer)`, in eval mode.

    Args:
        name: `pocket`, a folder, or a name on the hub.
        dtype: name of a torch dtype, or `auto`. device: `auto`, `map`, or a torch device.

    Raises:
        ConfigError: no such device. ModelLoadError: everything else, with the next action.
    """
    wanted = None if dtype == "auto" else getattr(torch, dtype)
    place = find_device(device)
    if name == POCKET:
        try:
            with _bars(False), _quiet():
                return load_pocket(wanted, "cpu" if place == "auto" else place)
        except PocketWeightsMissing as error:
            raise ModelLoadError(f"{error}. Or name another model with --model.") from None
    source, local = _source(name)
    # not at the top: it takes seconds, and a wrong option should be told at once
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with _bars(downloads(name)), _quiet():
            # the tokenizer first: it is small, and its absence is known before gigabytes are read.
            # `trust_remote_code` is said because transformers would ask on a terminal
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            model = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=wanted or "auto",
                device_map="auto" if place == "auto" else {"": place},
                trust_remote_code=False,
            )
    except (OSError, ValueError, ImportError, SafetensorError, torch.OutOfMemoryError) as error:
        raise ModelLoadError(_explain(name, local, error)) from error
    return model.eval(), tokenizer


def downloads(name: str) -> bool:
    """Whether loading may fetch files from the hub, which then draws progress bars of its own."""
    if name == POCKET or hub.HF_HUB_OFFLINE or _is_path(name):
        return False
    return not isinstance(try_to_load_from_cache(name, "config.json"), str)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings of packages that are imported only because they are installed."""
    before = {name: getLogger(name).level for name in CHATTY}
    for name in CHATTY:
        getLogger(name).setLevel(ERROR)
    try:
        yield
    finally:
        for name, level in before.items():
            getLogger(name).setLevel(level)


@contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """With or without the progress bars of transformers, which would fight with ours for the line."""
    before = logging.is_progress_bar_enabled()
    if before and not shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if before and not shown:
            logging.enable_progress_bar()


def find_device(device: str) -> str:
    """A device that is there: `auto` for a device map, else a torch device.

    Raises:
        ConfigError: no such device here.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device == "map":
        return "auto"
    if device == "auto":
        return accelerator.type if accelerator is not None else "cpu"
    here = ["cpu"] + ([accelerator.type] if accelerator is not None else [])
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    if found is None or found.type not in here or (found.index or 0) >= max(1, torch.accelerator.device_count()):
        raise ConfigError(f"--device {device!r} is not here. This machine has: {', '.join(here)}; or auto, map.")
    return str(found)


def _source(name: str) -> tuple[str, bool]:
    """What transformers is asked for, and whether it is a folder here."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelLoadError(
                f"{name} is a folder without config.json. Give the folder that save_pretrained wrote."
            )
        return str(path), True
    if path.exists():
        raise ModelLoadError(f"{name} is a file. Give the folder that save_pretrained wrote, not a file in it.")
    if _is_path(name):
        raise ModelLoadError(
            f"There is no folder {name}. Give a folder, a hub name such as org/model, or {POCKET!r}."
        )
    return name, False


def _is_path(name: str) -> bool:
    """Whether this can only be a path: hub names are `name` or `org/name`."""
    return Path(name).expanduser().exists() or re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name) is None


def _explain(name: str, local: bool, error: Exception) -> str:
    text = str(error)
    if "trust_remote_code" in text:
        return (
            f"{name} brings code of its own, which this command does not run. Load the model in Python, after "
            "reading that code, and use ttr.adapt there."
        )
    if isinstance(error, torch.OutOfMemoryError):
        return f"{name} does not fit on the device. Try --device map (spread it) or --dtype bfloat16."
    if not local and isinstance(error, OSError):
        if hub.HF_HUB_OFFLINE:
            found = "it is not complete in the local cache, and HF_HUB_OFFLINE forbids to ask the hub"
            return f"Cannot load {name}: {found}. Unset HF_HUB_OFFLINE, give a folder, or use --model {POCKET}."
        return (
            f"Cannot load {name}: {_reason(text)} Check the name and the connection, log in for a gated model "
            f"(hf auth login), give a folder, or use --model {POCKET}."
        )
    kind = "a causal language model of transformers and its tokenizer"
    return f"Cannot load {name}: {_reason(text)} What is needed is {kind}."


def _reason(text: str) -> str:
    """The beginning of another library's message, as one sentence."""
    short = shorten(text, 240, placeholder=" ...") or "no reason was given"
    return short if short.endswith(".") else f"{short}."


def encode(model: Any, tokenizer: Any, texts: Sequence[str], special_tokens: bool = True) -> dict[str, Any]:
    """`input_ids` and `attention_mask`, both `[B, T]`, padded on the left, where the model's embedding is.

    Raises:
        ConfigError: a text without tokens, or several texts and a tokenizer that cannot pad.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None and len(texts) > 1:
        raise ConfigError("This tokenizer has neither a padding nor an end token. Give one prompt at a time.")
    batch = tokenizer(
        list(texts),
        return_tensors="pt",
        padding=len(texts) > 1,
        padding_side="left",
        add_special_tokens=special_tokens,
        verbose=False,  # a text that is too long for the model is told where it meets the model
    )
    empty = [i for i, mask in enumerate(batch["attention_mask"]) if not bool(mask.any())]
    if empty:
        raise ConfigError(f"Prompt {empty[0]} is empty. Give it at least one character.")
    device = model.get_input_embeddings().weight.device
    home = "cpu" if device.type == "meta" else device
    return {name: batch[name].to(home) for name in ("input_ids", "attention_mask")}


@contextmanager
def few_threads(model: Any) -> Iterator[None]:
    """One thread for a small model on a CPU.

    A second one gains little there. Beside another job on the same cores threads wait for each other: the demo
    took five times as long with two.
    """
    before = torch.get_num_threads()
    if model.device.type == "cpu" and model.num_parameters() < SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
