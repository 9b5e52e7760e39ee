"""What an expert in PyTorch writes by hand: parameters stacked once, few and large matrix products."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.peers.per_expert import PerExpertLevel, PerExpertTrunk

# One layer of all experts: from hidden [E, B, D], weights [E, H, D] and biases [E, H] what it gives, [E, B, H].
Layer = Callable[[Tensor, Tensor, Tensor], Tensor]


def by_bmm(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.relu(torch.baddbmm(bias.unsqueeze(1), hidden, weight.transpose(1, 2)))


def by_grouped_mm(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """PyTorch's grouped product, which takes bfloat16."""
    return F.relu(F.grouped_mm(hidden, weight.transpose(1, 2)) + bias.unsqueeze(1))


def by_quack() -> Layer:
    """QuACK's product with bias and activation in its epilogue, forward alone.

    Raises:
        ImportError: it is not installed.
    """
    from quack.gemm_interface import gemm_act  # type: ignore[import-not-found]

    def layer(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        found: Tensor = gemm_act(hidden, weight.transpose(1, 2), bias=bias, activation="relu", store_preact=False)[1]
        return found

    return layer


class HandBatchedLevel(nn.Module):
    """One level with the parameters of a :class:`PerExpertLevel`, copied into stacks.

    The first layer is one linear over all experts that read the same stream, later layers are a ``baddbmm`` over
    experts, all gates that read the same stream are one linear with a logit for every expert, minus infinity for those
    that a gate does not see, and the mixing is one ``bmm``. ``layer`` evaluates a later layer of all experts.
    """

    def __init__(self, level: PerExpertLevel, layer: Layer) -> None:
        super().__init__()
        self.layer = layer
        self.routing = level.routing
        inputs = self.routing.expert_inputs
        # Experts of one stream are neighbours in Routing.cgc, so a group's output is a slice of the level's.
        self.groups = [inputs.count(stream) for stream in range(self.routing.num_inputs)]
        linears = [level.linears(layer) for layer in range(level.num_layers)]
        self.first = nn.ParameterList(
            torch.cat([x.weight for x, mine in zip(linears[0], inputs, strict=True) if mine == stream]).detach()
            for stream in range(self.routing.num_inputs)
        )
        self.first_bias = nn.ParameterList(
            torch.cat([x.bias for x, mine in zip(linears[0], inputs, strict=True) if mine == stream]).detach()
            for stream in range(self.routing.num_inputs)
        )
        self.later = nn.ParameterList(torch.stack([x.weight for x in layer]).detach() for layer in linears[1:])
        self.later_bias = nn.ParameterList(torch.stack([x.bias for x in layer]).detach() for layer in linears[1:])
        self._stack_gates(level)

    def _stack_gates(self, level: PerExpertLevel) -> None:
        """[K, E, D] weights and [K, E] biases, zero where a gate does not see an expert, and the mask of these."""
        gates = [gate for gate in level.gates if isinstance(gate, nn.Linear)]
        like = gates[0].weight
        weight = like.new_zeros(len(gates), self.routing.num_experts, like.shape[1])
        bias = like.new_zeros(weight.shape[:2])
        hidden = torch.ones(weight.shape[:2], dtype=torch.bool, device=like.device)
        for k, (gate, seen) in enumerate(zip(gates, self.routing.gate_experts, strict=True)):
            weight[k, list(seen)] = gate.weight.detach()
            bias[k, list(seen)] = gate.bias.detach()
            hidden[k, list(seen)] = False
        self.gate = nn.Parameter(weight)
        self.gate_bias = nn.Parameter(bias)
        self.hidden: Tensor
        self.register_buffer("hidden", hidden)
        self.gates_share_input = len(set(level.gate_inputs)) == 1

    def forward(self, streams: Sequence[Tensor]) -> list[Tensor]:
        experts = self._experts(streams)
        share = self._logits(streams).masked_fill(self.hidden, float("-inf")).softmax(dim=-1)
        return list(torch.bmm(share, experts.transpose(0, 1)).unbind(1))

    def _experts(self, streams: Sequence[Tensor]) -> Tensor:
        """Every expert's output, [E, B, H]."""
        rows = streams[0].shape[0]
        parts = [
            F.relu(F.linear(x, weight, bias)).view(rows, count, -1).transpose(0, 1)
            for x, weight, bias, count in zip(streams, self.first, self.first_bias, self.groups, strict=False)
        ]
        hidden = parts[0] if len(parts) == 1 else torch.cat(parts)
        for weight, bias in zip(self.later, self.later_bias, strict=True):
            hidden = self.layer(hidden, weight, bias)
        return hidden

    def _logits(self, streams: Sequence[Tensor]) -> Tensor:
        """[B, K, E]"""
        num_gates, num_experts, width = self.gate.shape
        if self.gates_share_input:
            flat = F.linear(streams[0], self.gate.view(-1, width), self.gate_bias.view(-1))
            return flat.view(-1, num_gates, num_experts)
        read = torch.stack(list(streams[:num_gates]))
        return torch.baddbmm(self.gate_bias.unsqueeze(1), read, self.gate.transpose(1, 2)).transpose(0, 1)

    def gradients(self, prefix: str) -> dict[str, Tensor]:
        """As :meth:`PerExpertTrunk.gradients` names and shapes them."""
        count = self.routing.num_experts
        width = self.first[0].shape[1]
        found = {
            f"{prefix} layer 0 weight": torch.cat([_grad(w) for w in self.first]).view(count, -1, width),
            f"{prefix} layer 0 bias": torch.cat([_grad(b) for b in self.first_bias]).view(count, -1),
        }
        for at, (weight, bias) in enumerate(zip(self.later, self.later_bias, strict=True)):
            found[f"{prefix} layer {at + 1} weight"] = _grad(weight)
            found[f"{prefix} layer {at + 1} bias"] = _grad(bias)
        for k, seen in enumerate(self.routing.gate_experts):
            found[f"{prefix} gate {k} weight"] = _grad(self.gate)[k, list(seen)]
            found[f"{prefix} gate {k} bias"] = _grad(self.gate_bias)[k, list(seen)]
        return found


class HandBatchedTrunk(nn.Module):
    """All levels, with copies of the parameters of a :class:`PerExpertTrunk`."""

    def __init__(self, source: PerExpertTrunk, layer: Layer | None = None) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            HandBatchedLevel(level, layer or by_bmm) for level in source.levels if isinstance(level, PerExpertLevel)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        streams = [x]
        for level in self.levels:
            streams = level(streams)
        return tuple(streams)

    def gradients(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for number, level in enumerate(self.levels):
            assert isinstance(level, HandBatchedLevel)
            found |= level.gradients(f"gradients: level {number}")
        return found


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
