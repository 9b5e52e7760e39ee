"""Cases of ``expert_mixture``: a level with norms, dropout, slopes and gate layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

import mtlkernels as mk
from mtlkernels.ops import activations as act
from mtlkernels.testing import Case, tensors_in
from tests.fuzz import calls, routings, tensors
from tests.fuzz.calls import Meaning, Way  # noqa: F401  (the case's repr names it)
from tests.fuzz.mixture_cases import by_softmax
from tests.fuzz.routings import Wires
from tests.ops.agreement import reference_op
from tests.ops.level import normalized
from tests.ops.level.definition import formula
from tests.seeding import seed

GATES = ("logits", "joined logits", "layers", "stacked layers")
NORMS = ("none", "none", "batch", "running", "layer")
SERVED = {"batch": "running"}


@dataclass(frozen=True)
class Layer:
    """A layer of every expert; ``slopes`` are one an expert or one a channel, where the activation has any."""

    width: int
    activation: str = "relu"
    bias: bool = True
    norm: str = "none"
    affine: bool = True
    eps: float = 1e-2
    one_slope: bool = False
    dropout: float = 0.0


@dataclass(frozen=True)
class LevelCase(tensors.CallCase):
    """A call of ``expert_mixture``."""

    rows: int
    inputs: int
    layers: tuple[Layer, ...]
    routing: Wires
    gates: str = "logits"
    one_input: bool = False
    stacked: bool = False


@st.composite
def _layers(draw: st.DrawFn, normal: bool) -> Layer:
    """Where ``normal``, one of a level that has norms of a batch, dropout or slopes."""
    names = st.sampled_from(list(act.CODES) if normal else [name for name in act.CODES if name not in act.WITH_SLOPES])
    return Layer(
        width=draw(tensors.widths if normal else tensors.widths_or_none),
        activation=draw(names),
        bias=draw(st.booleans()),
        norm=draw(st.sampled_from(NORMS)) if normal else "none",
        affine=draw(st.booleans()),
        eps=draw(st.sampled_from((1e-2, 1.0, 1e-5))),
        one_slope=draw(st.booleans()),
        dropout=draw(st.sampled_from((0.0, 0.0, 0.1, 0.5, 1.0))) if normal else 0.0,
    )


@st.composite
def _cases(draw: st.DrawFn) -> LevelCase:
    normal = draw(st.booleans())
    layers = tuple(draw(st.lists(_layers(normal), min_size=1, max_size=3)))
    routing, rows, gates = draw(routings.wires), draw(tensors.rows), draw(st.sampled_from(GATES))
    of_batch = any(layer.norm == "batch" for layer in layers)
    # A linear gate reads the stream of its number, or the only one.
    one_input = draw(st.booleans()) or ("layers" in gates and 1 + max(routing.streams) != len(routing.gates))
    fields = tensors.call(draw, "expert_mixture", len(routing.gates), "prepared", "graph", "again")
    if fields["way"].mode == "graph":  # of a level that serves
        layers = tuple(replace(own, norm=SERVED.get(own.norm, own.norm), dropout=0.0) for own in layers)
    if normal:  # of rows that repeat each other nothing that a spread divides would be determined
        fields.update(layouts=draw(tensors.spread_layouts), special="")
    if fields["special"] and any(layer.activation == "gelu" for layer in layers):
        fields["special"] = "nan"  # of the gelu of +Inf PyTorch's own kernels make different things
    return LevelCase(
        rows=max(rows, 2) if of_batch else rows,
        inputs=draw(tensors.widths if normal else tensors.widths_or_none),
        layers=layers,
        routing=routing,
        gates=gates,
        one_input=one_input,
        stacked=draw(st.booleans()),
        **fields,
    )


CASES: st.SearchStrategy[LevelCase] = _cases()


def arguments_of(case: LevelCase) -> Case:
    """The arguments of :func:`normalized.fused`."""
    make = case.maker()
    routing, layers = case.routing.routing(), case.layers
    made = make.expert_mixture(
        case.rows,
        [case.inputs, *(layer.width for layer in layers)],
        routing,
        activation=[layer.activation for layer in layers],
        biases=[layer.bias for layer in layers],
        streams=not case.one_input,
        stacked=case.stacked,
        joined_logits=case.gates == "joined logits",
    )
    experts = range(routing.num_experts)

    def of_layers(wanted: Any, one: Any) -> list[Any]:
        """An entry a layer: None, or a tensor an expert."""
        return [[one(layer) for _ in experts] if wanted(layer) else None for layer in layers]

    def affine(layer: Layer) -> bool:
        return layer.norm != "none" and layer.affine

    def running(layer: Layer) -> bool:
        return layer.norm == "running"

    arguments = {
        **made.arguments,
        "kinds": ["batch" if running(layer) else layer.norm for layer in layers],
        "eps": [layer.eps for layer in layers],
        "scales": of_layers(affine, lambda layer: make.leaf(layer.width)),
        "shifts": of_layers(affine, lambda layer: make.leaf(layer.width)),
        "means": of_layers(running, lambda layer: make.leaf(layer.width, requires_grad=False)),
        "variances": of_layers(running, lambda layer: make.leaf(layer.width, requires_grad=False).abs_().add_(0.5)),
        "slopes": of_layers(
            lambda layer: layer.activation in act.WITH_SLOPES,
            lambda layer: make.leaf(1 if layer.one_slope else layer.width),
        ),
        "dice_eps": [1e-3] * len(layers),
        "dropout": [layer.dropout for layer in layers],
    }
    if "layers" in case.gates:
        arguments.update(_gate_layers(make, case))
    return Case(arguments, make.dtype)


def _gate_layers(make: tensors.Maker, case: LevelCase) -> dict[str, Any]:
    sizes, scale = [len(gate) for gate in case.routing.gates], max(case.inputs, 1) ** -0.5
    if case.gates == "stacked layers":
        weights: Any = make.leaf(sum(sizes), case.inputs, scale=scale)
        biases: Any = make.leaf(sum(sizes)) if make.rng.random() < 0.5 else None
    else:
        weights = [make.leaf(size, case.inputs, scale=scale) for size in sizes]
        biases = [make.leaf(size) if make.rng.random() < 0.7 else None for size in sizes]
    return {"gate_logits": None, "gate_weights": weights, "gate_biases": biases}


def _logits(gate_logits: Any, gate_weights: Any, gate_biases: Any, inputs: Any, routing: mk.Routing) -> list[Tensor]:
    """Those of each gate."""
    sizes = [len(gate) for gate in routing.gate_experts]
    if gate_weights is None:
        return routings.split(gate_logits, routing) if isinstance(gate_logits, Tensor) else gate_logits
    streams = [inputs] * len(sizes) if isinstance(inputs, Tensor) else inputs * len(sizes)
    if isinstance(gate_weights, Tensor):
        gate_weights = gate_weights.split(sizes)
        gate_biases = None if gate_biases is None else gate_biases.split(sizes)
    of_gates = zip(streams, gate_weights, gate_biases or [None] * len(sizes), strict=False)
    return [F.linear(*own) for own in of_gates]


def by_pytorch(
    *, gate_logits: Any, routing: mk.Routing, gate_weights: Any = None, gate_biases: Any = None, **arguments: Any
) -> Sequence[Tensor]:
    """PyTorch's own layers one after another, gates among them, each gate by itself."""
    logits = _logits(gate_logits, gate_weights, gate_biases, arguments["inputs"], routing)
    experts = normalized.experts_by_pytorch(routing=routing, **arguments)
    return by_softmax(experts, logits, routing)


