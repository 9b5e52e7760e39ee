"""mk.nn.MMoE, CGC and PLE against the same models written with a loop over experts."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mtlkernels as mk
from mtlkernels.ops import _fusing
from tests.ops.level.definition import dice, kept

B, D, UNITS, GATE_UNITS = 13, 10, (9, 6), (5,)
ACTIVATIONS = {
    "none": lambda x: x,
    "relu": torch.relu,
    "leaky_relu": F.leaky_relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


class Plain:
    """A trunk's definition over its parameters by name: every expert and gate on its own, stacked and mixed."""

    def __init__(self, trunk: nn.Module) -> None:
        self.trunk = trunk
        self.state = {
            name: tensor.detach().clone().requires_grad_(name in dict(trunk.named_parameters()))
            for name, tensor in trunk.state_dict().items()
        }

    def mlp(self, prefix: str, x: Tensor, key: int | None = None, expert: int = 0, **style: Any) -> Tensor:
        """With ``key``, dropout's masks are those of an expert of the fused operator."""
        layer = 0
        while f"{prefix}.linears.{layer}.weight" in self.state:
            x = F.linear(
                x, self.state[f"{prefix}.linears.{layer}.weight"], self.state.get(f"{prefix}.linears.{layer}.bias")
            )
            norm = f"{prefix}.norms.{layer}"
            if f"{norm}.weight" in self.state:
                mean, var = self.state[f"{norm}.running_mean"], self.state[f"{norm}.running_var"]
                scale, shift = self.state[f"{norm}.weight"], self.state[f"{norm}.bias"]
                x = F.batch_norm(x, mean, var, scale, shift, training=self.trunk.training)
            x = self.activated(style["activation"], x, self.state.get(f"{prefix}.slopes.{layer}"))
            if key is None:
                x = F.dropout(x, style["dropout"], self.trunk.training)
            else:
                rate = style["dropout"]
                x = x * kept(key, layer, expert, *x.shape, rate=rate) / (1 - rate)
            layer += 1
        return x

    @staticmethod
    def activated(name: str, x: Tensor, slope: Tensor | None) -> Tensor:
        if slope is None:
            return ACTIVATIONS[name](x)
        return F.prelu(x, slope) if name == "prelu" else dice(x, slope, 1e-3)

    def gate(self, level: str, number: int, sizes: list[int], x: Tensor, **style: Any) -> Tensor:
        joint = self.state.get(f"{level}.gates.weight")
        if joint is not None:
            return F.linear(x, joint.split(sizes)[number])
        own = self.state.get(f"{level}.gates.{number}.weight")
        if own is not None:
            return F.linear(x, own)
        hidden = self.mlp(f"{level}.gates.{number}.0", x, **style)
        return F.linear(hidden, self.state[f"{level}.gates.{number}.1.weight"])

    def level(
        self, name: str, streams: list[Tensor], reads: list[int], gates: list[list[int]], **style: Any
    ) -> list[Tensor]:
        sizes = [len(gate) for gate in gates]
        logits = [self.gate(name, k, sizes, streams[k], **style) for k in range(len(gates))]
        drops = style["dropout"] > 0 and self.trunk.training
        key = int(torch.randint(0, 2**63 - 1, (1,))) if drops else None
        experts = [self.mlp(f"{name}.experts.{e}", streams[stream], key, e, **style) for e, stream in enumerate(reads)]
        stacked = [torch.stack([experts[e] for e in gate], 1) for gate in gates]
        return [
            (torch.softmax(weight, 1).unsqueeze(2) * seen).sum(1) for weight, seen in zip(logits, stacked, strict=True)
        ]


def ple_wiring(specific: list[int], shared: int, shared_gate: bool) -> tuple[list[int], list[list[int]]]:
    reads = [task for task, count in enumerate(specific) for _ in range(count)] + [len(specific)] * shared
    everyone = [e for e, stream in enumerate(reads) if stream == len(specific)]
    gates = [[e for e, stream in enumerate(reads) if stream == task] + everyone for task in range(len(specific))]
    return reads, gates + [list(range(len(reads)))] * shared_gate


def plain_forward(plain: Plain, kind: str, x: Tensor, style: dict[str, Any]) -> list[Tensor]:
    if kind == "mmoe":
        return plain.level("level", [x] * 3, [0] * 4, [list(range(4))] * 3, **style)
    specific, shared, levels = {"cgc": ([2, 2], 3, 1), "ple": ([1, 2], 2, 3), "ple-unshared": ([2, 2, 2], 0, 2)}[kind]
    streams = [x] * (len(specific) + 1)
    for number in range(levels):
        name = "level" if kind == "cgc" else f"levels.{number}"
        wiring = ple_wiring(specific, shared, shared_gate=shared > 0 and number < levels - 1)
        streams = plain.level(name, streams, *wiring, **style)
    return streams


