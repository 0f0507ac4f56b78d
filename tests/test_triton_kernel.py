"""The decode kernel in the interpreter of Triton; skipped where Triton is not installed. No GPU has run it yet.

Triton decides when it is imported whether it interprets, and may have been imported here already.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

CHECKS = Path(__file__).with_name("triton_checks.py")


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton: pip install triton")
def test_decode_kernel():
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(CHECKS)]
    done = subprocess.run(
        command, env=environment, cwd=CHECKS.parents[1], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
