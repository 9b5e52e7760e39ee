"""The operator ``level_serve``, which graphs hold where nobody wants gradients, and the graphs that hold it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtlkernels as mk
from mtlkernels import _backends, _extension
from mtlkernels.ops._folding import scale_and_shift
from mtlkernels.ops.activations import CODES
from mtlkernels.ops.level import serving
from mtlkernels.ops.level.spec import LAYER_NORM, Layer, LevelSpec
from mtlkernels.testing import assert_within_budget, poisoned_outputs
from tests import requires
from tests.seeding import seed

SERVE = torch.ops.mtlkernels.level_serve
ROUTING = mk.Routing((0, 1, 0), ((2, 0), (0, 1, 2)))
WIDTHS = (6, 37, 20)


def trained(norm: nn.BatchNorm1d) -> nn.BatchNorm1d:
    """A norm in evaluation whose statistics and parameters are not those that it was made with."""
    norm.running_mean.normal_()  # type: ignore[union-attr]
    norm.running_var.uniform_(0.3, 3)  # type: ignore[union-attr, operator]
    if norm.affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return norm.eval()


class Experts(nn.Module):
    """Three experts of two layers with batch norms under two gates, and the operator of the same.

    Args:
        linear: the gates are linear layers, one of them with a norm; otherwise they are given as logits, and only the
            first layer has norms.
        layer_norm: a third layer has layer norms.
    """

    def __init__(self, linear: bool, layer_norm: bool = False) -> None:
        super().__init__()
        self.linear = linear
        self.widths = (*WIDTHS, 9) if layer_norm else WIDTHS
        self.products = nn.ModuleList(
            nn.Linear(a, b, bias=(e, b) != (1, WIDTHS[1]))
            for a, b in zip(self.widths, self.widths[1:], strict=False)
            for e in range(3)
        )
        of_first = [trained(nn.BatchNorm1d(WIDTHS[1], affine=e > 0)) for e in range(3)]
        of_second = [trained(nn.BatchNorm1d(WIDTHS[2], eps=1e-2)) if linear else nn.Identity() for _ in range(3)]
        self.norms = nn.ModuleList([*of_first, *of_second, *(nn.LayerNorm(9) for _ in range(3 * layer_norm))])
        self.gates = nn.ModuleList([nn.Linear(6, 2), nn.Linear(6, 3, bias=False)])
        self.gate_norms = nn.ModuleList([trained(nn.BatchNorm1d(2)), nn.Identity()])
        self.requires_grad_(False)

    def logits(self, streams: Any) -> list[Tensor]:
        return [n(g(x)) for n, g, x in zip(self.gate_norms, self.gates, streams, strict=True)]

    def forward(self, *streams: Tensor) -> list[Tensor]:
        hidden = [streams[i] for i in ROUTING.expert_inputs]
        for at in range(0, len(self.products), 3):
            pairs = zip(self.products[at : at + 3], self.norms[at : at + 3], hidden, strict=True)
            hidden = [torch.relu(norm(linear(x))) for linear, norm, x in pairs]
        shares = [z.softmax(1) for z in self.logits(streams)]
        seen = [[hidden[e] for e in experts] for experts in ROUTING.gate_experts]
        return [sum(p[:, i, None] * y for i, y in enumerate(ys)) for p, ys in zip(shares, seen, strict=True)]  # type: ignore[misc]

    def operands(self, *streams: Tensor) -> tuple[Any, ...]:
        """Arguments of the operator."""
        weights, biases = ([getattr(linear, name) for linear in self.products] for name in ("weight", "bias"))
        rows, extra = [self.norms[:3], self.norms[3:6]], []
        relu = Layer(CODES["relu"])
        layers = [relu, relu]
        if len(self.widths) > len(WIDTHS):
            layers.append(Layer(CODES["relu"], LAYER_NORM, 1e-5))
            extra = [None] * 6 + [n.weight for n in self.norms[6:]] + [None] * 6 + [n.bias for n in self.norms[6:]]  # type: ignore[misc]
        folded: list[Any] = []
        for i, norms in enumerate(rows):
            if isinstance(norms[0], nn.BatchNorm1d):
                folded.append(scale_and_shift(biases[3 * i : 3 * i + 3], list(norms)))
                biases[3 * i : 3 * i + 3] = [None] * 3
        folded += [(None, None)] * (len(layers) - len(folded))
        gates: list[Any] = self.logits(streams)
        if self.linear:
            gates = [getattr(gate, name) for name in ("weight", "bias") for gate in self.gates]
            folded += [[t[0] for t in scale_and_shift([gates[2]], [self.gate_norms[0]])], (None, None)]
            gates[2] = None
        wiring = ROUTING.wiring
        inputs = (0, 1) if self.linear else ()
        spec = LevelSpec(2, wiring.expert_inputs, wiring.gate_experts, wiring.gate_sizes, tuple(layers), inputs)
        scales, shifts = map(list, zip(*folded, strict=True))
        ints, floats = map(list, spec.encoded)
        return list(streams), [*weights, *biases, *extra], gates, scales, shifts, ints, floats


KINDS = {"logits": (False, False), "linear gates": (True, False), "layer norms too": (False, True)}


def experts_and_rows(kind: str, dtype: torch.dtype, rows: int) -> tuple[Experts, list[Tensor]]:
    seed(rows)
    return Experts(*KINDS[kind]).to(dtype), [torch.randn(rows, 6).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("isa", [*_extension.instruction_sets(), "reference"])
@pytest.mark.parametrize("rows", [0, 1, 7, 40, 300])
@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_modules(kind: str, dtype: torch.dtype, rows: int, isa: str) -> None:
    experts, x = experts_and_rows(kind, dtype, rows)
    exact = {"outputs": copy.deepcopy(experts).double()(*(t.double() for t in x))}
    usual = {"outputs": experts(*x)}
    args = experts.operands(*x)
    if isa == "reference":
        found = serving.serve(*args)
    else:
        with _extension.instruction_set(isa), poisoned_outputs():
            found = SERVE(*args)
    assert_within_budget({"outputs": found}, exact, usual)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("low, rows", [(torch.float32, 5), (torch.bfloat16, 1), (torch.float64, 0)])
def test_opcheck(kind: str, low: torch.dtype, rows: int) -> None:
    experts, x = experts_and_rows(kind, low, rows)
    *lists, ints, floats = experts.operands(*x)
    torch.library.opcheck(SERVE, (*lists, ints, floats))
    leaves = [[None if t is None else t.clone().requires_grad_() for t in group] for group in lists]
    torch.library.opcheck(SERVE, (*leaves, ints, floats))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind: str) -> None:
    """Somebody may train what was exported to serve: through the norms, too."""
    experts, x = experts_and_rows(kind, torch.float64, 4)
    experts.requires_grad_(True)
    wanted = [*experts.parameters(), *(t.requires_grad_() for t in x)]

    def gradients(outputs: list[Tensor]) -> list[Tensor]:
        return list(torch.autograd.grad(sum((y * y).sum() for y in outputs), wanted))  # type: ignore[arg-type]

    expected = gradients(experts(*x))
    assert all(gradient.abs().sum() > 0 for gradient in expected)
    torch.testing.assert_close(gradients(SERVE(*experts.operands(*x))), expected)


def test_vmap() -> None:
    experts, _ = experts_and_rows("linear gates", torch.float64, 3)
    x = torch.randn(4, 3, 6, dtype=torch.float64)
    scales = torch.randn(4, 3, 37, dtype=torch.float64)

    def call(rows: Tensor, scale: Tensor) -> list[Tensor]:
        lists = experts.operands(rows, x[0])
        lists[3][0] = scale
        found: list[Tensor] = SERVE(*lists)
        return found

    for found, expected in zip(torch.func.vmap(call)(x, scales), zip(*map(call, x, scales), strict=True), strict=True):
        torch.testing.assert_close(found, torch.stack(expected))


def test_autocast() -> None:
    experts, x = experts_and_rows("linear gates", torch.float32, 20)
    with torch.autocast("cpu", torch.bfloat16):
        found = SERVE(*experts.operands(*x))
    inputs, parameters, gates, *static = experts.operands(*x)
    cast = [[None if t is None else t.bfloat16() for t in group] for group in (inputs, parameters, gates)]
    expected = SERVE(*cast, *static)
    assert [y.dtype for y in found] == [torch.bfloat16] * 2
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("run", [SERVE, serving.serve], ids=["operator", "reference"])
def test_refusals(run: Any) -> None:
    experts, x = experts_and_rows("linear gates", torch.float32, 2)
    inputs, parameters, gates, scales, shifts, *static = experts.operands(*x)
    few = "scales must hold an entry for each of 2 layers and 2 linear gates, got 3"
    with pytest.raises(ValueError, match=few):
        run(inputs, parameters, gates, scales[:-1], shifts, *static)
    with pytest.raises(ValueError, match=few.replace("scales", "shifts")):
        run(inputs, parameters, gates, scales, shifts[:-1], *static)
    alone = r"scales\[1\] and shifts\[1\] must both be there, or none of them"
    with pytest.raises(ValueError, match=alone):
        run(inputs, parameters, gates, scales, [shifts[0], None, *shifts[2:]], *static)
    with pytest.raises(ValueError, match=alone):
        run(inputs, parameters, gates, [scales[0], None, *scales[2:]], shifts, *static)
    with pytest.raises(ValueError, match=r"shifts\[0\] must have shape \[3, 37\], got \[37\]"):
        run(inputs, parameters, gates, scales, [shifts[0][0], *shifts[1:]], *static)
    with pytest.raises(ValueError, match=r"scales\[2\] must have shape \[2\], got \[1, 2\]"):
        run(inputs, parameters, gates, [*scales[:2], scales[2][None], None], shifts, *static)
    with pytest.raises(ValueError, match="the bias before a shift must be None, as that has it"):
        run(inputs, [*parameters[:6], torch.zeros(37), *parameters[7:]], gates, scales, shifts, *static)


@requires.cpp_kernels
def test_refusals_of_dtypes() -> None:
    experts, x = experts_and_rows("linear gates", torch.bfloat16, 2)
    inputs, parameters, gates, scales, shifts, *static = experts.operands(*x)
    with pytest.raises(TypeError, match=r"scales\[0\] must be a dense tensor of Float, got Strided of BFloat16"):
        SERVE(inputs, parameters, gates, [scales[0].bfloat16(), *scales[1:]], shifts, *static)


# Graphs -------------------------------------------------------------------------------------------------------------


def trunk(batch_norm: bool = True, levels: int = 2) -> mk.nn.PLE:
    seed(0)
    model = mk.nn.PLE(6, 2, (16, 8), num_specific=1, num_shared=2, num_levels=levels, batch_norm=batch_norm)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            trained(module)
    return model.eval()


def exported(model: nn.Module, x: Tensor) -> Any:
    return torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("rows", min=1)},))


def called(program: Any) -> set[tuple[str, bool]]:
    """The operators of this package, and whether they get the model's own weights."""
    nodes = [node for node in program.graph.nodes if "mtlkernels" in str(node.target)]
    return {(node.target.__name__, all(part is None or not part.args for part in node.args[1])) for node in nodes}


