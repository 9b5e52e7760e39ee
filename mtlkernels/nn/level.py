"""One level of a trunk: experts, gates and the wiring between them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtlkernels import _decisions, _extension, _torch, _tracing
from mtlkernels._dtensors import has_dtensor
from mtlkernels.nn._arguments import Style
from mtlkernels.nn._scripting import NotScriptable
from mtlkernels.ops import activations as act
from mtlkernels.ops._checks import refuse_training
from mtlkernels.ops._folding import uses_running
from mtlkernels.ops._fusing import (
    Experts,
    common,
    drop_rate,
    gate_weight,
    kind_of_norm,
    may_fold,
    plain_parameters,
    refuses,
    wants_gradient,
)
from mtlkernels.ops.gated_mixture import mix_list
from mtlkernels.ops.level import expert_mixture
from mtlkernels.ops.level.kept import KeptCalls
from mtlkernels.routing import Routing

# PyTorch's, and deepctr-torch's; torch-rechub draws that of Dice, whose eps is this.
_FIRST_SLOPE = {"prelu": 0.25, "dice": 0.0}
DICE_EPS = 1e-3
_NAMES = tuple(act.CODES)

# Attribute look-ups show when one row is served.
_Linear, _Parameter, _Dropout = nn.Linear, nn.Parameter, nn.Dropout


class Slopes(nn.ParameterList):
    """The slopes of an expert's activations, one [1] a layer; unlike a list of parameters it can be called.

    It is called where somebody listens to it: TorchJD's autogram, which finds parameters by hooks on modules.
    """

    __call__ = nn.Module.__call__

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [B, D] → for each layer [B, 1], its slope for each row."""
        return tuple(slope.expand(x.shape[0], 1) for slope in self)


class Expert(nn.Module):
    """An MLP, [Linear → (BatchNorm1d) → activation → (Dropout)] a layer; also the hidden layers of a gate.

    ``linears.{i}`` and ``norms.{i}`` hold the parameters of layer i, ``slopes.{i}`` [1] the slope of its activation if
    that learns one. A layer with batch norm has no bias of its own.
    """

    slopes: Slopes | None

    def __init__(self, in_features: int, units: Sequence[int], style: Style) -> None:
        super().__init__()
        widths = (in_features, *units)
        self.linears = nn.ModuleList(
            nn.Linear(a, b, bias=not style.batch_norm, **style.factory)
            for a, b in zip(widths[:-1], widths[1:], strict=True)
        )
        self.norms = nn.ModuleList(nn.BatchNorm1d(n, **style.factory) for n in units if style.batch_norm)
        self.dropout = nn.Dropout(float(style.dropout))
        self._code = act.CODES[style.activation]
        self.slopes = None
        if act.has_slopes(self._code):
            first = _FIRST_SLOPE[style.activation]
            self.slopes = Slopes(torch.full((1,), first, **style.factory) for _ in units)

    def forward(self, x: Tensor) -> Tensor:
        """[B, D] → [B, H]."""
        slopes: Any = self.slopes
        if slopes is not None and slopes._forward_hooks:
            slopes = slopes(x)
        for i, linear in enumerate(self.linears):
            x = linear(x)
            if self.norms:
                x = self.norms[i](x)
            x = self.dropout(self._activate(x, None if slopes is None else slopes[i]))
        return x

    def _activate(self, x: Tensor, slope: Any) -> Tensor:
        learned = self._code == act.PRELU
        if learned and type(x) is Tensor and x.dim() == 2 and slope.dim() == 1 and slope.dtype is x.dtype:
            return F.prelu(x, slope)  # which takes these alone, in one operator
        return act.activate(self._code, x, slope, DICE_EPS)


def read_experts(experts: Any, bare_alone: bool = False) -> tuple[Experts, bool] | None:
    """What the op takes of experts but for norms and dropout, read now, and whether there are none of these that act.

    None where the experts have to be called: where one is not what it was made as, or not like the others, or where
    gradients are recorded and somebody listens by a forward hook, as TorchJD's autogram does; with ``bare_alone``
    perhaps also where there are norms or dropout that act. In serving nobody looks for hooks: the look-ups show when
    one row is served.
    """
    modules = experts._modules.values()
    heard = torch.is_grad_enabled()
    linears = None
    if _extension.has_module() and not _torch.compiling():
        linears = _extension.function("linears")(experts._modules, Expert, _Linear, _Parameter, _Dropout, heard)
    linears = linears or _linears(modules, heard, bare_alone)
    if linears is None:
        return None
    weights, biases, bare = linears
    first = next(iter(modules))
    options: dict[str, Any] = {"activation": _NAMES[first._code]}
    if first.slopes is not None:
        if heard and any(expert.slopes._forward_hooks for expert in modules):
            return None
        options.update(slopes=list(zip(*(expert.slopes for expert in modules), strict=True)), dice_eps=DICE_EPS)
    return (weights, biases, options), bare


