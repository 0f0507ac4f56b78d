"""vLLM: each request carries its own strategies, offline and over HTTP; requests without any are untouched.

    python demos/vllm_requests.py                                   # an engine in this process
    ttrouting serve & python demos/vllm_requests.py --server http://127.0.0.1:8000

The first needs vLLM (pip install 'ttrouting[vllm]', without a GPU see docs/vllm.md), the second a server that has it.
"""

from __future__ import annotations

import argparse
import os
from importlib.util import find_spec

import ttrouting as ttr
from ttrouting import vllm as ttv
from ttrouting.pocket import POCKET_DIR
from ttrouting.pocket.skills import few_shot_prompt, sample
from ttrouting.server import Server

# six solved examples, then a question: under sixteen tokens Rerouting has too little to learn from
PROMPT = few_shot_prompt(sample("reverse", "letters", "dev", 6), sample("reverse", "letters", "test", 1)[0])
REQUESTS = {
    "untouched": [],
    "SCMoE": [ttr.SCMoE(beta=0.3)],
    "fewer experts": [ttr.DynamicK(p=0.5)],
    "rerouted": [ttr.Rerouting(layers="all", lr=0.2, interval=None)],
}


def offline() -> dict[str, str]:
    """All requests in one batch of an engine here."""
    from vllm import LLM, SamplingParams

    # SCMoE needs both streams of a step at hand, and the runner that it was made for; `ttrouting serve` asks for both
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    options = {"dtype": "float32", "max_model_len": 256, "async_scheduling": False}
    llm = LLM(str(POCKET_DIR), additional_config=ttv.config(), **options)
    each = [
        SamplingParams(
            temperature=0, max_tokens=10, extra_args={"ttrouting": ttv.spec(strategies)} if strategies else None
        )
        for strategies in REQUESTS.values()
    ]
    found = llm.generate([PROMPT] * len(REQUESTS), each)
    return {name: one.outputs[0].text for name, one in zip(REQUESTS, found, strict=True)}


def over_http(url: str) -> dict[str, str]:
    """One request after another to a running `ttrouting serve`; any OpenAI client can send the same fields."""
    server, found = Server(url, "pocket"), {}
    for name, strategies in REQUESTS.items():
        extra = {"vllm_xargs": {"ttrouting": ttv.spec_json(strategies)}} if strategies else {}
        body = {"model": server.served, "prompt": PROMPT, "max_tokens": 10, "temperature": 0, **extra}
        found[name] = server.ask("POST", "completions", body)["choices"][0]["text"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", metavar="URL", help="of a running 'ttrouting serve'; without it, an engine here")
    options = parser.parse_args()
    if options.server is None and find_spec("vllm") is None:
        print("Skipped: vLLM is not installed here; see docs/vllm.md, or give --server URL.")
        return
    for name, text in (offline() if options.server is None else over_http(options.server)).items():
        print(f"{name:14} {text!r}")


if __name__ == "__main__":
    main()
