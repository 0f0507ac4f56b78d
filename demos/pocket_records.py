"""Questions with answers for a reference set of the pocket model, as JSON lines.

    python demos/pocket_records.py --n 100 > records.jsonl
    ttrouting refset build -e --data records.jsonl --prompt "Q: {question}\\nA: " --answer "{answer}\\n" \\
        --task "{skill}/{dialect}" --keep all --out my_set

The set that ships is made by the step `refset` of `demos/artefacts.py`.

Every skill in both dialects, from the split `reference`, which neither training nor a test ever draws from: a
question's split follows from a hash of its digits, so it is the same in both dialects.
"""

from __future__ import annotations

import argparse
import json
import sys

from ttrouting.pocket.skills import DIALECTS, SKILLS, sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=100, help="questions of each skill in each dialect")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skills", nargs="+", default=list(SKILLS), choices=list(SKILLS), metavar="SKILL")
    parser.add_argument("--dialects", nargs="+", default=list(DIALECTS), choices=DIALECTS, metavar="DIALECT")
    options = parser.parse_args()
    for skill in options.skills:
        for dialect in options.dialects:
            for example in sample(skill, dialect, "reference", options.n, options.seed):
                record = {"question": example.question, "answer": example.answer, "skill": skill, "dialect": dialect}
                sys.stdout.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