def _linears(
    modules: Iterable[Any], heard: bool, bare_alone: bool = False
) -> tuple[list[list[Tensor]], list[Any], bool] | None:
    """Weights and biases by layer, then expert, and whether experts are bare; None where one has to be called.

    C++ does the same for plain ones, ``csrc/linears.cpp``.
    """
    by_expert: list[Any] = []
    bare, code = True, None
    for expert in modules:
        if type(expert) is not Expert or (heard and expert._forward_hooks):
            return None
        if by_expert and expert._code != code:
            return None
        code = expert._code
        parts: Any = expert._modules
        layers = parts["linears"]._modules.values()
        if any("forward" in part.__dict__ for part in (expert, *layers)):
            return None
        if any(refuses(layer) or (heard and layer._forward_hooks) for layer in layers):
            return None
        norms = parts["norms"]._modules.values()
        bare = bare and not norms and _rate(parts["dropout"]) == 0
        if (bare_alone and not bare) or any(kind_of_norm(norm) is None for norm in norms):
            return None
        by_expert.append(layers)
    lacking = [[_lacks_bias(layer) for layer in layers] for layers in by_expert]
    if any(each != lacking[0] for each in lacking):
        return None
    # Last, as a parametrization may do something each time: spectral_norm in training, one that draws random numbers.
    rows = [[plain_parameters(layer) for layer in layers] for layers in by_expert]
    if any(None in row for row in rows):
        return None
    found: list[Any] = list(zip(*rows, strict=True))
    for (weight, bias), *others in found:
        if any(w.shape != weight.shape or (b is None) != (bias is None) for w, b in others):
            return None
    weights = [[w for w, _ in layer] for layer in found]
    return weights, [None if layer[0][1] is None else [b for _, b in layer] for layer in found], bare


def _lacks_bias(layer: Any) -> bool:
    return layer._parameters.get("bias", layer) is None


def _rate(dropout: Any) -> float | None:
    """The rate at which an expert drops now; None where its dropout was exchanged for something else."""
    if type(dropout) is nn.Identity:
        return 0.0
    return drop_rate(dropout) if type(dropout) is _Dropout and "forward" not in dropout.__dict__ else None


