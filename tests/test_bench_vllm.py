"""`ttrouting bench --vllm` without vLLM: what it asks its engines, what it makes of their answers, and refusals.

`tests/vllm/test_vllm_load.py` runs it with engines.
"""

import json
from importlib.util import find_spec
from typing import Any

import pytest

from commands import assert_refused, invoke
from ttrouting.bench.measure import Spread
from ttrouting.cli import bench_vllm
from ttrouting.cli.bench_vllm import read_options
from ttrouting.errors import ConfigError
from ttrouting.vllm import load
from ttrouting.vllm.load import NO_PLUGIN, Engine, EngineEnded, Row, measure

FOUND = find_spec("vllm")  # the folder tests/vllm is one without origin
without_vllm = pytest.mark.skipif(FOUND is not None and FOUND.origin is not None, reason="vLLM is installed here")


def run(*arguments: str) -> Any:
    return invoke("bench", "--vllm", *arguments)


class Fake:
    """An engine that takes longer with the plugin, with each adapted request, and in each repetition."""

    started: list[dict[str, Any]]

    def __init__(self, start: dict[str, Any], plugin: bool, environment: dict[str, str]) -> None:
        self.plugin = plugin
        self.loads: list[dict[str, int]] = []
        Fake.started.append({**start, "plugin": plugin, "environment": environment, "engine": self})
        self.ended = False

    def ready(self) -> dict[str, Any]:
        return {"ready": True}

    def run(self, **asked: int) -> dict[str, float]:
        self.loads.append(asked)
        speed = 1000 / (1 + asked["seed"]) * (0.5 if self.plugin else 1) / (1 + asked["adapted"])
        return {"tokens_per_second": speed, "first_token_ms": 1.0, "next_token_ms": 2.0}

    def end(self) -> None:
        self.ended = True


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    monkeypatch.setattr(load, "Engine", Fake)
    monkeypatch.setattr(bench_vllm, "need_vllm", lambda: None)
    Fake.started = []
    return Fake.started


def test_all_versions_answer_the_same_requests_in_each_repetition(engines: list[dict[str, Any]]) -> None:
    rows = measure("model", (1, 8), (16,), 4, repeats=3)
    assert [(row.requests, row.version, row.adapted) for row in rows] == [
        (1, NO_PLUGIN, 0),
        (1, "none", 0),
        (1, "all", 1),
        (8, NO_PLUGIN, 0),
        (8, "none", 0),
        (8, "some", 2),
        (8, "all", 8),
    ]
    # in a repetition all are slower by the same factor, so ratios have no spread and speeds have
    for row, ratio in zip(rows[3:], (1, 1 / 2, 1 / 6, 1 / 18), strict=True):
        assert [row.ratio.low, row.ratio.median, row.ratio.high] == pytest.approx([ratio] * 3)
    assert rows[3].tokens_per_second == Spread.of([1000 / 2, 1000 / 3, 1000 / 4])
    without, with_plugin = (one["engine"] for one in engines)
    assert [one["plugin"] for one in engines] == [False, True]
    assert [one["seed"] for one in without.loads] == [0, 1, 2, 3] * 2  # the first is the warm-up
    assert len(with_plugin.loads) == 4 * 2 + 4 * 3  # in a warm-up and three repetitions
    assert without.ended
    assert with_plugin.ended


def test_engines_have_room_for_what_runs(engines: list[dict[str, Any]]) -> None:
    measure("model", (4,), (16, 32), 8, repeats=1, options={"enforce_eager": True})
    measure("model", (4,), (16,), 8, repeats=1, spec={"strategies": [{"strategy": "scmoe"}]})
    plain, twins = engines[1], engines[3]
    assert plain["options"]["max_num_seqs"] == 4
    assert plain["options"]["max_model_len"] == 32 + 8 + 1
    assert plain["options"]["enforce_eager"] is True
    assert "async_scheduling" not in plain["options"]
    assert twins["options"]["max_num_seqs"] == 8
    assert twins["options"]["async_scheduling"] is False
    assert engines[0]["options"] == plain["options"]  # both alike


@without_vllm
def test_an_engine_that_does_not_start_says_why() -> None:
    engine = Engine({"model": "none", "options": {}, "spec": None}, plugin=False, environment={})
    with pytest.raises(EngineEnded, match="No module named 'vllm'"):
        engine.ready()
    engine.end()


def test_the_command_shows_and_tells_all_versions(engines: list[dict[str, Any]]) -> None:
    asked = (
        "--batch",
        "8",
        "--repeats",
        "2",
        "--new-tokens",
        "4",
        "--random",
        "olmoe:2x32:vocab=64,experts=4,top_k=2",
    )
    done = run(*asked, "--engine", "enforce_eager=true")
    assert done.exit_code == 0, done.stderr
    title, header, *rows = done.stdout.strip().splitlines()
    assert title.startswith("8 requests at a time  64 + 4 tokens, olmoe:2x32")
    assert header.split() == ["plugin", "tokens/s", "first", "token", "next", "token", "ratio"]
    assert [row.split("  ")[0] for row in rows] == [
        "none",
        "no request adapted",
        "2 with a random delta",
        "8 with a random delta",
    ]
    found = json.loads(run(*asked, "--json", "-a", "dynamic_k", "--set", "dynamic_k.p=0.5").stdout)
    (result,) = found["results"]
    assert result["parameters"] > 1000
    assert [row["version"] for row in result["rows"]] == [NO_PLUGIN, "none", "some", "all"]
    assert set(result["rows"][0]) == set(Row.__dataclass_fields__)
    assert found["adapted_with"][0]["p"] == 0.5
    assert engines[-1]["spec"]["strategies"][0]["strategy"] == "dynamic_k"
    assert engines[-1]["options"]["dtype"] == "float32"


def test_engine_options_are_json_or_text() -> None:
    given = ["enforce-eager=true", "max_num_seqs=4", "dtype=bfloat16"]
    assert read_options(given) == {"enforce_eager": True, "max_num_seqs": 4, "dtype": "bfloat16"}
    with pytest.raises(ConfigError, match="NAME=VALUE"):
        read_options(["eager"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--vary", "scmoe.beta=0.1,0.2"], "--vary does not go with --vllm"),
        (["--device", "cpu"], "--device does not go with --vllm"),
        (["--engine", "eager"], "NAME=VALUE"),
        (["--batch", "0"], "--batch takes whole numbers"),
        (["--adapt", "scmo"], "Did you mean 'scmoe'"),
        pytest.param([], "vLLM is not installed in this environment", marks=without_vllm),
    ],
)
def test_bad_options_are_refused_in_one_line(arguments: list[str], words: str) -> None:
    assert_refused(run(*arguments), words)


def test_engine_options_without_vllm_are_refused() -> None:
    done = invoke("bench", "--engine", "enforce_eager=true")
    assert done.exit_code == 2
    assert "Add --vllm" in done.stderr
