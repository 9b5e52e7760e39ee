"""The same parameters, evaluated by ``mtlkernels.expert_mixture``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import mtlkernels as mk
from benchmarks.harness.case import Launch
from benchmarks.peers.per_expert import PerExpertLevel, PerExpertTrunk
from benchmarks.peers.shape import TrunkShape
from mtlkernels.ops.activations import CODES


class FusedLevel(PerExpertLevel):
    """One level of separate expert modules, as a user's model has them, evaluated by one operator."""

    def __init__(self, shape: TrunkShape, level: int) -> None:
        super().__init__(shape, level)
        self._gather()

    def _gather(self) -> None:
        """Lists of the same parameters, so that a call does not search modules: that costs more than a small batch."""
        linears = [self.linears(layer) for layer in range(self.num_layers)]
        gates = [gate for gate in self.gates if isinstance(gate, nn.Linear)]
        self.expert_weights = [[x.weight for x in layer] for layer in linears]
        self.expert_biases = [[x.bias for x in layer] for layer in linears]
        self.gate_weights: list[Tensor] = [gate.weight for gate in gates]
        self.gate_biases: list[Tensor] = [gate.bias for gate in gates]

    def forward(self, streams: Sequence[Tensor]) -> list[Tensor]:
        inputs = streams[0] if self.routing.num_inputs == 1 else streams
        mixed = mk.expert_mixture(
            inputs,
            self.expert_weights,
            self.expert_biases,
            None,
            self.routing,
            gate_weights=self.gate_weights,
            gate_biases=self.gate_biases,
        )
        return list(mixed)


def fused_trunk(shape: TrunkShape, source: PerExpertTrunk) -> PerExpertTrunk:
    """A trunk with copies of ``source``'s parameters whose levels are fused."""
    like = next(source.parameters())
    trunk = PerExpertTrunk(shape, FusedLevel).to(like.device, like.dtype)
    trunk.load_state_dict(source.state_dict())
    return trunk


def fused_launches(
    shape: TrunkShape, rows: int, dtype: torch.dtype, training: bool, device: torch.device
) -> list[Launch]:
    """What each of the operator's launches has to do in one step on a GPU."""
    from benchmarks.peers import triton_work
    from mtlkernels.ops import _triton, _triton_splits

    levels = []
    for level in range(shape.num_levels):
        routing, widths = shape.routing(level), shape.widths(level)
        wiring = routing.wiring
        levels.append(
            triton_work.Shape(
                rows=rows,
                widths=widths,
                expert_inputs=wiring.expert_inputs,
                gate_experts=wiring.gate_experts,
                gate_sizes=wiring.gate_sizes,
                activations=(CODES["relu"],) * len(shape.units),
                biases=(len(wiring.expert_inputs),) * len(shape.units),
                dtype=dtype,
                logits_dtype=dtype,
                precision=_triton.Kind.of(dtype, True).precision,
                aligned=all(width % 16 == 0 for width in widths),
                num_inputs=routing.num_inputs,
                card=_triton_splits.card(device),
                gate_inputs=tuple(k * (routing.num_inputs > 1) for k in range(len(wiring.gate_sizes))),
                gate_biases=sum(wiring.gate_sizes),
            )
        )
    launches: list[Launch] = [work for level in levels for work in triton_work.forward(level, save=training)]
    if training:
        launches += [work for level in reversed(levels) for work in triton_work.backward(level)]
    return launches
