"""Texts as contexts, one at a time: for calibration and demonstrations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ttrouting.context import Context
from ttrouting.errors import ConfigError
from ttrouting.sites import text_config


def text_contexts(model: Any, tokenizer: Any, texts: Sequence[str]) -> Iterator[Context]:
    """Each text as a batch of one, cut to the model's context; all its tokens but the first are targets.

    Raises:
        ConfigError: a text has fewer than two tokens.
    """
    text = text_config(model.config)
    limit = getattr(text, "max_position_embeddings", None)
    for number, words in enumerate(texts):
        ids = tokenizer(words, return_tensors="pt")["input_ids"][:, :limit]
        if ids.shape[1] < 2:
            raise ConfigError(f"Text {number} has {ids.shape[1]} tokens; at least 2 are needed: {words!r}.")
        ids = ids.to(model.get_input_embeddings().weight.device if model.device.type != "meta" else "cpu")
        mask = torch.ones_like(ids, dtype=torch.bool)
        targets = mask.clone()
        targets[:, 0] = False
        yield Context(ids, mask, targets)
