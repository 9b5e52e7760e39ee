"""MMoE, CGC and PLE: from features to one representation a task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mtlkernels import _tracing
from mtlkernels.nn._arguments import Style, check_features, positive, units
from mtlkernels.nn._scripting import NotScriptable
from mtlkernels.nn.level import TrunkLevel
from mtlkernels.routing import Routing


class _Trunk(NotScriptable, nn.Module):
    """What the trunks share: the arguments, checked, and the check of the input."""

    level: nn.Module

    def __init__(
        self, in_features: int, num_tasks: int, expert_units: Sequence[int], gate_units: Sequence[int], *style: Any
    ) -> None:
        super().__init__()
        self._style = Style(*style)
        self.in_features = positive("in_features", in_features)
        self.num_tasks = positive("num_tasks", num_tasks)
        self.expert_units = units("expert_units", expert_units, may_be_empty=False)
        self.gate_units = units("gate_units", gate_units, may_be_empty=True)

    @property
    def out_features(self) -> int:
        """H, the width of every output."""
        return self.expert_units[-1]

    def _level(self, in_features: int, routing: Routing, gate_inputs: Sequence[int]) -> TrunkLevel:
        return TrunkLevel(in_features, self.expert_units, self.gate_units, routing, gate_inputs, self._style)

    if TYPE_CHECKING:  # what nn.Module leaves open

        def __call__(self, x: Tensor) -> tuple[Tensor, ...]: ...

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [B, D] → T tensors [B, H]."""
        # Past nn.Module.__getattr__, which shows when one row is served.
        level: Any = self._modules["level"]
        served: tuple[Tensor, ...] | None = level.served(x) if type(level) is TrunkLevel and type(x) is Tensor else None
        if served is not None:
            return served
        self._check(x)
        outputs: tuple[Tensor, ...] = level(x)
        return outputs

    def _check(self, x: Tensor) -> None:
        if not _tracing.holds_proxy(x):  # whose shape is not known yet
            _tracing.quietly(check_features, x, self.in_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, num_tasks={self.num_tasks}, out_features={self.out_features}"


class MMoE(_Trunk):
    """Multi-gate mixture of experts (Ma et al., KDD 2018): ``y_t = sum_e softmax(gate_t(x))_e * expert_e(x)``.

    ``level.experts.{e}.linears.{i}`` are the experts' layers. Without ``gate_units`` the rows of ``level.gates.weight``
    are the gates' one after another; otherwise gate t is ``level.gates.{t}``.

    The level is one fused :func:`mtlkernels.expert_mixture`, with ``batch_norm`` and ``dropout`` too; hooks on experts
    do not run then. Only where gradients are recorded, a forward hook on an expert, its linear layers, norms or slopes,
    as TorchJD's autogram puts there, or norms by running statistics with fewer than 128 rows, or 768 where a layer
    has fewer than 16,384 weights, make the level call its modules instead.

    Args:
        in_features: D, the number of input features.
        num_tasks: T.
        expert_units: the width of each layer of an expert; the last one is H.
        num_experts: E.
        gate_units: the width of each hidden layer of a gate; none by default, as in the paper.
        activation: after every layer of experts, the last one included, and after the gates' hidden layers: "relu",
            "leaky_relu", "gelu", "silu", "tanh", "sigmoid", "none", "prelu" or "dice" (torch-rechub's). The last two
            learn a slope for each layer of an expert.
        batch_norm: normalise every layer of experts, and every hidden layer of gates, before the activation.
        dropout: the probability with which the output of such a layer is dropped in training.
        device: where the parameters are made.
        dtype: float32, bfloat16, float16 or float64; by default torch's default.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: a count is below one, a list of widths is wrong, the activation is unknown, or ``dropout`` is not in
            [0, 1).
    """

    def __init__(
        self,
        in_features: int,
        num_tasks: int,
        expert_units: Sequence[int] = (256, 128),
        num_experts: int = 8,
        gate_units: Sequence[int] = (),
        activation: str = "relu",
        batch_norm: bool = False,
        dropout: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_features, num_tasks, expert_units, gate_units, activation, batch_norm, dropout, device, dtype
        )
        self.level = self._level(self.in_features, Routing.mmoe(num_experts, num_tasks), (0,) * num_tasks)


class CGC(_Trunk):
    """Customized gate control, one level of PLE (Tang et al., RecSys 2020): experts of each task, and shared ones.

    ``level.experts`` are the specific experts task by task, then the shared ones; task t's gate mixes its own, then
    the shared ones. Parameters, and what is fused, as in :class:`MMoE`.

    Args:
        in_features: D, the number of input features.
        num_tasks: T.
        expert_units: the width of each layer of an expert; the last one is H.
        num_specific: experts of each task: an int, or one int a task.
        num_shared: experts that all tasks share.
        gate_units, activation, batch_norm, dropout, device, dtype: as in :class:`MMoE`.

    Raises:
        TypeError, ValueError: as :class:`MMoE`; also where a task would have no expert at all.
    """

    def __init__(
        self,
        in_features: int,
        num_tasks: int,
        expert_units: Sequence[int] = (256, 128),
        num_specific: int | Sequence[int] = 4,
        num_shared: int = 4,
        gate_units: Sequence[int] = (),
        activation: str = "relu",
        batch_norm: bool = False,
        dropout: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_features, num_tasks, expert_units, gate_units, activation, batch_norm, dropout, device, dtype
        )
        routing = Routing.cgc(num_tasks, num_specific, num_shared, single_input=True)
        self.level = self._level(self.in_features, routing, (0,) * num_tasks)


class PLE(_Trunk):
    """Progressive layered extraction (Tang et al., RecSys 2020): levels of CGC, one above the other.

    Every expert and gate of the first level reads x. Above it task t's experts and gate read that task's output of the
    level below, shared experts read the output of its shared gate, a gate over all experts that the last level does
    not have. ``levels.{l}.experts`` and, in the first level, ``levels.{l}.gates`` are laid out as in :class:`CGC`, the
    shared gate last; above it gate k is ``levels.{l}.gates.{k}``.
    Each level is one fused operator, as that of :class:`MMoE`.

    Args:
        in_features: D, the number of input features.
        num_tasks: T.
        expert_units: the width of each layer of an expert; the last one is H.
        num_specific: experts of each task a level: an int, or one int a task.
        num_shared: experts a level that all tasks share. Without any there is no shared gate either.
        num_levels: how many levels.
        gate_units, activation, batch_norm, dropout, device, dtype: as in :class:`MMoE`.

    Raises:
        TypeError, ValueError: as :class:`CGC`.
    """

    def __init__(
        self,
        in_features: int,
        num_tasks: int,
        expert_units: Sequence[int] = (256, 128),
        num_specific: int | Sequence[int] = 4,
        num_shared: int = 4,
        num_levels: int = 2,
        gate_units: Sequence[int] = (),
        activation: str = "relu",
        batch_norm: bool = False,
        dropout: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_features, num_tasks, expert_units, gate_units, activation, batch_norm, dropout, device, dtype
        )
        self.num_levels = positive("num_levels", num_levels)
        levels = []
        for number in range(num_levels):
            first, last = number == 0, number == num_levels - 1
            counts = num_tasks, num_specific, num_shared
            routing = Routing.cgc(*counts, single_input=first)  # which checks them
            if num_shared and not last:
                routing = Routing.cgc(*counts, shared_gate=True, single_input=first)
            gate_inputs = (0,) * routing.num_gates if first else tuple(range(routing.num_gates))
            width = self.in_features if first else self.out_features
            levels.append(self._level(width, routing, gate_inputs))
        self.levels = nn.ModuleList(levels)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [B, D] → T tensors [B, H]."""
        self._check(x)
        streams: Any = x
        for level in self.levels:
            streams = level(streams)
        outputs: tuple[Tensor, ...] = streams
        return outputs
