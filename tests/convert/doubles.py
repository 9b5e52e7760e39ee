"""Modules built and named as those of libraries that are not on PyPI, which are known by their structure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def mixed(weights: Tensor, experts: Sequence[Tensor]) -> Tensor:
    return torch.einsum("be,beh->bh", weights, torch.stack(list(experts), 1))


def mixed_by_sum(weights: Tensor, experts: Sequence[Tensor]) -> Tensor:
    """As FuxiCTR does it: under autocast, where a product of matrices is narrower, of the experts' dtype."""
    return torch.sum(weights.unsqueeze(-1) * torch.stack(list(experts), dim=1), dim=1)


class Perceptron(nn.Module):
    """TorchEasyRec's layer: no bias in front of batch norm."""

    def __init__(self, width: int, units: int, norm: str, rate: float, activation: type[nn.Module]) -> None:
        super().__init__()
        parts: list[nn.Module] = [nn.Linear(width, units, bias=norm != "batch")]
        if norm:
            parts.append(nn.BatchNorm1d(units) if norm == "batch" else nn.LayerNorm(units))
        parts.append(activation())
        if rate > 0:
            parts.append(nn.Dropout(rate))
        self.perceptron = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Any:
        return self.perceptron(x)


class MLP(nn.Module):
    """TorchEasyRec's MLP."""

    def __init__(
        self, width: int, units: Sequence[int], norm: str = "", rate: float = 0.0, activation: type[nn.Module] = nn.ReLU
    ) -> None:
        super().__init__()
        widths = [width, *units]
        self.return_hidden_layer_feature = False
        self.mlp = nn.ModuleList(Perceptron(a, b, norm, rate, activation) for a, b in zip(widths, units, strict=False))

    def forward(self, x: Tensor) -> Any:
        hidden = {}
        for i, layer in enumerate(self.mlp):
            x = hidden[f"hidden_layer{i}"] = layer(x)
        return hidden if self.return_hidden_layer_feature else x