class _Holder(nn.Module):
    """A module that calls the op with its own parameters, as :func:`mtlkernels.prepare` wants them."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.rest = {name: value for name, value in arguments.items() if name != "weights"}
        self.of_layers = nn.ModuleList([nn.ParameterList([nn.Parameter(w) for w in ws]) for ws in arguments["weights"]])

    def forward(self) -> Any:
        return normalized.fused(weights=[list(layer) for layer in self.of_layers], **self.rest)  # type: ignore[call-overload]


def prepared(**arguments: Any) -> Any:
    """The third call of a prepared copy, which then has the weights in the form that the kernels want."""
    copy = mk.prepare(_Holder(arguments))
    return [copy() for _ in range(3)][-1]


def in_graph(**arguments: Any) -> Any:
    """What a graph of the compiler computes, which has norms by running statistics outside of weights."""
    torch.compiler.reset()
    made = normalized.with_modules(**arguments)
    seed(normalized.SEED)
    return torch.compile(lambda: mk.expert_mixture(**made), backend="eager", fullgraph=True, dynamic=False)()


def again(**arguments: Any) -> Any:
    """The fourth call by the same lists, of which what was read is kept by then."""
    return [normalized.fused(**arguments) for _ in range(4)][-1]


# The modes of a way that call something else than the op once.
OTHERS = {"prepared": prepared, "graph": in_graph, "again": again}


def by_reference(**arguments: Any) -> Any:
    return reference_op(normalized.fused, **arguments)


def check(case: LevelCase) -> None:
    """Outputs and gradients against the formula; in its special values against PyTorch.

    Raises:
        AssertionError: what is wrong.
    """
    made = arguments_of(case)
    op = OTHERS.get(case.way.mode, normalized.fused)
    if case.special:
        places = list(tensors_in(list(made.arguments.values())))
        make = case.maker()
        make.put(case.special, make.rng.choice(places))
        calls.check_special(op, by_pytorch, made, case.way, case.used)
        return
    normal = any(layer.norm != "none" for layer in case.layers)
    baseline = by_pytorch if case.way.implementation == "reference" else by_reference
    meaning = Meaning(formula, baseline, normalized.FACTOR if normal else 3.0)
    calls.check(op, meaning, made, case.way, case.used)
