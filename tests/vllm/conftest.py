"""Engines of the suite: one for each family, made once, and put away before the next.

The suite runs where vLLM is installed (an environment of its own: `make test-vllm`) and is skipped elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import AGREEMENT, engine, put_away, saved

if not any(point.name == "ttrouting" for point in entry_points(group="vllm.general_plugins")):
    raise pytest.UsageError("vLLM would not find the plugin: install ttrouting again (pip install -e .).")

FAMILIES = ("olmoe", "mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3")


@pytest.fixture(scope="module", params=FAMILIES)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    """A transformers model and an engine with the same weights."""
    yield from start(request.param, tmp_path_factory)


@pytest.fixture(scope="module")
def olmoes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    """The same for OLMoE alone."""
    yield from start("olmoe", tmp_path_factory)


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A transformers model and where it was saved, for engines that a test starts itself."""
    return saved("olmoe", tmp_path_factory.mktemp("olmoe"))


@pytest.fixture(scope="module")
def tight(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    """OLMoE with a cache that is too small for its batch and a budget that cuts prompts into chunks."""
    yield from start(
        "olmoe",
        tmp_path_factory,
        max_num_batched_tokens=16,
        max_num_seqs=6,
        max_model_len=160,
        num_gpu_blocks_override=9,
    )


def start(family: str, folders: pytest.TempPathFactory, **options: Any) -> Iterator[tuple[Any, Any]]:
    """Yields the pair and puts the engine away."""
    torch.manual_seed(0)
    model, folder = saved(family, folders.mktemp(family))
    with pytest.MonkeyPatch.context() as patch:
        if family.startswith("deepseek"):
            from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

            patch.setenv("VLLM_MLA_DISABLE", "1")
            # vLLM's interleaved rotary kernel for CPUs is wrong without any plugin
            patch.setattr(RotaryEmbedding, "forward_cpu", RotaryEmbedding.forward_native)
        llm = engine(folder, **options)
        yield model, llm
        put_away(llm)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How many experts were those of transformers, whichever process measured it."""
    passed = terminalreporter.getreports("passed")
    told = [value for one in passed for name, value in one.user_properties if name == AGREEMENT]
    if told:
        terminalreporter.section(AGREEMENT)
        for what, share in sorted(told):
            terminalreporter.write_line(f"{what:34} {100 * share:.2f} %")
