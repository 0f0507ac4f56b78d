"""Can another package add a strategy, and can one of ours be removed, without touching anything else?"""

import importlib
import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

import ttrouting as ttr
from ttrouting.cli import app
from ttrouting.registry import get_strategy

ROOT = Path(__file__).parents[1]
STRATEGIES = sorted(f.stem for f in (ROOT / "strategies").glob("[a-z]*.py"))


def run_python(script: str, *paths: Path, arguments: tuple[str, ...] = ()) -> list[dict[str, object]]:
    """What a script prints, one JSON object a line, in a fresh interpreter that finds `paths` first."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=paths[0], check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed the plugin, without the network."""
    missing = [tool for tool in ("pip", "setuptools") if find_spec(tool) is None]
    if missing:
        pytest.skip(f"the plugin is built with {' and '.join(missing)}, not installed here")
    target = tmp_path_factory.mktemp("site")
    source = tmp_path_factory.mktemp("source") / "plugin"  # pip builds in the source folder
    shutil.copytree(ROOT / "tests" / "plugin", source, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    pip += ["--no-build-isolation", "--no-index", "--target", str(target), str(source)]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


# Halving the router's weight halves its logits exactly: the strategy's formula without any of its code.
WITH_PLUGIN = """
import copy, json, sys
import torch
from typer.testing import CliRunner
import ttrouting as ttr
from ttrouting.cli import app
from families.build import build

info = next(i for i in ttr.list_strategies() if i.name == "router_temperature")
print(json.dumps({"kind": info.kind, "source": info.source, "attribute": ttr.RouterTemperature is info.cls}))

model = build("olmoe")
ids = torch.arange(3, 23).view(2, 10)
halved = copy.deepcopy(model)
with torch.no_grad():
    for layer in halved.model.layers:
        layer.mlp.gate.weight /= 2
    expected, base = halved(ids).logits, model(ids).logits
    with ttr.adapt(model, "router_temperature") as adapted:
        found = adapted(ids).logits
    with ttr.adapt(model, info.cls(temperature=1.0)) as adapted:
        same = adapted(ids).logits
print(json.dumps({"equal": torch.equal(found, expected), "acts": not torch.equal(found, base),
                  "identity": torch.equal(same, base)}))

def run(*arguments):
    done = CliRunner().invoke(app, arguments)
    return {"code": done.exit_code, "out": done.stdout, "err": done.stderr}

print(json.dumps(run("strategies")))
print(json.dumps(run("generate", "x", "--adapt", "router_temprature")))
print(json.dumps(run("generate", "x", "--adapt", "router_temperature", "--set", "router_temperature.temperature=0")))
"""


@pytest.mark.slow
def test_an_installed_plugin_is_a_strategy_like_any_other(installed: Path) -> None:
    info, adapted, listing, misspelt, refused = run_python(WITH_PLUGIN, installed, ROOT / "tests", ROOT)
    assert info == {"kind": "routing", "source": "ttrouting-router-temperature", "attribute": True}
    assert adapted == {"equal": True, "acts": True, "identity": True}
    assert "router_temperature" in listing["out"]
    assert "ttrouting-router-temperature" in listing["out"]
    assert misspelt["code"] == 2
    assert "Did you mean 'router_temperature'?" in misspelt["err"]
    assert refused["code"] == 2
    assert "router_temperature.temperature must be in (0, inf), got 0." in refused["err"]


def test_without_the_plugin_its_strategy_is_unknown() -> None:
    with pytest.raises(ttr.ConfigError, match=r"No strategy 'router_temperature'.*Known: .*rerouting"):
        get_strategy("router_temperature")
    done = CliRunner().invoke(app, ["strategies", "router_temperature"])
    assert done.exit_code == 2
    assert "No strategy 'router_temperature'" in done.stderr


def plug_in(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str, target: str) -> None:
    """Make `target` of a module an entry point, as an installation would."""
    (folder / f"{name}.py").write_text(module)
    meta = folder / f"{name}-1.0.dist-info"
    meta.mkdir()
    (meta / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (meta / "entry_points.txt").write_text(f"[ttrouting.strategies]\nsome = {name}:{target}\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, name, raising=False)
    importlib.invalidate_caches()


CLASH = """
from ttrouting.strategy import RoutingStrategy

class Mine(RoutingStrategy):
    name = "rerouting"
"""


def test_a_plugin_cannot_take_the_name_of_a_built_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(tmp_path, monkeypatch, "clashing_plugin", CLASH, "Mine")
    with pytest.raises(ttr.ConfigError, match=r"called 'rerouting'.*from ttrouting.*from clashing_plugin"):
        ttr.list_strategies()
    done = CliRunner().invoke(app, ["strategies"])
    assert done.exit_code == 2
    assert "Uninstall one of them" in done.stderr


@pytest.mark.parametrize("target", ["number", "Nameless", "RoutingStrategy"])
def test_a_plugin_that_is_no_strategy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    module = (
        "from ttrouting.strategy import RoutingStrategy\nnumber = 3\nclass Nameless(RoutingStrategy):\n    pass\n"
    )
    plug_in(tmp_path, monkeypatch, "odd_plugin", module, target)
    with pytest.raises(ttr.ConfigError, match=r"odd_plugin registers .* not a named subclass"):
        ttr.list_strategies()


# Each strategy module is deleted once from a copy of the package; the rest must import, list and run.
WITHOUT_ONE = """
import json, pkgutil, shutil, sys
from importlib import import_module
from pathlib import Path
import torch, transformers
from families.build import build

torch.set_num_threads(1)
package = Path("ttrouting")
model = build("olmoe")
ids = torch.arange(3, 13)[None]

def load():
    for name in [m for m in sys.modules if m.split(".")[0] == "ttrouting"]:
        del sys.modules[name]
    import ttrouting
    assert Path(ttrouting.__file__).is_relative_to(Path.cwd()), ttrouting.__file__
    for module in pkgutil.walk_packages(ttrouting.__path__, "ttrouting."):
        try:
            import_module(module.name)
        except ModuleNotFoundError as error:
            if error.name.split(".")[0] == "ttrouting":
                raise
    return ttrouting

def first(ttr):
    for info in ttr.list_strategies():
        try:
            strategy = info.cls()
            ttr.adapt(model, strategy).close()
        except (ttr.ConfigError, ttr.ArtefactError):  # needs options, or references of a model
            continue
        if not strategy.identity and info.kind == "routing":
            return strategy

for name in sys.argv[1:]:
    module = package / "strategies" / f"{name}.py"
    text = module.read_text()
    owned = {i.name for i in load().list_strategies() if i.cls.__module__.endswith("." + name)}
    every = {i.name for i in load().list_strategies()}
    module.unlink()
    shutil.rmtree(package / "strategies" / "__pycache__", ignore_errors=True)
    ttr = load()
    left = {i.name for i in ttr.list_strategies()}
    strategy = first(ttr)
    with ttr.adapt(model, strategy) as adapted, torch.no_grad():
        finite = bool(adapted(ids).logits.isfinite().all())
    print(json.dumps({"module": name, "gone": sorted(every - left), "owned": sorted(owned), "ran": finite}))
    module.write_text(text)
"""


@pytest.mark.slow
def test_removing_a_strategy_module_breaks_nothing_else(tmp_path: Path) -> None:
    skip = shutil.ignore_patterns("__pycache__", "weights")
    shutil.copytree(ROOT / "ttrouting", tmp_path / "ttrouting", ignore=skip)
    for folder in ("strategies", "refsets"):
        if (ROOT / folder).is_dir():
            shutil.copytree(ROOT / folder, tmp_path / "ttrouting" / folder, ignore=skip)
    found = run_python(WITHOUT_ONE, tmp_path, ROOT / "tests", arguments=tuple(STRATEGIES))
    assert [f["module"] for f in found] == STRATEGIES
    for removed in found:
        assert removed["gone"] == removed["owned"] != []
        assert removed["ran"]
