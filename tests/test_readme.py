"""What the README prints must run as printed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def python_blocks(name):
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)


@pytest.mark.parametrize("number", range(len(python_blocks("README.md"))))
def test_readme_example(number, tmp_path):
    code = python_blocks("README.md")[number]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "rerouting" in done.stdout


def test_the_strategy_of_the_contributing_guide(tmp_path):
    (code,) = python_blocks("CONTRIBUTING.md")
    check = (
        "import torch, ttrouting as ttr\n"
        "model, _ = ttr.load_pocket()\n"
        "ids = torch.tensor([[5, 6, 7, 8]])\n"
        "with ttr.adapt(model, RouterTemperature(1.0)) as same:\n"
        "    assert torch.equal(same(input_ids=ids).logits, model(input_ids=ids).logits)\n"
        "with ttr.adapt(model, RouterTemperature(3.0)) as other:\n"
        "    assert not torch.equal(other(input_ids=ids).logits, model(input_ids=ids).logits)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code + check], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_every_file_that_is_linked_exists():
    for name in ("README.md", "CONTRIBUTING.md"):
        for link in re.findall(r"\]\(([^)#:]+)\)", (ROOT / name).read_text()):
            assert (ROOT / link).exists(), link


def test_the_strategy_table_names_every_strategy():
    import ttrouting as ttr

    text = (ROOT / "README.md").read_text()
    for info in ttr.list_strategies():
        if info.source == "ttrouting":
            assert f"| `{info.cls.__name__}` |" in text