class ExtractionNet(nn.Module):
    """TorchEasyRec's level of PLE: the tasks' streams and the shared one, which is None behind the last level."""

    def __init__(
        self, width: int, units: Sequence[int], *, tasks: int = 3, specific: Sequence[int] = (2, 2, 2), shared: int = 2,
        last: bool = False, shared_units: Sequence[int] | None = None, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self._shared_layers = nn.ModuleList(MLP(width, shared_units or units, **options) for _ in range(shared))
        specific = specific[:tasks]
        self._shared_gate = None if last else nn.Linear(width, sum(specific) + shared)
        self._task_layers = nn.ModuleList(
            nn.ModuleList(MLP(width, units, **options) for _ in range(count)) for count in specific
        )
        self._task_gates = nn.ModuleList(nn.Linear(width, count + shared) for count in specific)

    def forward(self, extraction_network_fea: list[Tensor], shared_expert_fea: Tensor) -> Any:
        shared = [expert(shared_expert_fea) for expert in self._shared_layers]
        specific = [
            [expert(x) for expert in experts]
            for x, experts in zip(extraction_network_fea, self._task_layers, strict=True)
        ]
        outputs = [
            mixed(gate(x).softmax(1), experts + shared)
            for x, gate, experts in zip(extraction_network_fea, self._task_gates, specific, strict=True)
        ]
        if self._shared_gate is None:
            return outputs, None
        weights = self._shared_gate(shared_expert_fea).softmax(1)
        return outputs, mixed(weights, [expert for experts in specific for expert in experts] + shared)


class MMoE(nn.Module):
    """TorchEasyRec's MMoE, with or without hidden layers in its gates."""

    def __init__(
        self,
        width: int,
        units: Sequence[int],
        experts: int = 4,
        tasks: int = 3,
        gate: Sequence[int] = (),
        **options: Any,
    ) -> None:
        super().__init__()
        self.expert_mlps = nn.ModuleList(MLP(width, units, **options) for _ in range(experts))
        self.has_gate_mlp = bool(gate)
        if gate:
            self.gate_mlps = nn.ModuleList(MLP(width, gate, **options) for _ in range(tasks))
        self.gate_finals = nn.ModuleList(nn.Linear(gate[-1] if gate else width, experts) for _ in range(tasks))

    def forward(self, input: Tensor) -> list[Tensor]:
        experts = [expert(input) for expert in self.expert_mlps]
        hidden = [mlp(input) for mlp in self.gate_mlps] if self.has_gate_mlp else [input] * len(self.gate_finals)
        return [mixed(final(x).softmax(1), experts) for final, x in zip(self.gate_finals, hidden, strict=True)]


class MLP_Block(nn.Module):  # noqa: N801 (the library's name)
    """FuxiCTR's MLP: with an ``output`` the last layer is linear."""

    def __init__(
        self, width: int, units: Sequence[int], output: int | None = None, norm: bool = False, rate: float = 0
    ):
        super().__init__()
        parts: list[nn.Module] = []
        for a, b in zip([width, *units], units, strict=False):
            parts += [nn.Linear(a, b), *([nn.BatchNorm1d(b)] if norm else []), nn.ReLU()]
            parts += [nn.Dropout(rate)] if rate > 0 else []
        if output is not None:
            parts.append(nn.Linear(units[-1] if units else width, output))
        self.mlp = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Any:
        return self.mlp(x)


class CGC_Layer(nn.Module):  # noqa: N801 (the library's name)
    """FuxiCTR's level of PLE: its shared gate mixes the shared experts only."""

    def __init__(
        self, width: int, units: Sequence[int], *, tasks: int = 3, specific: int = 2, shared: int = 2,
        gate: Sequence[int] = (6,), **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_shared_experts, self.num_specific_experts, self.num_tasks = shared, specific, tasks
        self.shared_experts = nn.ModuleList(MLP_Block(width, units, **options) for _ in range(shared))
        self.specific_experts = nn.ModuleList(
            nn.ModuleList(MLP_Block(width, units, **options) for _ in range(specific)) for _ in range(tasks)
        )
        sizes = [specific + shared] * tasks + [shared]
        self.gate = nn.ModuleList(MLP_Block(width, gate, size, **options) for size in sizes)
        self.gate_activation = nn.Softmax(dim=-1)

    def forward(self, x: list[Tensor], require_gate: bool = False) -> Any:
        shared = [expert(x[-1]) for expert in self.shared_experts]
        weights = [self.gate_activation(gate(stream)) for gate, stream in zip(self.gate, x, strict=True)]
        seen = [[expert(s) for expert in task] + shared for s, task in zip(x, self.specific_experts, strict=False)]
        outputs = [mixed_by_sum(w, experts) for w, experts in zip(weights, [*seen, shared], strict=True)]
        return (outputs, [w.mean(0) for w in weights]) if require_gate else outputs


class MMoE_Layer(nn.Module):  # noqa: N801 (the library's name)
    """FuxiCTR's MMoE."""

    def __init__(
        self,
        width: int,
        units: Sequence[int],
        *,
        experts: int = 4,
        tasks: int = 3,
        gate: Sequence[int] = (6,),
        **options: Any,
    ) -> None:
        super().__init__()
        self.num_experts, self.num_tasks = experts, tasks
        self.experts = nn.ModuleList(MLP_Block(width, units, **options) for _ in range(experts))
        self.gate = nn.ModuleList(MLP_Block(width, gate, experts, **options) for _ in range(tasks))
        self.gate_activation = nn.Softmax(dim=-1)

    def forward(self, x: Tensor) -> list[Tensor]:
        experts = [expert(x) for expert in self.experts]
        return [mixed_by_sum(self.gate_activation(gate(x)), experts) for gate in self.gate]


class LibMTL(nn.Module):
    """What LibMTL's architectures have in common: tasks by name, heads, and a tap on representations.

    With ``rep_grad`` heads read copies of the representations, where their gradients can be had before the trunk's.
    """

    def __init__(
        self,
        width: int,
        units: Sequence[int],
        tasks: int,
        counts: Sequence[int],
        share: int,
        rep_grad: bool = False,
    ) -> None:
        super().__init__()
        self.rep_grad = rep_grad
        if rep_grad:
            self.rep: Any = {}
            self.rep_tasks: dict[str, Tensor] = {}
        self.task_name = [f"task{t}" for t in range(tasks)]
        self.decoders = nn.ModuleDict({task: nn.Linear(units[-1], 2) for task in self.task_name})
        self.experts_shared = nn.ModuleList(encoder(width, units) for _ in range(share))
        self.gate_specific = nn.ModuleDict(
            {
                task: nn.Sequential(nn.Linear(width, share + count), nn.Softmax(dim=-1))
                for task, count in zip(self.task_name, counts, strict=True)
            }
        )
        self.prepared: list[str] = []

    def _prepare_rep(self, rep: Tensor, task: str, same_rep: bool) -> Tensor:
        self.prepared.append(task)
        if not self.rep_grad:
            return rep
        if same_rep:
            self.rep = rep
        else:
            self.rep[task] = rep
        self.rep_tasks[task] = rep.detach().clone()
        self.rep_tasks[task].requires_grad = True
        return self.rep_tasks[task]

    def forward(self, inputs: Tensor, task_name: str | None = None) -> dict[str, Tensor]:
        shared = [expert(inputs) for expert in self.experts_shared]
        outputs = {}
        for task in self.task_name if task_name is None else [task_name]:
            rep = mixed(self.gate_specific[task](inputs.flatten(1)), shared + self.specific(task, inputs))
            outputs[task] = self.decoders[task](self._prepare_rep(rep, task, same_rep=False))
        return outputs

    def specific(self, task: str, inputs: Tensor) -> list[Tensor]:
        return []


def encoder(width: int, units: Sequence[int]) -> nn.Sequential:
    """A user's encoder, a plain MLP with batch norm."""
    parts: list[nn.Module] = []
    for a, b in zip([width, *units], units, strict=False):
        parts += [nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU()]
    return nn.Sequential(*parts)


class CGC(LibMTL):
    """LibMTL's CGC: as many specific experts as each task wants, and shared experts first."""

    def __init__(
        self,
        width: int,
        units: Sequence[int],
        counts: Sequence[int] = (1, 2, 3),
        share: int = 2,
        rep_grad: bool = False,
    ) -> None:
        super().__init__(width, units, len(counts), counts, share, rep_grad)
        self.experts_specific = nn.ModuleDict(
            {
                task: nn.ModuleList(encoder(width, units) for _ in range(count))
                for task, count in zip(self.task_name, counts, strict=True)
            }
        )

    def specific(self, task: str, inputs: Tensor) -> list[Tensor]:
        return [expert(inputs) for expert in self.experts_specific[task]]

    forward = LibMTL.forward


class LibMTLMMoE(LibMTL):
    """LibMTL's MMoE."""

    def __init__(
        self, width: int, units: Sequence[int], experts: int = 4, tasks: int = 3, rep_grad: bool = False
    ) -> None:
        super().__init__(width, units, tasks, [0] * tasks, experts, rep_grad)


LibMTLMMoE.__name__ = "MMoE"


class MultiLayerPerceptron(nn.Module):
    """MTReclib's MLP: batch norm always, and a last linear layer unless it is an expert."""

    def __init__(self, width: int, units: Sequence[int], rate: float, output: bool = True) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for a, b in zip([width, *units], units, strict=False):
            parts += [nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU(), nn.Dropout(rate)]
        self.mlp = nn.Sequential(*parts, *([nn.Linear(units[-1], 1)] if output else []))

    def forward(self, x: Tensor) -> Any:
        return self.mlp(x)


class RecModel(nn.Module):
    """What MTReclib's models have in common: a table for codes, a layer for numbers, and towers."""

    FIELDS, EMBEDDING, NUMBERS = 4, 2, 3

    def __init__(self, units: Sequence[int], tasks: int, rate: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, self.EMBEDDING)
        self.numerical_layer = nn.Linear(self.NUMBERS, self.EMBEDDING)
        self.embed_output_dim = (self.FIELDS + 1) * self.EMBEDDING
        self.task_num = tasks
        self.tower = nn.ModuleList(MultiLayerPerceptron(units[-1], (5,), rate) for _ in range(tasks))

    def forward(self, categorical_x: Tensor, numerical_x: Tensor) -> list[Tensor]:
        numbers = self.numerical_layer(numerical_x).unsqueeze(1)
        x = torch.cat([self.embedding(categorical_x), numbers], 1).view(-1, self.embed_output_dim)
        return [torch.sigmoid(tower(y).squeeze(1)) for tower, y in zip(self.tower, self.trunk(x), strict=True)]

    def trunk(self, x: Tensor) -> list[Tensor]:
        raise NotImplementedError


def softmax_gate(width: int, size: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, size), nn.Softmax(dim=1))


class PLEModel(RecModel):
    """MTReclib's PLE: one layer an expert, widths by level, and a last shared gate that is never called."""

    def __init__(
        self, units: Sequence[int] = (12, 7), tasks: int = 3, specific: int = 2, shared: int = 2, rate: float = 0.0
    ) -> None:
        super().__init__(units, tasks, rate)
        levels = list(zip([self.embed_output_dim, *units], units, strict=False))

        def experts(a: int, b: int, count: int) -> nn.ModuleList:
            return nn.ModuleList(MultiLayerPerceptron(a, (b,), rate, output=False) for _ in range(count))

        self.share_experts = nn.ModuleList(experts(a, b, shared) for a, b in levels)
        self.share_gates = nn.ModuleList(softmax_gate(a, tasks * specific + shared) for a, _ in levels)
        self.task_experts = nn.ModuleList(
            nn.ModuleList(experts(a, b, specific) for _ in range(tasks)) for a, b in levels
        )
        self.task_gates = nn.ModuleList(
            nn.ModuleList(softmax_gate(a, specific + shared) for _ in range(tasks)) for a, _ in levels
        )

    forward = RecModel.forward

    def trunk(self, x: Tensor) -> list[Tensor]:
        streams = [x] * (self.task_num + 1)
        for i, (experts, gates) in enumerate(zip(self.task_experts, self.task_gates, strict=True)):
            shared = [expert(streams[-1]) for expert in self.share_experts[i]]  # type: ignore[union-attr]
            every = []
            below = list(streams)
            for t, (mine, gate) in enumerate(zip(experts, gates, strict=True)):  # type: ignore[arg-type]
                own = [expert(below[t]) for expert in mine]
                every += own
                streams[t] = mixed(gate(below[t]), own + shared)
            if i < len(self.task_experts) - 1:
                streams[-1] = mixed(self.share_gates[i](below[-1]), every + shared)
        return streams[:-1]


class MMoEModel(RecModel):
    """MTReclib's MMoE."""

    def __init__(self, units: Sequence[int] = (12, 7), tasks: int = 3, experts: int = 4, rate: float = 0.0) -> None:
        super().__init__(units, tasks, rate)
        self.expert = nn.ModuleList(
            MultiLayerPerceptron(self.embed_output_dim, units, rate, output=False) for _ in range(experts)
        )
        self.gate = nn.ModuleList(softmax_gate(self.embed_output_dim, experts) for _ in range(tasks))

    forward = RecModel.forward

    def trunk(self, x: Tensor) -> list[Tensor]:
        experts = [expert(x) for expert in self.expert]
        return [mixed(gate(x), experts) for gate in self.gate]