SERVES, FOLDS = ("level_serve.default", True), ("level_forward.default", False)


@requires.cpp_kernels
def test_a_graph_that_serves_takes_weights_as_they_are() -> None:
    model = trunk()
    with torch.no_grad():
        program = exported(model, torch.randn(5, 6))
        assert called(program) == {SERVES}
        module = program.module()
        for rows in (1, 5, 40):
            x = torch.randn(rows, 6)
            torch.testing.assert_close(module(x), model(x))
        for own in (module, model):  # what the graph makes of a norm it makes at each call
            for name, buffer in own.named_buffers():
                if name.endswith("running_mean"):
                    buffer.add_(1)
        torch.testing.assert_close(module(x), model(x))


def test_a_graph_that_may_be_trained_folds() -> None:
    model, x = trunk(), torch.randn(5, 6)
    program = exported(model, x)
    assert called(program) == {FOLDS}
    wanted = list(model.parameters())
    expected = torch.autograd.grad(sum(y.sum() for y in model(x)), wanted)
    names = [name for name, _ in model.named_parameters()]
    module = program.module()
    own = dict(module.named_parameters())
    found = torch.autograd.grad(sum(y.sum() for y in module(x)), [own[name] for name in names])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@requires.cpp_kernels
def test_graphs_of_frozen_models() -> None:
    """Nobody wants gradients there either, whatever the mode is."""
    model = trunk().requires_grad_(False)
    assert called(exported(model, torch.randn(5, 6))) == {SERVES}
    plain = trunk(batch_norm=False).requires_grad_(False)
    assert called(exported(plain, torch.randn(5, 6))) == {SERVES}


