"""One level of a trunk: experts, gates and the wiring between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mtlkernels import _torch, _tracing
from mtlkernels.nn._arguments import Style
from mtlkernels.nn._scripting import NotScriptable
from mtlkernels.ops import activations as act
from mtlkernels.ops._folding import few_rows, uses_running
from mtlkernels.ops.level import expert_mixture
from mtlkernels.ops.gated_mixture import mix_list
from mtlkernels.ops.level.norms import alike
from mtlkernels.routing import Routing

# PyTorch's, and deepctr-torch's; torch-rechub draws that of Dice, whose eps is this.
_FIRST_SLOPE = {"prelu": 0.25, "dice": 0.0}
DICE_EPS = 1e-3

# Attribute look-ups show when one row is served.
_Linear, _Parameter = nn.Linear, nn.Parameter


class Expert(nn.Module):
    """An MLP, [Linear → (BatchNorm1d) → activation → (Dropout)] a layer; also the hidden layers of a gate.

    ``linears.{i}`` and ``norms.{i}`` hold the parameters of layer i, ``slopes.{i}`` [1] the slope of its activation if
    that learns one. A layer with batch norm has no bias of its own.
    """

    slopes: nn.ParameterList | None

    def __init__(self, in_features: int, units: Sequence[int], style: Style) -> None:
        super().__init__()
        widths = (in_features, *units)
        self.linears = nn.ModuleList(
            nn.Linear(a, b, bias=not style.batch_norm, **style.factory)
            for a, b in zip(widths[:-1], widths[1:], strict=True)
        )
        self.norms = nn.ModuleList(nn.BatchNorm1d(n, **style.factory) for n in units if style.batch_norm)
        self.dropout = nn.Dropout(style.dropout)
        self._code = act.CODES[style.activation]
        self.slopes = None
        if act.has_slopes(self._code):
            first = _FIRST_SLOPE[style.activation]
            self.slopes = nn.ParameterList(torch.full((1,), first, **style.factory) for _ in units)

    def forward(self, x: Tensor) -> Tensor:
        """[B, D] → [B, H]."""
        for i, linear in enumerate(self.linears):
            x = linear(x)
            if self.norms:
                x = self.norms[i](x)
            slope = None if self.slopes is None else self.slopes[i]
            x = self.dropout(act.activate(self._code, x, slope, DICE_EPS))
        return x


def linear_parameters(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of an ``nn.Linear``.

    Serving one row takes so little time that attribute look-ups by ``nn.Module.__getattr__`` show. A parametrized layer
    and a replica of ``nn.DataParallel`` keep theirs elsewhere, so they go the long way.
    """
    own = layer._parameters
    weight = own.get("weight")
    if weight is None:
        linear: Any = layer
        return linear.weight, linear.bias
    return weight, own.get("bias")


def plain(weight: Any) -> bool:
    """Whether a weight is its numbers and nothing more, unlike a quantized or a distributed tensor."""
    return type(weight) in (nn.Parameter, Tensor) or isinstance(weight, _torch.TRACED)


def _plain_parameters(layer: Any) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of a layer that is ``F.linear`` by plain tensors, None for any other.

    Layers may have been exchanged, as LoRA and dynamic quantization do it, or have got weights of another kind.
    """
    own = layer._parameters
    weight = own.get("weight")
    if type(layer) is _Linear and type(weight) is _Parameter:
        return weight, own.get("bias")
    if type(layer) is not nn.Linear and not parametrize.is_parametrized(layer):
        return None
    if type(layer).forward is not nn.Linear.forward or (weight is None and watched(layer)):
        return None  # a hook that makes the weight, as that of nn.utils.weight_norm
    weight, bias = linear_parameters(layer)
    return (weight, bias) if plain(weight) else None


def watched(module: Any) -> bool:
    """Whether calling a module does more than its class's forward."""
    if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
        return True
    return bool(module._backward_hooks or module._backward_pre_hooks)


def expert_parameters(module: nn.Module) -> tuple[list[list[Tensor]], list[Any]] | None:
    """For each layer the weights and biases (or None) of ``module.experts``, read now, so that they are never stale.

    None where an expert is another module than it was made as.
    """
    rows = []
    for expert in module._modules["experts"]._modules.values():  # type: ignore[union-attr]
        if type(expert) is not Expert:
            return None
        row: list[Any] = []
        for layer in expert._modules["linears"]._modules.values():  # type: ignore[union-attr]
            own = layer._parameters  # type: ignore[union-attr]
            weight = own.get("weight")
            if type(layer) is _Linear and type(weight) is _Parameter:  # as _plain_parameters, without a call
                row.append((weight, own.get("bias")))
            else:
                row.append(_plain_parameters(layer))
        if None in row:
            return None
        rows.append(row)
    layers: list[Any] = list(zip(*rows, strict=True))
    return [[w for w, _ in layer] for layer in layers], [
        None if layer[0][1] is None else [b for _, b in layer] for layer in layers
    ]


def expert_slopes(experts: Any) -> dict[str, Any]:
    """What the op takes of the slopes of the experts' activation, which may have none."""
    modules: list[Any] = list(experts._modules.values())
    if modules[0].slopes is None:
        return {}
    return {"slopes": list(zip(*(expert.slopes for expert in modules), strict=True)), "dice_eps": DICE_EPS}


