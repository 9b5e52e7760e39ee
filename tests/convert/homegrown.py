"""MMoE and its kin as people write them at home: random classes, each with the description that fits it."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mtlkernels as mk

ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], type[nn.Module]]] = {
    "relu": (F.relu, nn.ReLU),
    "tanh": (torch.tanh, nn.Tanh),
    "silu": (F.silu, nn.SiLU),
    "gelu": (F.gelu, nn.GELU),
    "sigmoid": (torch.sigmoid, nn.Sigmoid),
    "leaky_relu": (F.leaky_relu, nn.LeakyReLU),
}


class Expert(nn.Module):
    """Attributes in a line. The activation is a module, one for both layers, or a function in ``forward``."""

    def __init__(self, width: int, hidden: int, out: int, options: dict[str, Any]) -> None:
        super().__init__()
        function, module = ACTIVATIONS[options["activation"]]
        self.fc1 = nn.Linear(width, hidden, bias=options["bias"])
        self.fc2 = nn.Linear(hidden, out, bias=options["bias"]) if options["deep"] else None
        self.bn = nn.BatchNorm1d(hidden) if options["norm"] else None
        self.dropout = nn.Dropout(options["rate"])
        self.act: Any = module() if options["act_module"] else function
        self.active_end = options["active_end"]

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if self.bn is not None:
            x = self.bn(x)
        x = self.dropout(self.act(x))
        if self.fc2 is not None:
            x = self.fc2(x)
            x = self.act(x) if self.active_end else x
        return x

    def chain(self) -> list[Any]:
        """What a user writes into the description."""
        chain = [self.fc1, self.bn, self.act, self.dropout, self.fc2]
        return [*chain, self.act] if self.fc2 is not None and self.active_end else chain


class Matrices(nn.Module):
    """All experts' weights stacked, by einsum; as ``x @ w`` has them or as ``nn.Linear`` has."""

    def __init__(self, count: int, width: int, hidden: int, out: int, options: dict[str, Any]) -> None:
        super().__init__()
        self.linear_layout = options["linear_layout"]
        shapes = [(width, hidden), (hidden, out)] if options["deep"] else [(width, hidden)]
        self.weights = nn.ParameterList(
            torch.randn(count, *(reversed(shape) if self.linear_layout else shape)) / shape[0] ** 0.5
            for shape in shapes
        )
        self.biases = nn.ParameterList(torch.randn(count, *options["bias_rank"], n) for _, n in shapes)
        self.has_bias = options["bias"]
        self.function = ACTIVATIONS[options["activation"]][0]

    def forward(self, streams: list[Tensor]) -> Tensor:
        """E streams [B, D] → [E, B, H]."""
        x = torch.stack(streams)
        for weight, bias in zip(self.weights, self.biases, strict=True):
            x = torch.einsum("ebd,ehd->ebh" if self.linear_layout else "ebd,edh->ebh", x, weight)
            if self.has_bias:
                x = x + (bias if bias.dim() == 3 else bias.unsqueeze(1))
            x = self.function(x)
        return x

    def chains(self) -> list[list[Any]]:
        """What a user writes into the description."""
        chains: list[list[Any]] = [[] for _ in self.weights[0]]
        for weight, bias in zip(self.weights, self.biases, strict=True):
            for chain, w, b in zip(chains, weight, bias, strict=True):
                chain += [w.t() if self.linear_layout else w, *([b] if self.has_bias else []), self.function]
        return chains


