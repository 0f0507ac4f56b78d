"""Presets: the papers' options, and nothing but a way to write them down."""

import json

import pytest
from typer.testing import CliRunner

import ttrouting as ttr
from ttrouting.cli.entry import app
from ttrouting.cli.settings import make_strategies


def test_rerouting_of_the_paper():
    """arXiv 2510.14853: five steps of 0.05 on the whole context, every 128 tokens, the most confident layers."""
    paper = ttr.Rerouting.preset("paper")
    assert (paper.steps, paper.lr, paper.interval, paper.loss_on) == (5, 0.05, 128, "all")
    assert paper.layers.startswith("highest:")
    assert paper != ttr.Rerouting()


def test_c3po_of_the_paper():
    """arXiv 2504.07964: three neighbours, the last five of 16 layers, 20 of 64 experts, the last prompt token."""
    paper = ttr.C3PO.preset("paper")
    assert (paper.k, paper.steps, paper.layers, paper.core_experts) == (3, 10, "last:5", 20 / 64)
    assert (paper.scope, paper.use, paper.max_similarity) == ("last_prompt_token", "successful", 0.95)


@pytest.mark.parametrize("kind", [ttr.Rerouting, ttr.C3PO])
def test_what_is_stored_are_the_options(kind, tmp_path):
    paper = kind.preset("paper", steps=7)
    assert paper.steps == 7
    assert "preset" not in paper.to_dict()
    assert kind.from_dict(json.loads(json.dumps(paper.to_dict()))) == paper
    assert ttr.load(ttr.save(tmp_path / "saved", paper)) == [paper]


def test_every_preset_names_options_that_there_are():
    for info in ttr.list_strategies():
        for name, options in info.cls.presets.items():
            found = info.cls.preset(name).to_dict()
            assert {option: found[option] for option in options} == options


def test_on_the_command_line():
    (paper,) = make_strategies(["rerouting"], ["rerouting.preset=paper", "rerouting.lr=0.1"])
    assert paper == ttr.Rerouting.preset("paper", lr=0.1)
    shown = CliRunner().invoke(app, ["strategies", "rerouting"])
    assert "preset=paper: steps=5, lr=0.05" in shown.stdout


def test_over_strategies_that_were_saved(tmp_path):
    folder = ttr.save(tmp_path / "saved", ttr.Rerouting(steps=9, seed=3))
    (changed,) = make_strategies(folders=[folder], settings=["rerouting.preset=paper"])
    assert changed == ttr.Rerouting.preset("paper", seed=3)


@pytest.mark.parametrize(
    ("name", "setting", "words"),
    [
        ("rerouting", "rerouting.preset=papr", "no preset 'papr'. Did you mean 'paper'?"),
        ("static_routing", "static_routing.preset=paper", "static_routing has no preset 'paper'. It has none"),
        ("rerouting", "rerouting.presets=paper", "has no option 'presets'"),
    ],
)
def test_unknown_ones(name, setting, words):
    with pytest.raises(ttr.ConfigError) as error:
        make_strategies([name], [setting])
    assert words in str(error.value)
