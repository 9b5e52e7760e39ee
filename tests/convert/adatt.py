"""AdaTT's modules as its authors wire them, whose one ``forward`` holds every level, and their descriptions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import mtlkernels as mk


class MLP(nn.Module):
    """An expert, or the hidden layers of a gate, which may be none."""

    def __init__(self, width: int, units: Sequence[int]) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for a, b in zip([width, *units], units, strict=False):
            parts += [nn.Linear(a, b), nn.ReLU()]
        self.mlp_net = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Any:
        return self.mlp_net(x)


def mlps(width: int, units: Sequence[int], count: int) -> nn.ModuleList:
    return nn.ModuleList(MLP(width, units) for _ in range(count))


def gate(width: int, size: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, size), nn.Softmax(dim=-1))


def widths(width: int, units: Sequence[Sequence[int]]) -> list[int]:
    """The input width of each level."""
    return [width, *(level[-1] for level in units[:-1])]


class MLMMoE(nn.Module):
    """Levels of MMoE: below the last, a gate for each expert of the next level. Every gate reads the model's input."""

    def __init__(
        self, width: int, units: Sequence[Sequence[int]], gate_units: Sequence[Sequence[int]], tasks: int, experts: int
    ) -> None:
        super().__init__()
        self.num_layers, self.num_tasks, self.num_experts = len(units), tasks, experts
        self.experts = nn.ModuleList(
            mlps(a, level, experts) for a, level in zip(widths(width, units), units, strict=True)
        )
        self.gates = nn.ModuleList(
            nn.ModuleList(
                nn.Sequential(MLP(width, hidden), nn.Linear([width, *hidden][-1], experts), nn.Softmax(dim=-1))
                for _ in range(tasks if i == len(units) - 1 else experts)
            )
            for i, hidden in enumerate(gate_units)
        )

    def forward(self, input: Tensor) -> Tensor:
        """[B, D] → [B, T, H]."""
        x = input.unsqueeze(1).expand([-1, self.num_experts, -1])
        for experts, gates in zip(self.experts, self.gates, strict=True):
            hidden = torch.stack([f(x[:, e, :]) for e, f in enumerate(experts)], dim=1)  # type: ignore[arg-type]
            shares = torch.stack([g(input) for g in gates], dim=1)  # type: ignore[union-attr]
            x = torch.matmul(shares, hidden)
        return x


class PLE(nn.Module):
    """Levels of CGC on streams [B, T + 1, D]; a task may have another number of experts than the others."""

    def __init__(
        self, width: int, units: Sequence[Sequence[int]], tasks: int, specific: int | list[int], shared: int
    ) -> None:
        super().__init__()
        self.num_extraction_layers, self.num_tasks = len(units), tasks
        self.num_task_experts, self.num_shared_experts = specific, shared
        self.counts = [specific] * tasks if isinstance(specific, int) else specific
        total = sum(self.counts) + shared
        self.experts = nn.ModuleList(
            mlps(a, level, total) for a, level in zip(widths(width, units), units, strict=True)
        )
        self.gate_weights = nn.ModuleList()
        for i, a in enumerate(widths(width, units)):
            gates = [gate(a, count + shared) for count in self.counts]
            self.gate_weights.append(nn.ModuleList(gates if i == len(units) - 1 else [*gates, gate(a, total)]))

    def forward(self, inputs: Tensor) -> Tensor:
        """→ [B, T, H]."""
        streams = [t for t, count in enumerate(self.counts) for _ in range(count)]
        streams += [self.num_tasks] * self.num_shared_experts
        for experts, gates in zip(self.experts, self.gate_weights, strict=True):
            found = [f(inputs[:, s, :]) for s, f in zip(streams, experts, strict=True)]  # type: ignore[arg-type]
            hidden = torch.stack(found, dim=1)
            mixed = []
            for k, g in enumerate(gates):  # type: ignore[arg-type]
                seen = [e for e, s in enumerate(streams) if k == self.num_tasks or s in (k, self.num_tasks)]
                mixed.append(torch.bmm(g(inputs[:, k, :]).unsqueeze(1), hidden[:, seen]))
            inputs = torch.cat(mixed, dim=1)
        return inputs


