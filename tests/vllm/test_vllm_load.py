"""`ttrouting bench --vllm` with engines: does it measure all versions, and say so when an engine does not start?"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import engines  # noqa: F401 - its environment
import pytest

pytest.importorskip("vllm.sampling_params", reason="vLLM is not installed here: make test-vllm")

MODEL = ("--random", "olmoe:2x64:experts=8,top_k=2,ffn=32,vocab=100,heads=2")
EAGER = ("--engine", "enforce_eager=true", "--engine", "block_size=32", "--engine", "num_gpu_blocks_override=100")


def bench(*arguments: str) -> Any:
    run = [sys.executable, "-m", "ttrouting", "bench", "--vllm", *arguments]
    return subprocess.run(run, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
@pytest.mark.parametrize("adapt", [(), ("-a", "scmoe,dynamic_k")], ids=["delta", "scmoe"])
def test_the_load_is_measured_with_and_without(adapt: tuple[str, ...]) -> None:
    done = bench(*MODEL, *EAGER, "--batch", "1,4", "--repeats", "1", "--new-tokens", "4", "--json", *adapt)
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(done.stdout)["results"]
    versions = ["no plugin", "none", "all", "no plugin", "none", "some", "all"]
    assert [row["version"] for row in result["rows"]] == versions
    assert [row["adapted"] for row in result["rows"]] == [0, 0, 1, 0, 0, 1, 4]
    for row in result["rows"]:
        for quantity in ("tokens_per_second", "first_token_ms", "next_token_ms", "ratio"):
            assert row[quantity]["median"] > 0
    assert result["rows"][0]["ratio"]["median"] == 1


def test_an_option_that_vllm_does_not_take_is_told() -> None:
    done = bench(*MODEL, *EAGER, "--engine", "no_such_option=1")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ttrouting: vLLM's engine has ended:")
    assert "no_such_option" in done.stderr
