"""A model under edits, and the places in it that an edit may be made at."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn

T = TypeVar("T")
NORMS = (nn.BatchNorm1d, nn.LayerNorm)
DROPOUTS = (nn.Dropout,)
LISTS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


class NoPlace(Exception):
    """The model has nothing that such an edit could be made to."""


@dataclass
class Subject:
    """A model under one edit.

    ``place`` counts what the edit could be made to; ``draw`` is for what else has to be chosen; ``calls`` counts the
    calls of the model's hooks.
    """

    model: Any
    place: int
    draw: random.Random
    calls: Counter[str] = field(default_factory=Counter)

    def pick(self, choices: Iterable[T]) -> T:
        """The choice at the edit's place; places behind the last one begin anew."""
        found = list(choices)
        if not found:
            raise NoPlace
        return found[self.place % len(found)]

    def module(self, *kinds: type[nn.Module]) -> Any:
        """A module of one of these classes, or any that can be called."""
        wanted = kinds or (nn.Module,)
        return self.pick(m for m in self.model.modules() if isinstance(m, wanted) and (kinds or type(m) not in LISTS))

    def site(self, *kinds: type[nn.Module]) -> tuple[Any, str]:
        """A module that holds one of these classes, and by what name."""
        return self.pick(
            (parent, name)
            for parent in self.model.modules()
            for name, child in parent.named_children()
            if isinstance(child, kinds)
        )

    def parameter(self, dims: int = 0) -> tuple[Any, str]:
        """A module that holds a parameter, of at least so many dimensions, and by what name."""
        return self.pick(
            (module, name)
            for module in self.model.modules()
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.dim() >= dims
        )

    def label(self, module: nn.Module, what: str) -> str:
        """What counts a hook's calls."""
        path = next((name for name, other in self.model.named_modules() if other is module), "")
        return f"{what} of {path or 'the model'}"


Edit = Callable[[Subject], None]
