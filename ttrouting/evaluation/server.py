"""Ask a running OpenAI-compatible server instead of a model in this process: vLLM with the plugin, for example.

Requests carry the strategies as the plugin reads them. What a server does not tell is left open: experts, FLOPs,
roll-backs; its time depends on who else it serves. A base run needs no plugin.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from ttrouting.errors import ConfigError
from ttrouting.evaluation.costs import Cost
from ttrouting.evaluation.question import Question
from ttrouting.pocket import POCKET_DIR
from ttrouting.server import Server
from ttrouting.strategy import Strategy

NEW_TOKENS = 256  # where a task does not say how many, as in lm-eval
# A server reads a text and its continuation as one prompt: what learns from prompts would learn from the answer.
LEARN_NOTHING = ("static_routing", "expert_mask", "dynamic_k")
Done = Callable[[int], Any]


class ServerLM:
    """What `run` asks, answered by a server.

    Args:
        url: of the server, with or without `/v1`. model: the name it serves, which is also where the tokenizer is
            (`pocket` for the pocket model's); if it serves one model alone, that one is asked.
        question: batch size is how many requests wait at the same time.

    Raises:
        ServerError: no answer, or another model. ConfigError: what a server cannot do.
    """

    def __init__(self, url: str, model: str, question: Question) -> None:
        from transformers import AutoTokenizer

        if question.samples > 1:
            raise ConfigError("--samples draws by document and sample, which a server cannot. Leave out --server.")
        self._server = Server(url, model)
        self.name = model
        self.tokenizer = AutoTokenizer.from_pretrained(POCKET_DIR if model == "pocket" else model)
        self.device = torch.device("cpu")
        self._question = question
        self._extra: dict[str, Any] = {}
        self._learns: list[str] = []

    def use(self, strategies: Sequence[Strategy]) -> None:
        """Requests carry these strategies from now on."""
        from ttrouting.vllm import spec_json

        self._extra = {}
        if strategies:
            self._extra = {"vllm_xargs": {"ttrouting": spec_json(strategies, no_harm=self._question.no_harm)}}
        self._learns = [s.name for s in strategies if s.name not in LEARN_NOTHING]

    def close(self) -> None:
        """Let go of the connections."""
        self._server.close()

    def facts(self) -> dict[str, Any]:
        """What `run.json` says of the model; a server does not tell more."""
        about = {
            "name": self.name,
            "fingerprint": None,
            "dtype": None,
            "parameters": None,
            "server": self._server.served,
        }
        return {"model": about, "layers": [], "top_k": []}

    def apply_chat_template(self, history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Chat messages as the model wants them."""
        return str(
            self.tokenizer.apply_chat_template(
                history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    # --- requests -------------------------------------------------------------------------------------

    def answer(self, asked: Sequence[Instance], done: Done = lambda _: None) -> list[tuple[str, Cost | None]]:
        """A text for each request."""

        def one(request: Instance) -> tuple[str, None]:
            context, given = request.args
            options = dict(normalize_gen_kwargs(dict(given), NEW_TOKENS))
            end = self.tokenizer.eos_token
            stops = handle_stop_sequences(options["until"], end)
            said = self._complete(
                self.tokenizer(context)["input_ids"],
                max_tokens=int(options["max_gen_toks"]),
                temperature=float(options["temperature"]),
                stop=stops[:4],  # more than that the protocol does not take; the text is cut at all of them here
            )
            return postprocess_generated_text(said["text"], stops, None), None

        return self._all(one, asked, done)

    def likelihoods(
        self, asked: Sequence[Instance], done: Done = lambda _: None
    ) -> list[tuple[tuple[float, bool], Cost | None]]:
        """`(log-likelihood, greedy)` of each request's continuation.

        Raises:
            ConfigError: a strategy that learns from the prompt, which holds the answer here.
        """
        if self._learns:
            raise ConfigError(
                f"{', '.join(self._learns)} would read the answers that a server scores, as part of the prompt. "
                "Evaluate such tasks without --server."
            )

        def one(request: Instance) -> tuple[tuple[float, bool], None]:
            context, continuation = request.args[:2]
            whole = self.tokenizer(context + continuation)["input_ids"]
            start = len(self.tokenizer(context)["input_ids"]) if context else 1
            said = self._complete(whole, max_tokens=1, temperature=0.0, echo=True, logprobs=1)["logprobs"]
            own = said["token_logprobs"][start : len(whole)]
            best = [max(top.values()) for top in said["top_logprobs"][start : len(whole)]]
            return (float(sum(own)), all(a >= b for a, b in zip(own, best, strict=True))), None

        return self._all(one, asked, done)

    def rolling(self, asked: Sequence[Instance], done: Done = lambda _: None) -> Any:
        """Perplexities are not asked of servers.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("Rolling log-likelihoods are not asked of a server. Leave out --server.")

    def _all(self, one: Callable[[Instance], Any], asked: Sequence[Instance], done: Done) -> list[Any]:
        with ThreadPoolExecutor(self._question.batch_size) as pool:
            found = []
            for result in pool.map(one, asked):
                found.append(result)
                done(1)
            return found

    def _complete(self, prompt: list[int], **options: Any) -> Mapping[str, Any]:
        own = {"model": self._server.served, "prompt": prompt, "seed": self._question.seed}
        found = self._server.ask("POST", "completions", {**own, **options, **self._extra})
        choice: Mapping[str, Any] = found["choices"][0]
        return choice
