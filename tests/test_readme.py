"""The contributing guide runs as printed, and the README names every strategy; `test_docs.py` has the rest."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def python_blocks(name):
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)


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


def test_every_file_that_the_guide_links_exists():
    for link in re.findall(r"\]\(([^)#:]+)\)", (ROOT / "CONTRIBUTING.md").read_text()):
        assert (ROOT / link).exists(), link


def test_the_strategy_table_names_every_strategy():
    import ttrouting as ttr

    text = (ROOT / "README.md").read_text()
    for info in ttr.list_strategies():
        if info.source == "ttrouting":
            assert f"| `{info.cls.__name__}` |" in text