@pytest.mark.parametrize("inference", [torch.no_grad, torch.inference_mode])
def test_compiled(inference: Any) -> None:
    model = trunk(levels=1)
    compiled = torch.compile(model, dynamic=True, fullgraph=True, backend="aot_eager")
    with inference():
        for rows in (3, 40):
            x = torch.randn(rows, 6)
            torch.testing.assert_close(compiled(x), model(x))
    with inference(), torch.autocast("cpu", torch.bfloat16):
        found, expected = compiled(x), model(x)
    assert found[0].dtype == torch.bfloat16
    for y, z in zip(found, expected, strict=True):
        torch.testing.assert_close(y, z, rtol=0.05, atol=0.05)
    x = torch.randn(5, 6)
    gradients = [torch.autograd.grad(run(x)[0].sum(), next(model.parameters()))[0] for run in (model, compiled)]
    torch.testing.assert_close(*gradients)


def test_compiled_with_the_statistics_of_the_batch() -> None:
    model = trunk().train()
    x = torch.randn(9, 6)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    for found, expected in zip(compiled.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(found, expected)


def test_other_backends_fold() -> None:
    with torch.no_grad(), mk.use_backend("reference"):
        assert called(exported(trunk(), torch.randn(5, 6))) == set()
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(_backends, "has_cpp", lambda op: False)
        assert called(exported(trunk(), torch.randn(5, 6))) == {FOLDS}
