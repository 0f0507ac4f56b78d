"""Chat from a script: lines into `ttrouting chat`, each a message or a command; answers come out as JSON.

    python demos/chat_script.py

The same lines can be typed in a terminal, after `ttrouting chat`. A strategy that is turned on stays on until it is
turned off, and each answer tells what it did.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

LINES = """\
12+30
/on rerouting
/set rerouting.layers all
45+11
/off rerouting
/on dynamic_k
/set dynamic_k.p 0.5
78-25
/exit
"""


def chat(lines: str) -> list[dict[str, Any]]:
    """The answers to a chat's lines, in order."""
    command = [sys.executable, "-m", "ttrouting", "chat", "--json"]  # --model NAME for another model
    done = subprocess.run(command, input=lines, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)["answers"]


def main() -> None:
    for one in chat(LINES):
        print(f"{one['message']:8} {one['answer']:6} {one['experts_per_token']:.2f} experts a token")
        for sequence in one["report"]["sequences"]:
            for name, facts in sequence["strategies"].items():
                print(f"{'':15} {name}: {facts['outcome']}")


if __name__ == "__main__":
    main()