class AdaTTSp(nn.Module):
    """Levels in which every task's gate sees all tasks' experts, and a task's own ones are added by learned weights."""

    def __init__(
        self, width: int, units: Sequence[Sequence[int]], tasks: int, each: int, self_exp_res_connect: bool = True
    ) -> None:
        super().__init__()
        self.num_extraction_layers, self.num_tasks, self.num_task_experts = len(units), tasks, each
        self.self_exp_res_connect = self_exp_res_connect
        self.experts = nn.ModuleList(
            mlps(a, level, tasks * each) for a, level in zip(widths(width, units), units, strict=True)
        )
        self.gate_weights = nn.ModuleList(
            nn.ModuleList(gate(a, tasks * each) for _ in range(tasks)) for a in widths(width, units)
        )
        learned = len(units) if self_exp_res_connect and each > 1 else 0
        self.self_exp_weights = nn.ParameterList(torch.randn(tasks, each) / each for _ in range(learned))

    def forward(self, inputs: Tensor) -> Tensor:
        """[B, T, D] → [B, T, H]."""
        tasks, each = self.num_tasks, self.num_task_experts
        for i, (experts, gates) in enumerate(zip(self.experts, self.gate_weights, strict=True)):
            found = [f(inputs[:, e // each, :]) for e, f in enumerate(experts)]  # type: ignore[arg-type]
            hidden = torch.stack(found, dim=1)
            shares = torch.stack([g(inputs[:, t, :]) for t, g in enumerate(gates)], dim=1)  # type: ignore[arg-type]
            mixed = torch.bmm(shares, hidden)
            if self.self_exp_res_connect and each > 1:
                own = hidden.view(hidden.size(0), tasks, each, -1)
                mixed = mixed + torch.einsum("te,bted->btd", self.self_exp_weights[i], own)
            elif self.self_exp_res_connect:
                mixed = mixed + hidden
            inputs = mixed
        return inputs


class AdaTTWSharedExps(nn.Module):
    """The same with shared experts, a stream of their own below the last level, and learned weights in the shares."""

    def __init__(
        self,
        width: int,
        units: Sequence[Sequence[int]],
        tasks: int,
        specific: Sequence[int],
        shared: int,
        self_exp_res_connect: bool = True,
    ) -> None:
        super().__init__()
        self.num_extraction_layers, self.num_tasks = len(units), tasks
        self.self_exp_res_connect = self_exp_res_connect
        self.num_expert_list = [*specific, shared]
        total = sum(self.num_expert_list)
        self.experts = nn.ModuleList(
            mlps(a, level, total) for a, level in zip(widths(width, units), units, strict=True)
        )
        last = len(units) - 1
        self.gate_weights = nn.ModuleList(
            nn.ModuleList(gate(a, total) for _ in range(tasks + (i < last))) for i, a in enumerate(widths(width, units))
        )
        learned = self_exp_res_connect and any(count != 1 for count in self.num_expert_list)
        self.self_exp_weights = nn.ParameterList(
            torch.randn(last if t == tasks else last + 1, count) / count
            for t, count in enumerate(self.num_expert_list if learned else [])
        )
        self.expert_input_idx = [t for t, count in enumerate(self.num_expert_list) for _ in range(count)]

    def forward(self, inputs: Tensor) -> Tensor:
        """[B, T + 1, D] → [B, T, H]."""
        for i, (experts, gates) in enumerate(zip(self.experts, self.gate_weights, strict=True)):
            read = zip(self.expert_input_idx, experts, strict=True)  # type: ignore[arg-type]
            hidden = torch.stack([f(inputs[:, s, :]) for s, f in read], dim=1)
            shares = torch.stack([g(inputs[:, t, :]) for t, g in enumerate(gates)], dim=1)  # type: ignore[arg-type]
            at = 0
            for t, count in enumerate(self.num_expert_list[: shares.shape[1]] if self.self_exp_res_connect else []):
                own = self.self_exp_weights[t][i].unsqueeze(0) if len(self.self_exp_weights) else 1.0
                shares[:, t, at : at + count] += own
                at += count
            inputs = torch.bmm(shares, hidden)
        return inputs


def stacked(model: Any, streams: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(streams[: model.num_tasks]), dim=1)


def nets(model: Any, i: int) -> list[Any]:
    return [expert.mlp_net for expert in model.experts[i]]


def mlmmoe_wiring(model: Any, i: int) -> mk.Routing:
    every = tuple(range(model.num_experts))
    return mk.Routing(every, (every,) * len(model.gates[i]))


def sp_wiring(model: Any, i: int) -> mk.Routing:
    """Besides the gates' mixtures, each expert's output by itself."""
    tasks, each = model.num_tasks, model.num_task_experts
    every = range(tasks * each)
    own = [(e,) for e in every] if model.self_exp_res_connect else []
    return mk.Routing(tuple(e // each for e in every), (*[tuple(every)] * tasks, *own))


def sp_gates(model: Any, i: int) -> list[Any]:
    gates = list(model.gate_weights[i])
    return gates + [None] * len(model.experts[i]) if model.self_exp_res_connect else gates


def sp_residual(model: Any, i: int, mixed: Sequence[Tensor], streams: Sequence[Tensor]) -> list[Tensor]:
    tasks, each = model.num_tasks, model.num_task_experts
    if not model.self_exp_res_connect:
        return list(mixed)
    weights = model.self_exp_weights[i] if each > 1 else torch.ones(tasks, 1, dtype=mixed[0].dtype)
    own = torch.stack(list(mixed[tasks:])).unflatten(0, (tasks, each))
    return [y + z for y, z in zip(mixed, torch.einsum("te,tebd->tbd", weights, own), strict=False)]


def shared_wiring(model: Any, i: int) -> mk.Routing:
    every = tuple(range(len(model.experts[i])))
    own = [(e,) for e in every] if model.self_exp_res_connect else []
    return mk.Routing(tuple(model.expert_input_idx), (*[every] * len(model.gate_weights[i]), *own))


def shared_residual(model: Any, i: int, mixed: Sequence[Tensor], streams: Sequence[Tensor]) -> list[Tensor]:
    """Of one expert everywhere, its output itself is added."""
    if not model.self_exp_res_connect:
        return list(mixed)
    found, own = [], list(mixed[len(model.gate_weights[i]) :])
    for t in range(len(model.gate_weights[i])):
        mine = [x for x, s in zip(own, model.expert_input_idx, strict=True) if s == t]
        weights = model.self_exp_weights[t][i] if len(model.self_exp_weights) else [1.0]
        found.append(mixed[t] + sum(w * x for w, x in zip(weights, mine, strict=True)))
    return found


def depth(model: Any) -> range:
    return range(model.num_extraction_layers)


STREAMS: dict[str, Any] = {
    "levels": depth,
    "experts": nets,
    "inputs": lambda model, inputs: inputs.unbind(1),
    "arguments": lambda model, streams: (torch.stack(list(streams), dim=1),),
    "outputs": stacked,
}
DESCRIPTIONS: dict[type[nn.Module], dict[str, Any]] = {
    MLMMoE: {
        "levels": lambda model: range(model.num_layers),
        "experts": nets,
        "gates": lambda model, i: [[gate[0].mlp_net, gate[1], gate[2]] for gate in model.gates[i]],
        "routing": mlmmoe_wiring,
        # The input is a last stream, which gates alone read.
        "gate_inputs": lambda model, i: [model.num_experts] * len(model.gates[i]),
        "inputs": lambda model, input: [input] * (model.num_experts + 1),
        "arguments": lambda model, streams: (streams[-1],),
        "level_outputs": lambda model, i, mixed, streams: [*mixed, streams[-1]],
        "outputs": stacked,
    },
    PLE: {
        **STREAMS,
        "gates": lambda model, i: model.gate_weights[i],
        "routing": lambda model, i: mk.Routing.cgc(
            model.num_tasks,
            model.num_task_experts,
            model.num_shared_experts,
            shared_gate=len(model.gate_weights[i]) > model.num_tasks,
        ),
    },
    AdaTTSp: {**STREAMS, "gates": sp_gates, "routing": sp_wiring, "level_outputs": sp_residual},
    AdaTTWSharedExps: {
        **STREAMS,
        "gates": sp_gates,
        "routing": shared_wiring,
        "level_outputs": shared_residual,
    },
}