class Level(NotScriptable, nn.Module):
    """Experts and gates of one level: ``y_k = sum_e softmax(gate_k(x))_e * expert_e(x)``.

    The experts, batch norm and dropout included, and all mixing are one :func:`mtlkernels.expert_mixture`; the experts'
    modules are then not called, so hooks on them do not run. They are called, and their outputs mixed by
    :func:`mtlkernels.gated_mixture`, where they differ (some in training, a norm exchanged for another kind), where a
    layer or its weight is no longer a plain one (LoRA, quantization), where folding batch norm into weights that want
    gradients would take longer, and where a tracer can see nothing else.

    Args:
        in_features: D, the width of every input stream.
        expert_units: the width of each layer of an expert.
        gate_units: the width of each hidden layer of a gate; a last layer without bias gives the logits.
        routing: which expert reads which stream, and which gate mixes which experts.
        gate_inputs: the stream that each gate reads.
        style: activation, batch norm, dropout, device and dtype.
    """

    def __init__(
        self,
        in_features: int,
        expert_units: Sequence[int],
        gate_units: Sequence[int],
        routing: Routing,
        gate_inputs: Sequence[int],
        style: Style,
    ) -> None:
        super().__init__()
        self.routing = routing
        self.activation = style.activation
        self.batch_norm = style.batch_norm
        self.dropout = float(style.dropout)
        self.experts = nn.ModuleList(Expert(in_features, expert_units, style) for _ in range(routing.num_experts))
        self._sizes = [len(gate) for gate in routing.gate_experts]
        self._gate_inputs = tuple(gate_inputs)
        # Gates without hidden layers that all read one stream are rows of one matrix: a GEMM instead of K.
        self._one_gemm = not gate_units and len(set(gate_inputs)) == 1
        self.gates: nn.Module
        if self._one_gemm:
            self.gates = nn.Linear(in_features, sum(self._sizes), bias=False, **style.factory)
        else:
            self.gates = nn.ModuleList(_gate(in_features, gate_units, size, style) for size in self._sizes)

    def forward(self, inputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
        """One [B, D] that every expert and gate reads, or G of them → K tensors [B, H]."""
        streams = inputs if isinstance(inputs, (list, tuple)) else (inputs,)
        if _tracing.needs_plain(streams):
            return self._by_modules(streams)
        extras: dict[str, Any] = {}
        parameters = expert_parameters(self)
        if parameters is None:
            return self._by_modules(streams)
        if self.batch_norm or self.dropout > 0:
            found = self._norms_and_dropout(streams[0])
            if found is None:
                return self._by_modules(streams)
            extras = found
        extras |= expert_slopes(self._modules["experts"])
        weights, biases = parameters
        gates = self._gate_parameters(len(streams))
        logits = self._gate_logits(streams) if gates is None else None
        return expert_mixture(
            inputs, weights, biases, logits, self.routing, activation=self.activation, gate_weights=gates, **extras
        )

    def _norms_and_dropout(self, x: Tensor) -> dict[str, Any] | None:
        """What the op takes of the experts' norms and dropout; None where they have to run as modules."""
        experts: Any = self.experts
        rates = {expert.dropout.p if expert.dropout.training else 0.0 for expert in experts}
        layers = list(zip(*(list(expert.norms) for expert in experts), strict=True))
        if len(rates) > 1 or not all(alike(layer) for layer in layers):
            return None
        running = [layer for layer in layers if uses_running(layer[0])]
        if running and few_rows(x) and any(p.requires_grad for layer in running for m in layer for p in m.parameters()):
            return None
        return {"norms": layers or None, "dropout": rates.pop()}

    def _by_modules(self, streams: Sequence[Tensor]) -> tuple[Tensor, ...]:
        logits = self._gate_logits(streams)
        single = len(streams) == 1
        hidden = [
            expert(streams[0 if single else stream])
            for expert, stream in zip(self.experts, self.routing.expert_inputs, strict=True)
        ]
        return mix_list(hidden, logits, self.routing)

    def _gate_logits(self, streams: Sequence[Tensor]) -> Tensor | Sequence[Tensor]:
        if self._one_gemm:
            logits: Tensor = self.gates(streams[self._gate_inputs[0]])
            return logits
        gates: Any = self.gates
        return [gate(streams[stream]) for gate, stream in zip(gates, self._gate_inputs, strict=True)]

    def _gate_parameters(self, num_streams: int) -> Any:
        """The weights of gates that are linear layers to which nobody listens, else None."""
        gates: Any = self._modules["gates"]
        if self._one_gemm:
            # Of several streams all gates read one, which is not what the op's gates do.
            if num_streams > 1 or watched(gates):
                return None
            joint = _plain_parameters(gates)
            return None if joint is None or joint[1] is not None else joint[0]
        layers = list(gates._modules.values())
        if num_streams > 1 and self._gate_inputs != tuple(range(len(layers))):
            return None
        if any(type(layer) is not _Linear or watched(layer) for layer in layers):
            return None
        found = []
        for layer in layers:
            pair = _plain_parameters(layer)
            if pair is None or pair[1] is not None:  # they were made without biases
                return None
            found.append(pair[0])
        return found

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, batch_norm={self.batch_norm}, dropout={self.dropout}"


def _gate(in_features: int, hidden_units: Sequence[int], size: int, style: Style) -> nn.Module:
    """A gate: hidden layers as the experts have them, then a linear layer without bias."""
    if not hidden_units:
        return nn.Linear(in_features, size, bias=False, **style.factory)
    return nn.Sequential(
        Expert(in_features, hidden_units, style), nn.Linear(hidden_units[-1], size, bias=False, **style.factory)
    )
