"""Losses that read some of a level's outputs: gradients of what these depend on, as of modules called one by one."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mtlkernels as mk
from mtlkernels.ops._random import dropout_factors
from mtlkernels.testing import assert_within_budget
from tests.ops.level.test_norms_pytorch import COMPILING

ROUTINGS = {
    "cgc": mk.Routing.cgc(2, 2, 1, shared_gate=True),
    "mmoe": mk.Routing.mmoe(3, 2),
    # A gate that sees a shared expert only, one whose experts nobody else sees, a stream that only one gate needs.
    "ragged": mk.Routing((2, 0, 1, 0), ((3,), (1, 0, 3), (2,))),
}
IN, WIDTHS = 5, (7, 4)


@dataclass(frozen=True)
class Kind:
    """What a level is made of."""

    norm: type | None = None
    activation: str = "silu"
    dropout: float = 0.0
    linear_gates: bool = False


KINDS = {
    "logits": Kind(),
    "linear gates": Kind(linear_gates=True, activation="relu"),
    "batch norm": Kind(nn.BatchNorm1d, linear_gates=True),
    "layer norm, dropout": Kind(nn.LayerNorm, dropout=0.4),
    "prelu, dropout": Kind(activation="prelu", dropout=0.3, linear_gates=True),
}


class Model:
    """A level of two layers; its tensors by name."""

    def __init__(self, routing: mk.Routing, kind: Kind, rows: int, dtype: torch.dtype, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.routing, self.kind, self.rows, self.dtype, self.seed = routing, kind, rows, dtype, seed

        def random(*shape: int) -> Tensor:
            values = torch.randn(shape, generator=generator).bfloat16()  # the same in every dtype
            return values.to(dtype).requires_grad_()

        experts, self.layers = range(routing.num_experts), range(len(WIDTHS))
        pairs = list(zip((IN, *WIDTHS), WIDTHS, strict=False))
        self.inputs = [random(rows, IN) for _ in range(routing.num_inputs)]
        self.weights = [[random(b, a) for _ in experts] for a, b in pairs]
        self.biases = [[random(b) for _ in experts] for _, b in pairs]
        self.norms = [[kind.norm(b, dtype=dtype) for _ in experts] for _, b in pairs] if kind.norm else None
        self.slopes = [[random(b if e % 2 else 1) for e in experts] for _, b in pairs]
        sizes = [len(gate) for gate in routing.gate_experts]
        self.gates = [random(size, IN) if kind.linear_gates else random(rows, size) for size in sizes]
        self.tensors: dict[str, Tensor] = {}
        sloped = {"slopes": self.slopes} if kind.activation == "prelu" else {}
        named = {
            "weights": self.weights,
            "biases": self.biases,
            **sloped,
            "inputs": [self.inputs],
            "gates": [self.gates],
        }
        for name, rows_of in named.items():
            self.tensors |= {f"{name}[{i}][{e}]": t for i, row in enumerate(rows_of) for e, t in enumerate(row)}
        for i, row in enumerate(self.norms or ()):
            self.tensors |= {
                f"norms[{i}][{e}].{n}": p for e, norm in enumerate(row) for n, p in norm.named_parameters()
            }

    def plain(self) -> list[Tensor]:
        torch.manual_seed(self.seed)
        seed = torch.randint(0, 2**63 - 1, (1,))
        hidden = []
        for e, stream in enumerate(self.routing.expert_inputs):
            x = self.inputs[stream]
            for i in self.layers:
                x = F.linear(x, self.weights[i][e], self.biases[i][e])
                x = x if self.norms is None else self.norms[i][e](x)
                x = (
                    F.prelu(x, self.slopes[i][e])
                    if self.kind.activation == "prelu"
                    else getattr(F, self.kind.activation)(x)
                )
                if self.kind.dropout:
                    x = x * dropout_factors(seed, i, (e,), (self.rows, x.shape[1]), self.kind.dropout, x.dtype)[0]
            hidden.append(x)
        logits = self.gates
        if self.kind.linear_gates:
            streams = self.inputs if len(self.inputs) > 1 else self.inputs * len(self.gates)
            logits = [F.linear(x, weight) for x, weight in zip(streams, self.gates, strict=False)]
        return [
            torch.einsum("be,beh->bh", z.softmax(1), torch.stack([hidden[e] for e in seen], 1))
            for z, seen in zip(logits, self.routing.gate_experts, strict=True)
        ]

    def fused(self) -> tuple[Tensor, ...]:
        if not torch.compiler.is_compiling():
            torch.manual_seed(self.seed)
        kind = self.kind
        options: dict[str, Any] = {"activation": kind.activation, "norms": self.norms, "dropout": kind.dropout}
        options |= {"slopes": self.slopes} if kind.activation == "prelu" else {}
        logits, options["gate_weights"] = (None, self.gates) if kind.linear_gates else (self.gates, None)
        inputs = self.inputs if len(self.inputs) > 1 else self.inputs[0]
        return mk.expert_mixture(inputs, self.weights, self.biases, logits, self.routing, **options)


def subsets(count: int) -> list[tuple[int, ...]]:
    return [used for n in range(1, count + 1) for used in itertools.combinations(range(count), n)]


def gradients(
    outputs: Any, used: tuple[int, ...], tensors: dict[str, Tensor], **options: Any
) -> dict[str, Tensor | None]:
    loss = sum(outputs[k].pow(3).sum() for k in used)
    found = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True, **options)
    return dict(zip(tensors, found, strict=True))


def by_kind(found: dict[str, Tensor | None]) -> dict[str, list[Tensor]]:
    """The gradients that there are, those of one kind of tensor together."""
    groups: dict[str, list[Tensor]] = {}
    for name, gradient in found.items():
        if gradient is not None:
            groups.setdefault(name.split("[")[0], []).append(gradient)
    return groups


def assert_as_none(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    assert {name for name, g in found.items() if g is None} == {name for name, g in expected.items() if g is None}


def assert_same(model: Any, dtype: torch.dtype, backend: str, used: tuple[int, ...]) -> None:
    """None for the same tensors, and errors within the budget that modules in the same dtype set."""
    exact, baseline, tested = model(torch.float64), model(dtype), model(dtype)
    with mk.use_backend(backend):
        found = gradients(tested.fused(), used, tested.tensors)
    expected, usual = (gradients(other.plain(), used, other.tensors) for other in (exact, baseline))
    assert_as_none(found, expected)
    assert_within_budget(*map(by_kind, (found, expected, usual)))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)
def test_every_subset_of_gates(routing: mk.Routing, kind: Kind, backend: str) -> None:
    for rows, dtype in ((9, torch.float64), (3, torch.float32), (70, torch.float32), (20, torch.bfloat16)):
        if dtype == torch.bfloat16 and kind.norm is not None:
            continue  # modules round between their steps
        for used in subsets(routing.num_gates):
            assert_same(functools.partial(Model, routing, kind, rows), dtype, backend, used)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_threads_share_what_is_reached(kind: Kind, backend: str) -> None:
    torch.set_num_threads(2)
    for rows in (4, 300, 700):
        for used in ((0,), (2,)):
            assert_same(functools.partial(Model, ROUTINGS["cgc"], kind, rows), torch.float32, backend, used)


@pytest.mark.parametrize("wanted", [("inputs",), ("weights",), ("biases",), ("gates",), ("inputs", "gates")], ids=str)
@pytest.mark.parametrize("kind", ["logits", "linear gates"])
def test_some_kinds_of_tensors(kind: str, wanted: tuple[str, ...], backend: str) -> None:
    """What the other tensors are: constants, of which no gradient is computed."""
    torch.set_num_threads(2)
    for rows in (1, 3, 70, 700):
        models = [Model(ROUTINGS["cgc"], KINDS[kind], rows, dtype) for dtype in (torch.float64, torch.float32) * 2]
        for model in models:
            for name, tensor in model.tensors.items():
                tensor.requires_grad_(name.startswith(wanted))
            model.tensors = {name: tensor for name, tensor in model.tensors.items() if tensor.requires_grad}
        exact, baseline, wide, tested = models
        usual = [gradients(m.plain(), (0, 1), m.tensors) for m in (exact, baseline)]
        with mk.use_backend(backend):
            found = [gradients(m.fused(), (0, 1), m.tensors) for m in (wide, tested)]
        assert_within_budget(*map(by_kind, (found[1], *usual)))
        assert_within_budget(*map(by_kind, (found[0], usual[0], usual[0])))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_second_derivatives(kind: Kind, backend: str) -> None:
    model = Model(ROUTINGS["ragged"], kind, 4, torch.float64)
    results = []
    for run in (model.fused, model.plain):
        with mk.use_backend(backend):
            first = gradients(run(), (0, 2), model.tensors, create_graph=True)
        loss = sum(g.square().sum() for g in first.values() if g is not None)
        second = torch.autograd.grad(loss, list(model.tensors.values()), allow_unused=True, materialize_grads=True)
        results.append(dict(zip(model.tensors, second, strict=True)))
    exact = {name: [t] for name, t in results[1].items()}
    assert_within_budget({name: [t] for name, t in results[0].items()}, exact, exact)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_gradcheck_with_undefined_outputs(kind: Kind) -> None:
    """Of the reference, which the others are compared with."""
    model = Model(ROUTINGS["ragged"], kind, 4, torch.float64)
    tensors = list(model.tensors.values())
    with mk.use_backend("reference"):
        for used in subsets(3):

            def outputs(*_: Tensor, used: tuple[int, ...] = used) -> tuple[Tensor, ...]:
                found = model.fused()
                return tuple(found[k] for k in used)

            assert torch.autograd.gradcheck(outputs, tensors, check_undefined_grad=True, fast_mode=True)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
class TestCompiled:
    pytestmark = COMPILING

    def test_unreached_parameters(self, kind: Kind, compiler: str) -> None:
        """Of a loss in the compiled code, what it does not reach has no gradient there either."""
        if compiler == "inductor" and kind is not KINDS["batch norm"]:
            pytest.skip("one kind is enough for Inductor, which takes long")
        model = Model(ROUTINGS["cgc"], kind, 6, torch.float32)

        def loss(used: tuple[int, ...]) -> Any:
            outputs = model.fused()
            return sum(outputs[k].pow(3).sum() for k in used)

        for used in ((0,), (1, 2)):
            torch.compiler.reset()
            compiled = torch.compile(loss, backend=compiler, fullgraph=True)(used)
            found = torch.autograd.grad(compiled, list(model.tensors.values()), allow_unused=True)
            exact = Model(ROUTINGS["cgc"], kind, 6, torch.float64)
            expected, usual = (gradients(other.plain(), used, other.tensors) for other in (exact, model))
            named = dict(zip(model.tensors, found, strict=True))
            assert_as_none(named, expected)
            if not kind.dropout:  # the compiler draws others
                assert_within_budget(*map(by_kind, (named, expected, usual)))
