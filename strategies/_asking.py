"""What do strategies that ask a reference set have in common? The set, its embedder, how files name both.

Legend: `B` sequences.
"""

from __future__ import annotations

import os
from functools import cached_property
from typing import Any, ClassVar

from ttrouting.context import Context
from ttrouting.errors import ConfigError
from ttrouting.refsets import ReferenceSet, resolve
from ttrouting.refsets.embedders import Embedder, as_embedder
from ttrouting.target import Target


class AsksReferences:
    """Beside `RoutingStrategy`, for dataclasses with the options `refset` and `embedder`."""

    name: ClassVar[str]
    refset: str | ReferenceSet
    embedder: Any

    def check_refset(self) -> None:
        """Raise `ConfigError` unless `refset` can be one; nothing is opened."""
        if not isinstance(self.refset, (str, os.PathLike, ReferenceSet)):
            raise ConfigError(f"{self.name}.refset must be a reference set or its folder, got {self.refset!r}.")

    @cached_property
    def references(self) -> ReferenceSet:
        """The reference set, opened when it is first asked for."""
        return self.refset if isinstance(self.refset, ReferenceSet) else ReferenceSet.open(resolve(self.refset))

    @cached_property
    def embeds(self) -> Embedder | None:
        """The embedder of the set if it is not the model itself, loaded when it is first asked for."""
        return None if self.embedder is None else as_embedder(self.embedder)

    def named(self) -> dict[str, Any]:
        """For `to_dict`: a set by its folder, an embedder by its name; a function is given again."""
        where = str(self.refset.path) if isinstance(self.refset, ReferenceSet) else str(self.refset)
        named = self.embedder is None or isinstance(self.embedder, str)
        name = self.embedder if named else as_embedder(self.embedder).name.removeprefix("sentence-transformers:")
        return {"refset": where, "embedder": name}

    def check_references(self, target: Target) -> None:
        """The set must be the model's own, and have been made with the embedder that is given.

        Raises:
            ArtefactError: another model's. ConfigError: another embedder.
        """
        self.references.check_model(target.fingerprint)
        made_with, dimension = self.references.embedder_name, self.references.dimension
        if made_with == "model":
            if self.embedder is not None:
                raise ConfigError(
                    f"{self.name}.embedder: this reference set was embedded by the model itself. Leave it out."
                )
            return
        if self.embedder is None:
            raise ConfigError(
                f"{self.name}.embedder: this reference set was embedded by {made_with}. Give it: embedder=..."
            )
        if isinstance(self.embedder, str) and self.embedder.startswith("callable:"):
            raise ConfigError(
                f"{self.name}.embedder is the name of a function, {self.embedder!r}, as a file keeps it. Give the "
                "function itself: dataclasses.replace(strategy, embedder=function)."
            )
        embeds = self.embeds
        if embeds is not None and (embeds.name, embeds.dimension) != (made_with, dimension):
            raise ConfigError(
                f"{self.name}.embedder is {embeds.name} with {embeds.dimension} numbers a text, this reference set "
                f"was embedded by {made_with} with {dimension}. Give that one, or an object of this name and "
                "dimension."
            )


def token_rows(context: Context) -> list[list[int]]:
    """The real tokens of each of the `B` sequences."""
    return [ids[mask].tolist() for ids, mask in zip(context.ids, context.mask, strict=True)]


def texts_of(rows: list[list[int]], tokenizer: Any) -> list[str]:
    """What an embedder is given: the text of token ids, without special tokens."""
    return [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