class MMoE(nn.Module):
    """Several levels, embedded or not, with whatever ``options`` say."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.options = options
        width, tasks, count = options["width"], options["tasks"], options["experts"]
        self.embedding = nn.Embedding(20, width) if options["embedding"] else None
        self.levels = options["levels"]
        self.experts, self.gates, self.offsets = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for i in range(self.levels):
            hidden, out = options["hidden"], options["hidden"] if not options["deep"] else options["out"]
            if options["stacked"]:
                self.experts.append(Matrices(count, width, hidden, out, options))
            else:
                self.experts.append(nn.ModuleList(Expert(width, hidden, out, options) for _ in range(count)))
            mixtures = tasks if i == self.levels - 1 else count
            if options["gate"] == "linear":
                self.gates.append(nn.ModuleList(nn.Linear(width, count) for _ in range(mixtures)))
            elif options["gate"] == "list":
                self.gates.append(nn.ParameterList(torch.randn(width, count) for _ in range(mixtures)))
            else:
                holder = nn.Module()
                holder.stacked = nn.Parameter(torch.randn(mixtures, width, count))
                self.gates.append(holder)
            self.offsets.append(nn.ParameterList(torch.randn(count) for _ in range(mixtures)))
            width = out
        self.towers = nn.ModuleList(nn.Linear(width, 1) for _ in range(tasks))

    def gate_chains(self, i: int) -> list[Any]:
        """What a user writes into the description."""
        gates: Any = self.gates[i]
        if self.options["gate"] == "linear":
            return list(gates)
        matrices = gates.stacked if self.options["gate"] == "stacked" else gates
        return [[w, b] for w, b in zip(matrices, self.offsets[i], strict=True)]  # type: ignore[arg-type]

    def front(self, x: Any) -> Tensor:
        """The first level's input."""
        return x if self.embedding is None else self.embedding(x).mean(1)

    def forward(self, x: Tensor) -> Any:
        streams = [self.front(x)] * self.options["experts"]
        for i in range(self.levels):
            experts: Any = self.experts[i]
            if self.options["stacked"]:
                hidden = experts(streams)
            else:
                hidden = torch.stack([expert(x) for expert, x in zip(experts, streams, strict=True)])
            mixed = []
            for k, gate in enumerate(self.gate_chains(i)):
                z = gate(streams[k]) if callable(gate) else streams[k] @ gate[0] + gate[1]
                mixed.append(torch.einsum("be,ebh->bh", z.softmax(1), hidden))
            streams = mixed
        return torch.cat([tower(x) for tower, x in zip(self.towers, streams, strict=True)], dim=1)


def _wiring(model: Any, i: int) -> mk.Routing:
    every = tuple(range(model.options["experts"]))
    return mk.Routing(every, (every,) * len(model.gate_chains(i)))


DESCRIPTION: dict[str, Any] = {
    "levels": lambda model: range(model.levels),
    "experts": lambda model, i: (
        model.experts[i].chains() if model.options["stacked"] else [expert.chain() for expert in model.experts[i]]
    ),
    "gates": lambda model, i: model.gate_chains(i),
    "routing": _wiring,
    "inputs": lambda model, x: [model.front(x)] * model.options["experts"],
    "outputs": lambda model, streams: torch.cat(
        [tower(x) for tower, x in zip(model.towers, streams, strict=True)], dim=1
    ),
    "example": lambda model, rows: (
        torch.randn(rows, model.options["width"]) if model.embedding is None else torch.randint(20, (rows, 3)),
    ),
}


def sample(seed: int) -> dict[str, Any]:
    """Options of a model. It has as many experts as tasks at least, so that every gate has a stream of its own."""
    draw = random.Random(seed)
    tasks = draw.randint(1, 3)
    return {
        "tasks": tasks,
        "experts": draw.randint(tasks, 5),
        "levels": draw.randint(1, 3),
        "width": draw.choice([4, 7, 10]),
        "hidden": draw.choice([3, 8, 12]),
        "out": draw.choice([2, 5, 8]),
        "deep": draw.random() < 0.6,
        "activation": draw.choice(list(ACTIVATIONS)),
        "bias": draw.random() < 0.6,
        "bias_rank": draw.choice([(), (1,)]),
        "norm": draw.random() < 0.3,
        "rate": 0.0,
        "act_module": draw.random() < 0.5,
        "active_end": draw.random() < 0.5,
        "stacked": draw.random() < 0.4,
        "linear_layout": draw.random() < 0.4,
        "gate": draw.choice(["linear", "list", "stacked"]),
        "embedding": draw.random() < 0.4,
    }


def inputs(model: MMoE) -> Callable[[int, int, torch.dtype], tuple[Any, ...]]:
    """Arguments by rows, seed and dtype."""

    def made(rows: int, seed: int, dtype: torch.dtype) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(seed)
        if model.embedding is not None:
            return (torch.randint(20, (rows, 3), generator=generator),)
        return (torch.randn(rows, model.options["width"], generator=generator).to(dtype),)

    return made