def build(kind: str, **options: Any) -> nn.Module:
    if kind == "mmoe":
        return mk.nn.MMoE(D, 3, UNITS, 4, **options)
    if kind == "cgc":
        return mk.nn.CGC(D, 2, UNITS, 2, 3, **options)
    if kind == "ple":
        return mk.nn.PLE(D, 2, UNITS, [1, 2], 2, 3, **options)
    return mk.nn.PLE(D, 3, UNITS, 2, 0, 2, **options)


KINDS = ("mmoe", "cgc", "ple", "ple-unshared")
STYLES = {
    "plain": {},
    "gate units": {"gate_units": GATE_UNITS, "activation": "silu"},
    "batch norm": {"batch_norm": True, "activation": "tanh"},
    "dropout": {"dropout": 0.3, "gate_units": GATE_UNITS},
    "slopes": {"activation": "dice", "gate_units": GATE_UNITS},
    "slopes, batch norm and dropout": {"activation": "prelu", "batch_norm": True, "dropout": 0.3},
}


def assert_same(trunk: nn.Module, plain: Plain, kind: str, style: dict[str, Any], tolerance: float) -> None:
    """Outputs, gradients of the input and of every parameter, and running statistics."""
    dtype = next(trunk.parameters()).dtype
    x = torch.randn(B, D, dtype=dtype, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    style = {"activation": "relu", "dropout": 0.0, **style}
    torch.manual_seed(1)
    found = trunk(x)
    torch.manual_seed(1)
    expected = plain_forward(plain, kind, y, style)
    assert isinstance(found, tuple)
    assert len(found) == len(expected)
    weights = [torch.randn_like(t) for t in expected]
    sum((a * w).sum() for a, w in zip(found, weights, strict=True)).backward()
    sum((a * w).sum() for a, w in zip(expected, weights, strict=True)).backward()
    pairs = {f"output {t}": pair for t, pair in enumerate(zip(found, expected, strict=True))}
    pairs["input"] = (x.grad, y.grad)
    for name, tensor in trunk.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            reference = plain.state[name]
            pairs[name] = (tensor.grad, reference.grad) if tensor.requires_grad else (tensor, reference)
    for name, (a, b) in pairs.items():
        assert a is not None and b is not None, name
        assert (a - b).abs().max() <= tolerance * max(1.0, b.abs().max().item()), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", STYLES.values(), ids=STYLES)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_agrees_with_a_loop_over_experts(kind: str, options: dict[str, Any], training: bool) -> None:
    trunk = build(kind, dtype=torch.float64, **options).train(training)
    style = {name: value for name, value in options.items() if name in ("activation", "dropout")}
    assert_same(trunk, Plain(trunk), kind, style, tolerance=1e-11)


@pytest.mark.parametrize("activation", [*ACTIVATIONS, "prelu", "dice"])
def test_every_activation_in_float32(activation: str) -> None:
    trunk = build("ple", activation=activation)
    assert_same(trunk, Plain(trunk), "ple", {"activation": activation}, tolerance=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_level_is_one_expert_mixture(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append("fused")
        return mk.expert_mixture(*args, **kwargs)

    monkeypatch.setattr("mtlkernels.nn.level.expert_mixture", counted)
    levels = {"mmoe": 1, "cgc": 1, "ple": 3, "ple-unshared": 2}[kind]
    x = torch.randn(B, D)
    for options, training, expected in (
        ({}, True, levels),
        ({"dropout": 0.5}, True, levels),
        ({"dropout": 0.5}, False, levels),
        ({"batch_norm": True}, True, levels),
    ):
        calls.clear()
        build(kind, **options).train(training)(x)
        assert len(calls) == expected, (options, training)


@pytest.mark.parametrize("rows, fuses", [(200, True), (20, False)])
def test_batch_norm_in_evaluation(rows: int, fuses: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folded, unless gradients are wanted for few rows; for more of them where layers have few weights."""
    if fuses:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(TypeError, match="NoneType"):
            patch.setattr(nn.BatchNorm1d, "forward", None)
            build("mmoe", batch_norm=True, dtype=torch.float64).eval()(torch.randn(rows, D, dtype=torch.float64))
    monkeypatch.setattr(_fusing, "SMALL", 0)
    trunk = build("mmoe", batch_norm=True, dtype=torch.float64)
    x = torch.randn(rows, D, dtype=torch.float64)
    trunk(x)
    trunk.eval()
    expected = [y.detach() for y in trunk(x)]
    monkeypatch.setattr(nn.BatchNorm1d, "forward", None)
    with torch.no_grad():
        torch.testing.assert_close(trunk(x), expected)
    if fuses:
        trunk(x)[0].sum().backward()
        assert all(expert.norms[0].weight.grad is not None for expert in trunk.level.experts)
    else:
        with pytest.raises(TypeError, match="NoneType"):
            trunk(x)


@pytest.mark.parametrize("change", ["norm", "mode", "dropout"])
def test_experts_that_differ_run_as_modules(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trunk = build("mmoe", batch_norm=True, dropout=0.5, dtype=torch.float64)
    experts = trunk.level.experts
    if change == "norm":
        experts[1].norms[0] = nn.GroupNorm(3, UNITS[0], dtype=torch.float64)
    elif change == "mode":
        experts[1].norms[0].eval()
    else:
        experts[1].dropout.p = 0.0
    x = torch.randn(B, D, dtype=torch.float64)
    torch.manual_seed(0)
    found = trunk(x)
    torch.manual_seed(0)
    logits = trunk.level.gates(x).split(4, 1)
    hidden = torch.stack([expert(x) for expert in experts], 1)
    expected = [(logit.softmax(1)[:, :, None] * hidden).sum(1) for logit in logits]
    torch.testing.assert_close(found, expected)


def test_gates_of_one_stream_are_one_matrix() -> None:
    shapes = {name: tuple(p.shape) for name, p in build("ple").named_parameters() if "gates" in name}
    assert shapes == {
        "levels.0.gates.weight": (3 + 4 + 5, D),
        "levels.1.gates.0.weight": (3, UNITS[-1]),
        "levels.1.gates.1.weight": (4, UNITS[-1]),
        "levels.1.gates.2.weight": (5, UNITS[-1]),
        "levels.2.gates.0.weight": (3, UNITS[-1]),
        "levels.2.gates.1.weight": (4, UNITS[-1]),
    }
    assert build("mmoe").state_dict()["level.experts.3.linears.1.weight"].shape == (UNITS[1], UNITS[0])


@pytest.mark.parametrize("kind", KINDS)
def test_copies_are_independent_and_equal(kind: str) -> None:
    trunk = build(kind)
    x = torch.randn(B, D)
    expected = trunk(x)
    buffer = io.BytesIO()
    torch.save(trunk, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(trunk), pickle.loads(pickle.dumps(trunk)), torch.load(buffer, weights_only=False)]
    with torch.no_grad():
        for parameter in trunk.parameters():
            parameter.zero_()
    assert all(not y.any() for y in trunk(x))
    for other in copies:
        for a, b in zip(other(x), expected, strict=True):
            assert torch.equal(a, b)
    trunk.load_state_dict(copies[0].state_dict(), assign=True)
    for a, b in zip(trunk(x), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("activation", ["tanh", "prelu"])
def test_a_gate_that_no_loss_reaches_keeps_no_gradient(activation: str) -> None:
    """A task without experts of its own: of the next level its stream is read by its gate alone."""
    trunk = mk.nn.PLE(5, 2, (4,), num_specific=(0, 1), num_shared=1, gate_units=(3,), activation=activation)
    trunk(torch.randn(6, 5))[1].sum().backward()
    reached = {name for name, p in trunk.named_parameters() if p.grad is not None}
    assert not any(".gates.0." in name for name in reached) and any(".gates.1." in name for name in reached)


# torch.compile itself instantiates an autograd Function as it traces it, and its backend uses torch.jit.
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("kind, compiler", [("mmoe", "aot_eager"), ("ple", "inductor")])
def test_compiles_and_exports(kind: str, compiler: str, fresh_compiler: None) -> None:
    trunk = build(kind, gate_units=GATE_UNITS)
    compiled = torch.compile(trunk, fullgraph=True, dynamic=True, backend=compiler)
    for rows in (B, B + 4):
        x = torch.randn(rows, D, requires_grad=True)
        expected, found = trunk(x), compiled(x)
        (expected_grad,) = torch.autograd.grad(sum(y.sum() for y in expected), x)
        (grad,) = torch.autograd.grad(sum(y.sum() for y in found), x)
        torch.testing.assert_close((*found, grad), (*expected, expected_grad))
    exported = torch.export.export(trunk, (torch.randn(B, D),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    x = torch.randn(B + 4, D)
    torch.testing.assert_close(exported.module()(x), trunk(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", STYLES.values(), ids=STYLES)
def test_autocast(kind: str, options: dict[str, Any]) -> None:
    trunk = build(kind, **options).eval()
    x = torch.randn(B, D)
    expected = trunk(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = trunk(x)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.float() - b).abs().max() <= 0.05 * b.abs().max()
    sum(y.float().sum() for y in found).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trunk.parameters())


def test_parametrized_experts_are_evaluated_with_their_parametrization() -> None:
    trunk = build("mmoe")
    x = torch.randn(B, D)
    before = trunk(x)[0]

    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    for expert in trunk.level.experts:
        nn.utils.parametrize.register_parametrization(expert.linears[-1], "weight", Double())
        with torch.no_grad():
            expert.linears[-1].bias.mul_(2)
    torch.testing.assert_close(trunk(x)[0], 2 * before)


BAD = [
    ({"in_features": 2.0}, TypeError, r"in_features must be an int, got float"),
    ({"in_features": 0}, ValueError, r"in_features must be at least 1, got 0"),
    ({"num_tasks": "2"}, TypeError, r"num_tasks must be an int, got str"),
    ({"num_tasks": 0}, ValueError, r"num_tasks must be at least 1, got 0"),
    ({"expert_units": 64}, TypeError, r"expert_units must be a sequence of ints, each a layer's width, got int"),
    ({"expert_units": ()}, ValueError, r"expert_units must hold at least one layer's width"),
    ({"expert_units": (8, 0)}, ValueError, r"expert_units\[1\] must be at least 1, got 0"),
    ({"gate_units": (8, None)}, TypeError, r"gate_units\[1\] must be an int, got NoneType"),
    ({"activation": "swish"}, ValueError, r"activation must be one of none, relu, .*, dice, got 'swish'"),
    ({"activation": torch.relu}, TypeError, r"activation must be a name, got builtin_function_or_method"),
    ({"batch_norm": 1}, TypeError, r"batch_norm must be a bool, got int"),
    ({"dropout": True}, TypeError, r"dropout must be a float, got bool"),
    ({"dropout": 1.0}, ValueError, r"dropout must be a probability in \[0, 1\), got 1.0"),
    ({"dtype": torch.int32}, TypeError, r"dtype must be float32, .*, got torch.int32"),
    ({"dtype": "float32"}, TypeError, r"dtype must be float32, .* of torch, got 'float32'"),
]


@pytest.mark.parametrize("trunk", [mk.nn.MMoE, mk.nn.CGC, mk.nn.PLE])
def test_widths_and_counts_of_numpy(trunk: Any) -> None:
    """As ``nn.Linear`` takes them: a width is often the sum of columns' widths."""
    width = numpy.sum([3, D - 3])
    made = trunk(width, numpy.int64(2), expert_units=[numpy.int64(4), numpy.int32(3)], gate_units=[numpy.int64(2)])
    assert [y.shape for y in made(torch.randn(5, D))] == [(5, 3)] * 2
    assert (type(made.in_features), made.in_features) == (int, D)


@pytest.mark.parametrize("trunk", [mk.nn.MMoE, mk.nn.CGC, mk.nn.PLE])
@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_arguments(trunk: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        trunk(**{"in_features": D, "num_tasks": 2, **options})


@pytest.mark.parametrize(
    ("trunk", "options", "error", "message"),
    [
        (mk.nn.MMoE, {"num_experts": 0}, ValueError, r"num_experts must be at least 1, got 0"),
        (mk.nn.PLE, {"num_shared": torch.ones(4)}, TypeError, r"num_shared must be an int, got Tensor"),
        (mk.nn.CGC, {"num_shared": -1}, ValueError, r"num_shared must be at least 0, got -1"),
        (mk.nn.CGC, {"num_specific": 0, "num_shared": 0}, ValueError, r"expert"),
        (mk.nn.PLE, {"num_specific": [1, 2, 3]}, ValueError, r"num_specific must .*one int a task \(2\), got 3"),
        (mk.nn.PLE, {"num_levels": 0}, ValueError, r"num_levels must be at least 1, got 0"),
        (mk.nn.PLE, {"num_levels": 1.5}, TypeError, r"num_levels must be an int, got float"),
    ],
)
def test_bad_counts(trunk: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        trunk(D, 2, **options)


@pytest.mark.parametrize("options", [{}, {"batch_norm": True}], ids=["fused", "batch norm"])
def test_bad_input(options: dict[str, Any]) -> None:
    trunk = build("ple", **options)
    with pytest.raises(ValueError, match=r"x must have shape \[B, 10\], got \[13, 9\]"):
        trunk(torch.randn(B, 9))
    with pytest.raises(ValueError, match=r"x must have shape \[B, 10\], got \[10\]"):
        trunk(torch.randn(D))
    with pytest.raises(TypeError, match=r"x must be a tensor \[B, 10\], got list"):
        trunk([torch.randn(B, D)])
