"""Each expert a small module of its own: how the libraries do it, and so what users have."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.peers.shape import TrunkShape


class PerExpertLevel(nn.Module):
    """One level: run every expert, stack what a gate sees, multiply by the gate's softmax."""

    def __init__(self, shape: TrunkShape, level: int) -> None:
        super().__init__()
        self.routing = shape.routing(level)
        widths = shape.widths(level)
        # In place, as the libraries have their ReLU: it saves eager PyTorch a tensor a layer.
        self.experts = nn.ModuleList(
            nn.Sequential(
                *(
                    module
                    for n_in, n_out in zip(widths, widths[1:], strict=False)
                    for module in (nn.Linear(n_in, n_out), nn.ReLU(inplace=True))
                )
            )
            for _ in range(shape.num_experts)
        )
        self.gates = nn.ModuleList(nn.Linear(widths[0], len(gate)) for gate in self.routing.gate_experts)
        # A gate reads the stream of its own task; at the first level there is only one.
        self.gate_inputs = [0 if level == 0 else k for k in range(self.routing.num_gates)]

    def forward(self, streams: Sequence[Tensor]) -> list[Tensor]:
        routing = self.routing
        outputs = [expert(streams[stream]) for expert, stream in zip(self.experts, routing.expert_inputs, strict=True)]
        mixed = []
        for gate, seen, stream in zip(self.gates, routing.gate_experts, self.gate_inputs, strict=True):
            stacked = torch.stack([outputs[e] for e in seen], dim=1)
            share = gate(streams[stream]).softmax(dim=-1)
            mixed.append(torch.matmul(share.unsqueeze(1), stacked).squeeze(1))
        return mixed

    def linears(self, layer: int) -> list[nn.Linear]:
        """The experts' linear layers at one depth."""
        chosen = [expert[2 * layer] for expert in self.experts if isinstance(expert, nn.Sequential)]
        return [linear for linear in chosen if isinstance(linear, nn.Linear)]

    @property
    def num_layers(self) -> int:
        first = self.experts[0]
        return len(first) // 2 if isinstance(first, nn.Sequential) else 0


class PerExpertTrunk(nn.Module):
    """All levels. Returns a tensor [B, H] a gate of the last level."""

    def __init__(self, shape: TrunkShape, level_type: type[PerExpertLevel] = PerExpertLevel) -> None:
        super().__init__()
        self.levels = nn.ModuleList(level_type(shape, level) for level in range(shape.num_levels))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        streams = [x]
        for level in self.levels:
            streams = level(streams)
        return tuple(streams)

    def before_relu(self) -> list[nn.Linear]:
        """The linear layers whose outputs go into a ReLU."""
        levels = [level for level in self.levels if isinstance(level, PerExpertLevel)]
        return [linear for level in levels for layer in range(level.num_layers) for linear in level.linears(layer)]

    def gradients(self) -> dict[str, Tensor]:
        """Parameters' gradients under the names that all contenders share; experts are stacked."""
        found = {}
        for number, level in enumerate(self.levels):
            assert isinstance(level, PerExpertLevel)
            for layer in range(level.num_layers):
                linears, name = level.linears(layer), f"gradients: level {number} layer {layer}"
                found[f"{name} weight"] = torch.stack([_grad(x.weight) for x in linears])
                found[f"{name} bias"] = torch.stack([_grad(x.bias) for x in linears])
            for k, gate in enumerate(level.gates):
                assert isinstance(gate, nn.Linear)
                found[f"gradients: level {number} gate {k} weight"] = _grad(gate.weight)
                found[f"gradients: level {number} gate {k} bias"] = _grad(gate.bias)
        return found


def _grad(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        raise ValueError(f"a parameter of shape {list(parameter.shape)} got no gradient")
    return parameter.grad