class TrunkLevel(NotScriptable, nn.Module):
    """Experts and gates of one level: ``y_k = sum_e softmax(gate_k(x))_e * expert_e(x)``.

    The experts, batch norm and dropout included, and all mixing are one :func:`mtlkernels.expert_mixture`; the experts'
    modules are then not called. They are called, and their outputs mixed by :func:`mtlkernels.gated_mixture`, where
    gradients are recorded and one of them, or a part of one with parameters, has a forward hook, where they differ
    (some in training, a norm exchanged for another kind), where a layer or its weight is no longer a plain one (LoRA,
    quantization, a ``forward`` of its own), where folding batch norm into weights that want gradients would take
    longer, and where a tracer can see nothing else.

    Args:
        in_features: D, the width of every input stream.
        expert_units: the width of each layer of an expert.
        gate_units: the width of each hidden layer of a gate; a last layer without bias gives the logits.
        routing: which expert reads which stream, and which gate mixes which experts.
        gate_inputs: the stream that each gate reads.
        style: activation, batch norm, dropout, device and dtype.
    """

    _serves_only = False

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
        self._calls = KeptCalls()
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
        streams: Any = inputs if isinstance(inputs, (list, tuple)) else (inputs,)
        if self._serves_only and self.training:
            refuse_training()
        compiles = _torch.compiling()
        outputs = None if compiles else self._calls.serve_trunk(self, inputs)
        if outputs is not None:
            return outputs
        calls = None if compiles or not KeptCalls.may_serve(streams[0] if streams else None) else self._calls
        if calls is None and _tracing.needs_plain(streams):
            return self._by_modules(streams)
        by_modules = self.batch_norm or self.dropout > 0
        roots: Any = (self._modules["experts"], self._modules["gates"], *self._settings()) if by_modules else None
        outputs = None if calls is None else calls.serve(roots, inputs)
        if outputs is not None:
            return outputs
        experts = self._read_experts(streams[0])
        if experts is None:
            reason = (
                "experts have hooks, differ from each other, or hold layers that are not plain ones, or their norms'"
                " statistics are folded, which pays on many rows where gradients are recorded"
            )
            _decisions.note("mtlkernels.nn", "experts as modules", reason, streams[0])
            return self._by_modules(streams)
        weights, biases, options = experts
        gates = None if "slopes" in options else self._gate_weights(len(streams))  # kernels for slopes take logits
        if calls is not None and gates is not None and calls.wants():
            if by_modules:
                calls.keep(roots, inputs, weights, biases, self.routing, {"gate_weights": gates}, options)
            else:
                name = options["activation"]
                calls.keep_trunk(self, Expert, name, inputs, weights, biases, self.routing, gates)
        logits = None
        if gates is None:
            logits, inputs = self._gate_logits(streams), self._for_experts(inputs)
        return expert_mixture(inputs, weights, biases, logits, self.routing, gate_weights=gates, **options)

    def served(self, inputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...] | None:
        """What a call of this module would return, where that is kept and no hook is to run; otherwise None.

        A module's call takes a microsecond of its own.
        """
        if _torch.compiling() or (self._serves_only and self.training):
            return None
        return self._calls.serve_trunk(self, inputs, uncalled=True)

    def _settings(self) -> tuple[Any, ...]:
        """What a call depends on beside modules."""
        routing = self.routing
        return self.activation, self.dropout, self._gate_inputs, routing.expert_inputs, routing.gate_experts

    def _read_experts(self, x: Tensor) -> Experts | None:
        """What the op takes of the experts, norms and dropout included; None where they have to run as modules."""
        experts = _torch.unproxied(self._modules["experts"])
        read = read_experts(experts)
        if read is None:
            return None
        found, bare = read
        if bare:
            return found
        weights, _, options = found
        parts = [expert._modules for expert in experts._modules.values()]
        rates = {_rate(part["dropout"]) for part in parts}
        by_expert = [part["norms"]._modules.values() for part in parts]
        if any(len(norms) not in (0, len(weights)) or len(norms) != len(by_expert[0]) for norms in by_expert):
            return None
        norms = list(zip(*by_expert, strict=True))
        kinds = [common([kind_of_norm(norm) for norm in layer]) for layer in norms]
        if len(rates) > 1 or None in rates or None in kinds:
            return None
        each = [norm for layer in norms for norm in layer]
        # An expert that stands there twice has one set of statistics. By hash: the compiler would guard each id.
        if len(set(each)) < len(each):
            return None
        if torch.is_grad_enabled() and any(norm._forward_hooks for norm in each):
            return None
        # Weights that a parametrization has computed are taken: it may do something each time.
        as_they_are = (isinstance(weight, _Parameter) for layer in weights for weight in layer)
        if (
            not may_fold(x, 0)
            and all(as_they_are)
            and any(
                uses_running(norm)
                and not may_fold(x, weight.numel())
                and (x.requires_grad or wants_gradient(weight, None, norm))
                for layer in zip(weights, norms, strict=False)
                for weight, norm in zip(*layer, strict=True)
            )
        ):
            return None
        options.update(norms=norms or None, dropout=rates.pop())
        return found

    def _by_modules(self, streams: Sequence[Tensor]) -> tuple[Tensor, ...]:
        logits = self._gate_logits(streams)
        single = len(streams) == 1
        hidden = [
            expert(streams[0 if single else stream])
            for expert, stream in zip(self.experts, self.routing.expert_inputs, strict=True)
        ]
        apart = not _torch.compiling() and has_dtensor(self.experts.parameters())
        return mix_list(hidden, logits, self.routing, apart=apart)

    def _gate_logits(self, streams: Sequence[Tensor]) -> Tensor | Sequence[Tensor]:
        if self._one_gemm:
            logits: Tensor = self.gates(streams[self._gate_inputs[0]])
            return logits
        gates: Any = self.gates
        return [gate(streams[stream]) for gate, stream in zip(gates, self._gate_inputs, strict=True)]

    def _for_experts(self, inputs: Any) -> Any:
        """The inputs, but for streams that gates alone read: the operator, which does not, would give them zeros."""
        read = set(self.routing.expert_inputs)
        if isinstance(inputs, Tensor) or len(read) == len(inputs) or not torch.is_grad_enabled():
            return inputs
        return [x if stream in read else x.detach() for stream, x in enumerate(inputs)]

    def _gate_weights(self, num_streams: int) -> Any:
        """The weights of gates that are linear layers to which nobody listens, else None."""
        gates = _torch.unproxied(self._modules["gates"])
        if self._one_gemm:
            # Of several streams all gates read one, which is not what the op's gates do.
            return gate_weight(gates) if num_streams == 1 else None
        if num_streams > 1 and self._gate_inputs != tuple(range(len(self._gate_inputs))):
            return None
        weights = []
        for gate in gates._modules.values():
            weight = gate_weight(gate)
            if weight is None:
                return None
            weights.append(weight)
        return weights

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, batch_norm={self.batch_norm}, dropout={self.dropout}"


def _gate(in_features: int, hidden_units: Sequence[int], size: int, style: Style) -> nn.Module:
    """A gate: hidden layers as the experts have them, then a linear layer without bias."""
    if not hidden_units:
        return nn.Linear(in_features, size, bias=False, **style.factory)
    return nn.Sequential(
        Expert(in_features, hidden_units, style), nn.Linear(hidden_units[-1], size, bias=False, **style.factory)
    )
