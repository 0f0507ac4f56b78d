"""C3PO: expert weights of a sample, mixed anew from those of its successful neighbours (arXiv 2504.07964).

What happens during a call is in `_c3po_run.py`, retrieval in `_neighbourhood.py`, the arithmetic in `_surrogates.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ttrouting.errors import ConfigError, UnsupportedModelError
from ttrouting.gradients import check_gradients
from ttrouting.head import check_head
from ttrouting.layers import LayerRule
from ttrouting.refsets import ReferenceSet
from ttrouting.refsets.kernels import KERNELS
from ttrouting.scoring import INVERSES
from ttrouting.session import Session
from ttrouting.strategies._asking import AsksReferences
from ttrouting.strategy import RoutingRun, RoutingStrategy, in_range, one_of
from ttrouting.target import Target

SURROGATES = ("kernel_regression", "mode_finding", "ngd", "oracle")
SCOPES = ("last_prompt_token", "all")


@dataclass(frozen=True)
class C3PO(AsksReferences, RoutingStrategy):
    """Override expert scores at the last prompt token by what neighbours in a reference set suggest.

    Neighbours are the nearest references by question embedding. Their answers are known, so that a pathway can be
    judged by the loss of those answers when the neighbours are read under it. With `no_harm` one more neighbour is
    fetched, which no surrogate sees; a sequence for which its loss does not fall keeps its own routing.

    Args:
        refset: a reference set, its folder, or `pocket` for the one shipped for the pocket model.
        surrogate: `ngd` (neighbourhood gradient descent: the pathway that minimises the neighbours' mean loss),
            `kernel_regression` (towards the neighbours' mean pathway), `mode_finding` (the same with neighbours in
            pathway space), or `oracle`: descent on the sample's own answer in `labels`; an upper bound, no method.
        k: neighbours (paper: 3). eps: only neighbours at most this far, in units of the embedding sphere (0 to 2).
        steps, lr: of the descent (paper: 10 steps of Adam from 1e-2 down to 1e-5 by cosine). `lr` None is 0.01 on
            scores, and 0.1 on logits where `scope="all"`.
        layers: critical layers, `last:N` or `all` (paper: the last 5 of 16).
        core_experts: how many experts of each layer may change, the heaviest first: a count, or a share (paper: 20
            of 64). All others keep their scores.
        kernel: `gaussian`, `linear`, `polynomial` or `matern`. sigma: width of the first and the last; None is the
            median distance of a sequence's neighbours.
        alpha: share of its own pathway that a sample keeps in `kernel_regression` and `mode_finding`; None searches
            for the least loss of its neighbours.
        scope: `last_prompt_token` (the paper: nothing before it and nothing after it changes) or `all`: the surrogate
            fits one delta on router logits for every token of prompt and answer. An option of ours.
        use: `successful` references only (the paper), or `all`, also those that the model answers wrongly.
        max_similarity: more similar references are dropped as leaks (paper: 0.95, cosine).
        index: `auto`, `flat`, `hnsw` or `ivfpq`.
        embedder: for sets made with another embedder than the model itself: a sentence-transformers name or folder,
            a callable from texts to `[n, D]`, or an object like `ttrouting.refsets.Embedder`.
        kl_limit: largest KL(adapted || base) of the next token, in nats, that `no_harm` accepts.
        labels: answers of the call's sequences, as they would go on from the prompts; for `oracle` alone.
    """

    name: ClassVar[str] = "c3po"
    summary: ClassVar[str] = "expert scores at the last prompt token from neighbours; reads k neighbours a question"
    order: ClassVar[int] = 30
    unique: ClassVar[bool] = True
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "k": (3, 8),
        "scope": ("last_prompt_token", "all"),
        "use": ("successful", "all"),
    }
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {  # written out, though they are the defaults: those may change
            "surrogate": "ngd",
            "k": 3,
            "steps": 10,
            "lr": None,  # 0.01 at this scope
            "layers": "last:5",
            "core_experts": 0.3125,
            "kernel": "gaussian",
            "scope": "last_prompt_token",
            "use": "successful",
            "max_similarity": 0.95,
        }
    }

    refset: str | ReferenceSet = "pocket"
    surrogate: str = "ngd"
    k: int = 3
    eps: float | None = None
    steps: int = 10
    lr: float | None = None
    layers: str = "last:5"
    core_experts: int | float = 0.3125
    kernel: str = "gaussian"
    sigma: float | None = None
    alpha: float | None = None
    scope: str = "last_prompt_token"
    use: str = "successful"
    max_similarity: float = 0.95
    index: str = "auto"
    embedder: Any = None
    kl_limit: float = 5.0
    labels: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        self.check_refset()
        one_of(self.name, "surrogate", self.surrogate, SURROGATES)
        in_range(self.name, "k", self.k, 1, 1000, whole=True)
        in_range(self.name, "steps", self.steps, 0, 10_000, whole=True)
        for option, low, high in (("lr", 0, 100), ("eps", 0, 2), ("alpha", 0, 1), ("sigma", 0, float("inf"))):
            value = getattr(self, option)
            if value is not None:
                in_range(self.name, option, value, low, high, open_low=option in ("eps", "sigma"))
        if self.eps is not None and self.surrogate == "mode_finding":
            raise ConfigError(
                "c3po.eps is a distance of embeddings, and surrogate='mode_finding' looks for neighbours in pathway "
                "space. Leave eps out, or use kernel_regression."
            )
        rule = LayerRule.parse(self.layers)
        if rule.kind not in ("last", "all"):
            raise ConfigError(f"c3po.layers must be 'last:N' or 'all', got {self.layers!r}.")
        object.__setattr__(self, "layers", str(rule))
        whole = isinstance(self.core_experts, int)
        in_range(self.name, "core_experts", self.core_experts, 1 if whole else 0, 10_000 if whole else 1, not whole)
        one_of(self.name, "kernel", self.kernel, KERNELS)
        one_of(self.name, "scope", self.scope, SCOPES)
        one_of(self.name, "use", self.use, ("successful", "all"))
        one_of(self.name, "index", self.index, ("auto", "flat", "hnsw", "ivfpq"))
        in_range(self.name, "max_similarity", self.max_similarity, -1, 1)
        in_range(self.name, "kl_limit", self.kl_limit, 0, open_low=True)
        if (self.labels is None) == (self.surrogate == "oracle"):
            raise ConfigError(
                "c3po.labels are the sequences' own answers: surrogate='oracle' needs them, no other may have them."
            )
        if self.labels is not None:
            object.__setattr__(self, "labels", _checked_labels(self.labels))

    @property
    def identity(self) -> bool:
        """A descent without steps, or a mixture that keeps all of the sample's own pathway."""
        descends = self.surrogate in ("ngd", "oracle")
        return (self.steps == 0 or self.lr == 0) if descends else self.alpha == 1

    def to_dict(self) -> dict[str, Any]:
        """As every strategy's, with set and embedder by their names."""
        return {**super().to_dict(), **self.named()}

    def first_layer(self, layers: int) -> int:
        """Index of the lowest critical layer."""
        rule = LayerRule.parse(self.layers)
        return 0 if rule.kind == "all" else max(0, layers - int(rule.amount))

    def check(self, target: Target) -> None:
        """The set must be the model's own, its scores must have an inverse, texts need a tokenizer."""
        if not getattr(target.model, "can_generate", lambda: False)():
            raise UnsupportedModelError(
                f"c3po needs next-token logits, and {type(target.model).__name__} has no causal language-model head. "
                "Load the ...ForCausalLM class."
            )
        first = self.first_layer(len(target.sites))
        critical = target.sites[first:]
        for site in critical:
            if site.scoring not in INVERSES:
                raise UnsupportedModelError(
                    f"c3po sets router scores, and those of {site.name} ({type(site.router).__name__}) have no "
                    f"inverse ({site.scoring}). Use rerouting, which adds to logits."
                )
            if isinstance(self.core_experts, int) and self.core_experts > site.num_experts:
                raise ConfigError(
                    f"c3po.core_experts={self.core_experts}, and {site.name} has {site.num_experts} experts. "
                    "Give fewer, or a share such as 0.3."
                )
        if self.surrogate != "oracle":
            self._check_counts(target)
        if self.identity:
            return
        if target.tokenizer is None and (self.reads_answers(target) or self.embedder is not None):
            raise ConfigError("c3po reads texts and needs the tokenizer: ttr.adapt(model, ..., tokenizer=tokenizer).")
        if self.surrogate in ("ngd", "oracle"):
            check_gradients(self.name, target)
        check_head(target)

    def reads_answers(self, target: Target) -> bool:
        """Whether neighbours have to be read by the model, and not only looked up."""
        return self.surrogate in ("ngd", "oracle") or self.alpha is None or target.no_harm

    def _check_counts(self, target: Target) -> None:
        self.check_references(target)
        counts = self.references.manifest["counts"]
        usable, wanted = counts["records" if self.use == "all" else "correct"], self.k + target.no_harm
        if self.eps is None and wanted > usable:
            judge = " and one more to judge by (no_harm)" if target.no_harm else ""
            kind, other = ("", "") if self.use == "all" else ("successful ", ", or use='all'")
            raise ConfigError(
                f"c3po.k={self.k} asks for {self.k} neighbours{judge}; this reference set has {usable} {kind}"
                f"references. Use a smaller k or a larger set{other}."
            )

    def start(self, session: Session) -> RoutingRun:
        """Nothing is overridden before neighbours were asked."""
        from ttrouting.strategies._c3po_run import C3PORun

        return C3PORun(self, session)


def _checked_labels(labels: Any) -> tuple[str, ...]:
    """Text is a sequence of texts too, each a letter long: it is not taken for the answers of so many sequences."""
    if not isinstance(labels, (list, tuple)) or not all(isinstance(label, str) and label for label in labels):
        raise ConfigError(
            f"c3po.labels is a list of answers, one for each sequence and none of them empty; got {labels!r}."
        )
    return tuple(labels)
