"""nextrec's modules, built and named as the library's, which pins old packages."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from tests.convert.doubles import mixed, softmax_gate

WIDTH, TASKS = 10, 3


class MLP(nn.Module):
    """[Linear → (norm) → activation → Dropout] a layer."""

    def __init__(self, width: int, units: tuple[int, ...], norm: Any = None) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for a, b in zip([width, *units], units, strict=False):
            parts += [nn.Linear(a, b), *([] if norm is None else [norm(b)]), nn.ReLU(), nn.Dropout(0.0)]
        self.mlp = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Any:
        return self.mlp(x)


class CGCLayer(nn.Module):
    """Shared experts first in a task's gate, last in the shared one, which the last level has too."""

    def __init__(
        self, width: int, units: tuple[int, ...], specific: int = 2, shared: int = 3, norm: Any = None
    ) -> None:
        super().__init__()
        self.shared_experts = nn.ModuleList(MLP(width, units, norm) for _ in range(shared))
        self.specific_experts = nn.ModuleList(
            nn.ModuleList(MLP(width, units, norm) for _ in range(specific)) for _ in range(TASKS)
        )
        self.task_gates = nn.ModuleList(softmax_gate(width, shared + specific) for _ in range(TASKS))
        self.shared_gate = softmax_gate(width, shared + TASKS * specific)
        self.nums_task = TASKS

    def forward(self, task_inputs: list[Tensor], shared_input: Tensor) -> tuple[list[Tensor], Tensor]:
        if len(task_inputs) != self.nums_task:
            raise ValueError(f"Expected {self.nums_task} task inputs")
        shared = [expert(shared_input) for expert in self.shared_experts]
        found, every = [], []
        for x, experts, gate in zip(task_inputs, self.specific_experts, self.task_gates, strict=True):
            own = [expert(x) for expert in experts]  # type: ignore[union-attr]
            found.append(mixed(gate(x), shared + own))
            every += own
        return found, mixed(self.shared_gate(shared_input), every + shared)


class MMOE(nn.Module):
    """The whole model, whose embedding is called by name."""

    def __init__(self, norm: Any = None) -> None:
        super().__init__()
        self.all_features = ["x"]
        self.embedding = Flat()
        self.experts = nn.ModuleList(MLP(WIDTH, (12, 7), norm) for _ in range(4))
        self.gates = nn.ModuleList(softmax_gate(WIDTH, 4) for _ in range(TASKS))
        self.towers = nn.ModuleList(nn.Linear(7, 1) for _ in range(TASKS))

    def forward(self, x: Any) -> Tensor:
        flat = self.embedding(x=x, features=self.all_features, squeeze_dim=True)
        hidden = [expert(flat) for expert in self.experts]
        return torch.cat([tower(mixed(g(flat), hidden)) for tower, g in zip(self.towers, self.gates, strict=True)], 1)


class Flat(nn.Module):
    def forward(self, x: Any, features: list[str], squeeze_dim: bool) -> Tensor:
        return torch.cat([x[name] for name in features], dim=1)


class PLE(nn.Module):
    """Two levels, the second one's shared output unused."""

    def __init__(self, norm: Any = None) -> None:
        super().__init__()
        self.cgc_layers = nn.ModuleList([CGCLayer(WIDTH, (12, 7), norm=norm), CGCLayer(7, (8,), norm=norm)])

    def forward(self, x: Tensor) -> Tensor:
        streams, shared = [x] * TASKS, x
        for layer in self.cgc_layers:
            streams, shared = layer(streams, shared)
        return torch.cat(streams, dim=1)


def _put_back(library: types.ModuleType | None) -> None:
    if library is None:
        del sys.modules["nextrec"]
    else:
        sys.modules["nextrec"] = library


@contextlib.contextmanager
def named_as_the_library() -> Iterator[types.ModuleType]:
    """These classes under the library's names; yields what goes for the library."""
    library = types.ModuleType("nextrec")
    library.__version__ = "0.6.14"  # type: ignore[attr-defined]
    names = ((MLP, "basic.layers"), (CGCLayer, "models.multitask.ple"), (MMOE, "models.multitask.mmoe"))
    with contextlib.ExitStack() as stack:
        # patch.dict would forget what is imported in the meantime.
        before = sys.modules.get("nextrec")
        sys.modules["nextrec"] = library
        stack.callback(_put_back, before)
        for kind, name in names:
            stack.enter_context(mock.patch.object(kind, "__module__", f"nextrec.{name}"))
        yield library
