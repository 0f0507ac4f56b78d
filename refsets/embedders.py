"""What turns texts into vectors? Sentence-transformers, or a function of the user's.

The embedder "model" is no object: its mean-pooled hidden states come from forwards of the model that run anyway.

Legend: `n` texts, `D` dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ttrouting.errors import ConfigError

EmbedFunction = Callable[[list[str]], Any]


@runtime_checkable
class Embedder(Protocol):
    """Anything with a name, a dimension and `embed`.

    Attributes:
        name: stands in the manifest of a set; a set is searched with the embedder of the same name.
        dimension: D.
    """

    name: str
    dimension: int

    def embed(self, texts: list[str]) -> NDArray[np.float32]:
        """Embeddings `[n, D]` fp32, of any length; they are divided by their norms later."""
        ...


class SentenceTransformerEmbedder:
    """A sentence-transformers model, from a folder, the local cache or the hub. Needs `ttrouting[embed]`.

    Args:
        name_or_path: e.g. "all-MiniLM-L6-v2", or a folder.
        name: under which a folder's model stands in manifests; default the last part of `name_or_path`.
        device: where it runs; it is small beside the model that it serves.

    Raises:
        ConfigError: sentence-transformers is not installed, or there is no such model within reach.
    """

    def __init__(self, name_or_path: str, *, name: str | None = None, device: str = "cpu") -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ConfigError(
                f"The embedder {name_or_path!r} needs sentence-transformers ({error}). "
                "Install it: pip install 'ttrouting[embed]', or use the embedder 'model'."
            ) from error
        try:
            self._model = SentenceTransformer(name_or_path, device=device, trust_remote_code=False)
        except (OSError, ValueError) as error:
            first = str(error).strip().partition("\n")[0]
            raise ConfigError(
                f"No sentence-transformers model {name_or_path!r} in a folder, in the local cache or on the hub "
                f"({type(error).__name__}: {first}). Give the folder of a downloaded one."
            ) from error
        self.name = f"sentence-transformers:{name or Path(name_or_path).name}"
        self.dimension = self._encode(["text"]).shape[1]

    def embed(self, texts: list[str]) -> NDArray[np.float32]:
        """Embeddings `[n, D]` fp32."""
        if not texts:
            return np.zeros((0, self.dimension), dtype=np.float32)
        return self._encode(texts)

    def _encode(self, texts: list[str]) -> NDArray[np.float32]:
        return np.asarray(self._model.encode(texts, convert_to_numpy=True, show_progress_bar=False), dtype=np.float32)


class CallableEmbedder:
    """A function from a list of texts to `[n, D]` numbers. It is called once on one text, to learn D.

    Args:
        function: takes `list[str]`, returns what `numpy.asarray` reads. name: for manifests.

    Raises:
        ConfigError: it does not return one vector for each text; also from `embed`.
    """

    def __init__(self, function: EmbedFunction, name: str) -> None:
        self.function = function
        self.name = f"callable:{name}"
        self.dimension = self._call(["text"]).shape[1]

    def embed(self, texts: list[str]) -> NDArray[np.float32]:
        """Embeddings `[n, D]` fp32."""
        if not texts:
            return np.zeros((0, self.dimension), dtype=np.float32)
        found = self._call(texts)
        if found.shape[1] != self.dimension:
            raise ConfigError(
                f"{self.name} gave dimension {found.shape[1]}, and {self.dimension} before. Fix it to one."
            )
        return found

    def _call(self, texts: list[str]) -> NDArray[np.float32]:
        found = np.asarray(self.function(texts), dtype=np.float32)
        if found.ndim != 2 or len(found) != len(texts) or found.shape[1] == 0:
            raise ConfigError(
                f"{self.name} was given {len(texts)} texts and returned shape {list(found.shape)}; "
                "it must return one vector for each text, [n, D]."
            )
        return found


def as_embedder(value: str | EmbedFunction | Embedder) -> Embedder:
    """An embedder from a sentence-transformers name or folder, a function, or an embedder itself.

    Raises:
        ConfigError: none of these, or it cannot be loaded.
    """
    if isinstance(value, str):
        return SentenceTransformerEmbedder(value)
    if isinstance(value, Embedder):
        return value
    if callable(value):
        return CallableEmbedder(value, getattr(value, "__name__", type(value).__name__))
    raise ConfigError(
        f"An embedder is the name of a sentence-transformers model, a function or an object with name, dimension and "
        f"embed; got {value!r}."
    )
