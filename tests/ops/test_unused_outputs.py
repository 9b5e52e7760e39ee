"""Where an output is not used, what it alone depends on keeps no gradient, as in modules called one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import mtlkernels as mk
from mtlkernels.ops._linears import joint_linear
from mtlkernels.ops.gated_mixture import mix_list

ROUTING = mk.Routing.cgc(2, 2, 1, shared_gate=True)
EXPERTS, GATES, STREAMS = ROUTING.num_experts, ROUTING.num_gates, ROUTING.num_inputs
# The last one is FuxiCTR's last level, where nobody reads what the shared gate mixes.
USED = [(0,), (1,), (2,), (0, 1)]
# A gate that sees one shared expert only: with it unused, that expert still has gradients from the others.
SHARED_ONLY = mk.Routing(ROUTING.expert_inputs, (*ROUTING.gate_experts[:2], (EXPERTS - 1,)))


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


class Function(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


LOOKING: dict[str, Callable[[], Any]] = {
    "FlopCounterMode": lambda: FlopCounterMode(display=False),
    "dual level": forward_ad.dual_level,
    "dispatch mode": Dispatch,
    "function mode": Function,
}
looked_at = pytest.mark.parametrize("looking", LOOKING.values(), ids=LOOKING)
# Forward-mode differentiation is made of torch.jit.script.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")


class Case:
    """A level of one layer an expert, its tensors by name, and its outputs by plain PyTorch."""

    def __init__(self, routing: mk.Routing, norm: str, gate_weights: bool) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

        self.routing, self.gate_weights = routing, gate_weights
        norms = [nn.BatchNorm1d(4, dtype=torch.float64).train(norm == "of the batch") for _ in range(EXPERTS)]
        self.norms = norms if norm else None
        self.tensors = {f"x {g}": random(6, 3) for g in range(STREAMS)}
        self.tensors |= {f"weight {e}": random(4, 3) for e in range(EXPERTS)}
        self.tensors |= {f"bias {e}": random(4) for e in range(EXPERTS)}
        for k, seen in enumerate(routing.gate_experts):
            self.tensors[f"gate {k}"] = random(len(seen), 3) if gate_weights else random(6, len(seen))
        parameters = enumerate(self.norms or ())
        self.tensors |= {f"{name} of norm {e}": p for e, norm in parameters for name, p in norm.named_parameters()}

    def named(self, name: str, count: int) -> list[Tensor]:
        return [self.tensors[f"{name} {i}"] for i in range(count)]

    def plain(self) -> list[Tensor]:
        x, gates = self.named("x", STREAMS), self.named("gate", GATES)
        hidden = []
        for e, (w, b) in enumerate(zip(self.named("weight", EXPERTS), self.named("bias", EXPERTS), strict=True)):
            y = nn.functional.linear(x[self.routing.expert_inputs[e]], w, b)
            hidden.append(torch.relu(y if self.norms is None else self.norms[e](y)))
        logits = [x[k] @ gate.t() if self.gate_weights else gate for k, gate in enumerate(gates)]
        return [
            torch.einsum("be,beh->bh", z.softmax(1), torch.stack([hidden[e] for e in seen], 1))
            for z, seen in zip(logits, self.routing.gate_experts, strict=True)
        ]

    def fused(self) -> tuple[Tensor, ...]:
        gates = self.named("gate", GATES)
        options: dict[str, Any] = {} if self.norms is None else {"norms": [self.norms]}
        if self.gate_weights:
            options["gate_weights"] = gates
        weights, biases = [self.named("weight", EXPERTS)], [self.named("bias", EXPERTS)]
        logits = None if self.gate_weights else gates
        return mk.expert_mixture(self.named("x", STREAMS), weights, biases, logits, self.routing, **options)


def gradients(outputs: Any, used: tuple[int, ...], tensors: dict[str, Tensor], twice: bool) -> dict[str, Any]:
    loss = sum(outputs[k].pow(3).sum() for k in used)
    found = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True, create_graph=twice)
    return dict(zip(tensors, found, strict=True))


def of_penalty(grads: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Gradients of the squares of gradients, as a penalty of their size has them."""
    loss = sum(g.square().sum() for g in grads.values() if g is not None)
    return dict(zip(tensors, torch.autograd.grad(loss, list(tensors.values()), allow_unused=True), strict=True))


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert {name for name, g in found.items() if g is None} == {name for name, g in expected.items() if g is None}
    for name, gradient in expected.items():
        if gradient is not None:
            torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("used", USED)
@pytest.mark.parametrize("routing", [ROUTING, SHARED_ONLY], ids=["cgc", "shared only"])
@pytest.mark.parametrize("gate_weights", [False, True])
@pytest.mark.parametrize("norm", ["", "of the batch", "of running statistics"])
def test_expert_mixture(
    norm: str, gate_weights: bool, routing: mk.Routing, used: tuple[int, ...], twice: bool, backend: str
) -> None:
    case = Case(routing, norm, gate_weights)
    with mk.use_backend(backend):
        found = gradients(case.fused(), used, case.tensors, twice)
        second = of_penalty(found, case.tensors) if twice else {}
    expected = gradients(case.plain(), used, case.tensors, twice)
    assert_same(found, expected)
    if twice:
        assert_same(second, of_penalty(expected, case.tensors))


@looked_at
@pytest.mark.parametrize("used", USED)
@pytest.mark.parametrize("routing", [ROUTING, SHARED_ONLY], ids=["cgc", "shared only"])
def test_expert_mixture_that_is_looked_at(routing: mk.Routing, used: tuple[int, ...], looking: Any) -> None:
    case = Case(routing, "of running statistics", True)
    with looking():
        found = gradients(case.fused(), used, case.tensors, False)
    assert_same(found, gradients(case.plain(), used, case.tensors, False))


def mixing() -> tuple[dict[str, Tensor], Callable[[], Any], Callable[[], Any]]:
    case = Case(SHARED_ONLY, "", False)
    experts = {f"expert {e}": torch.randn(6, 4, dtype=torch.float64).requires_grad_() for e in range(EXPERTS)}
    logits = case.named("gate", GATES)
    tensors = experts | {f"gate {k}": z for k, z in enumerate(logits)}

    def plain() -> list[Tensor]:
        each = list(experts.values())
        return [
            torch.einsum("be,beh->bh", z.softmax(1), torch.stack([each[e] for e in seen], 1))
            for z, seen in zip(logits, SHARED_ONLY.gate_experts, strict=True)
        ]

    return tensors, plain, lambda: mix_list(list(experts.values()), logits, SHARED_ONLY)


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("used", USED)
def test_mixing_of_modules(used: tuple[int, ...], twice: bool) -> None:
    tensors, plain, fused = mixing()
    found, expected = (gradients(run(), used, tensors, twice) for run in (fused, plain))
    assert_same(found, expected)
    if twice:
        assert_same(of_penalty(found, tensors), of_penalty(expected, tensors))


def test_a_gradient_penalty_with_an_infinite_expert_that_no_loss_reaches() -> None:
    """Of experts that are modules, whose own backward passes would multiply zeros by what is not finite."""
    x = torch.randn(6, 3, dtype=torch.float64).requires_grad_()
    weights = [torch.randn(4, 3, dtype=torch.float64).requires_grad_() for _ in range(3)]
    weights[1].data[0, 0] = torch.inf
    logits = [torch.randn(6, 2, dtype=torch.float64).requires_grad_() for _ in range(2)]
    routing = mk.Routing.cgc(2, 1, 1, single_input=True)
    outputs = mix_list([nn.functional.softplus(x @ w.t()) for w in weights], logits, routing)
    tensors = {"x": x} | {f"weight {e}": w for e, w in enumerate(weights)}
    second = of_penalty(gradients(outputs, (0,), tensors, True), tensors)
    assert second["weight 1"] is None
    assert all(second[name].isfinite().all() and second[name].any() for name in ("x", "weight 0", "weight 2"))


@looked_at
@pytest.mark.parametrize("used", USED)
def test_mixing_of_modules_that_is_looked_at(used: tuple[int, ...], looking: Any) -> None:
    tensors, plain, fused = mixing()
    with looking():
        found = gradients(fused(), used, tensors, False)
    assert_same(found, gradients(plain(), used, tensors, False))


@looked_at
def test_mixing_of_several_dtypes_that_is_looked_at(looking: Any) -> None:
    """All outputs have the widest dtype, as those of a stack have, whichever experts a gate mixes."""
    routing = mk.Routing.cgc(2, 1, 1, single_input=True)
    experts = [
        torch.randn(6, 4).requires_grad_().to(dtype) for dtype in (torch.bfloat16, torch.float32, torch.bfloat16)
    ]
    logits = [torch.randn(6, 2).requires_grad_() for _ in range(2)]
    expected = mix_list(experts, logits, routing)
    with looking():
        found = mix_list(experts, logits, routing)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("used", USED)
def test_joint_gates(used: tuple[int, ...], biased: bool) -> None:
    case = Case(ROUTING, "", True)
    x, weights = case.tensors["x 0"], case.named("gate", GATES)
    biases = [torch.randn(len(w), dtype=torch.float64).requires_grad_() for w in weights] if biased else []
    tensors = (
        {"x": x} | {f"weight {k}": w for k, w in enumerate(weights)} | {f"bias {k}": b for k, b in enumerate(biases)}
    )
    plain = [nn.functional.linear(x, w, biases[k] if biased else None) for k, w in enumerate(weights)]
    found, expected = (gradients(run, used, tensors, True) for run in (joint_linear(x, weights, biases), plain))
    assert_same(found, expected)
    assert_same(of_penalty(found, tensors), of_penalty(expected, tensors))


@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_trunk(batch_norm: bool) -> None:
    """A task without a loss leaves its own experts and gate without gradients."""
    trunk = mk.nn.PLE(5, 2, (4,), num_specific=2, num_shared=1, num_levels=2, gate_units=(3,), batch_norm=batch_norm)
    trunk(torch.randn(7, 5))[0].square().sum().backward()
    without = {name for name, p in trunk.named_parameters() if p.grad is None}
    assert "levels.1.experts.2.linears.0.weight" in without
    assert "levels.1.gates.1.1.weight" in without
    assert all(p.grad is not None for name, p in trunk.named_parameters() if name.startswith("levels.0.experts"))


def without_gradients(model: nn.Module, call: Callable[..., Any]) -> set[str]:
    """The parameters that a loss of the first output alone does not reach."""
    model.zero_grad()
    call(torch.randn(7, 5, generator=torch.Generator().manual_seed(0)))[0].square().sum().backward()
    return {name for name, p in model.named_parameters() if p.grad is None}


@looked_at
@pytest.mark.parametrize("modules", ["by batch norms", "by a hook", ""])
def test_a_level_that_is_looked_at(modules: str, looking: Any) -> None:
    """Fused, or where its experts have to run as modules."""
    level: Any = mk.nn.CGC(5, 2, (4,), num_specific=1, num_shared=1, batch_norm=modules == "by batch norms").eval()
    if modules == "by a hook":
        level.level.experts[0].register_forward_hook(lambda *_: None)
    expected = without_gradients(level, level)
    with looking():
        found = without_gradients(level, level)
    assert found == expected and "level.experts.1.linears.0.weight" in found


@pytest.mark.parametrize("hook", [False, True])
@pytest.mark.parametrize("tracer", ["torch.jit.trace", "torch.fx"])
def test_a_graph_of_a_level(tracer: str, hook: bool) -> None:
    level: Any = mk.nn.CGC(5, 2, (4,), num_specific=1, num_shared=1)
    if hook:
        level.level.experts[0].register_forward_hook(lambda *_: None)
    if tracer == "torch.fx":
        graph: Any = torch.fx.symbolic_trace(level)
    else:
        graph = torch.jit.trace(level, torch.randn(6, 5))
    assert without_gradients(graph, graph) == without_gradients(level, level)


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("used", USED)
@pytest.mark.parametrize("stacked", [False, True])
def test_sub_network_routing(stacked: bool, used: tuple[int, ...], twice: bool, backend: str) -> None:
    """Matrices of routes to an output that is not used keep no gradient; where all are one tensor, zeros."""
    u = [torch.randn(6, 3, dtype=torch.float64).requires_grad_() for _ in range(2)]
    weight = torch.randn(3, 2, 4, 3, dtype=torch.float64)
    matrices = [w.clone().requires_grad_() for w in weight.flatten(0, 1)]
    whole = weight.clone().requires_grad_()
    z = torch.tensor([[1.0, 0.5], [0.0, 2.0], [0.3, 1.0]], dtype=torch.float64).requires_grad_()
    rows: Any = whole if stacked else [matrices[2 * i : 2 * i + 2] for i in range(3)]
    weights = {"weight": whole} if stacked else {f"weight {at}": w for at, w in enumerate(matrices)}
    tensors = {"u 0": u[0], "u 1": u[1], **weights, "z": z}
    plain = [sum(z[i, j] * (x @ rows[i][j].t()) for j, x in enumerate(u)) for i in range(3)]
    with mk.use_backend(backend):
        found = gradients(mk.snr_trans(u, rows, z), used, tensors, twice)
        second = of_penalty(found, tensors) if twice else {}
    expected = gradients(plain, used, tensors, twice)
    assert_same(found, expected)
    if twice:
        assert_same(second, of_penalty(expected, tensors))


@pytest.mark.parametrize("place", ["logits", "weight"])
def test_what_is_not_finite_in_front_of_an_unused_output(place: str, backend: str) -> None:
    """It does not reach the gradients of the others, as zeros times NaN would."""
    x = torch.randn(6, 2, 4).requires_grad_()
    with mk.use_backend(backend):
        if place == "logits":
            logits = [torch.randn(6, 2), torch.full((6, 2), torch.nan).requires_grad_()]
            outputs = mk.gated_mixture(x, logits, mk.Routing.mmoe(2, 2))
        else:
            weight = torch.randn(2, 2, 3, 4)
            weight[1] = torch.nan
            outputs = mk.snr_trans(list(x.unbind(1)), weight.requires_grad_(), torch.ones(2, 2))
        (found,) = torch.autograd.grad(outputs[0].sum(), x)
    assert found.isfinite().all() and found.any()


@looked_at
def test_what_is_not_finite_in_an_expert_that_no_loss_reads(looking: Any) -> None:
    x = torch.randn(6, 5).requires_grad_()
    weights = [torch.randn(4, 5) for _ in range(3)]
    weights[1][0, 0] = torch.inf
    logits = [torch.randn(6, 2) for _ in range(2)]
    with looking():
        outputs = mk.expert_mixture(x, [weights], None, logits, mk.Routing.cgc(2, 1, 1, single_input=True))
        (found,) = torch.autograd.grad(outputs[0].sum(), x)
    assert found.isfinite().all() and found.any()


def test_norms_with_running_statistics(backend: str) -> None:
    """In training with frozen statistics the norm of an expert that no loss reaches has no gradient either."""
    routing = mk.Routing((0, 0), ((0,), (1,)))
    norms = [nn.BatchNorm1d(4).eval() for _ in range(2)]
    weights, biases = ([torch.randn(*shape).requires_grad_() for _ in range(2)] for shape in ((4, 3), (4,)))
    logits = [torch.randn(6, 1).requires_grad_() for _ in range(2)]
    with mk.use_backend(backend):
        outputs = mk.expert_mixture(torch.randn(6, 3), [weights], [biases], logits, routing, norms=[norms])
    outputs[0].square().sum().backward()
    for first, second in (weights, biases, [norm.weight for norm in norms], [norm.bias for norm in norms]):
        assert first.grad is not None and second.grad is None


def test_the_first_and_the_last_of_three_outputs() -> None:
    """Of SNR: rows of z and of the weights that do not lie next to each other."""
    u = [torch.randn(5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    weight = torch.randn(3, 2, 6, 4, dtype=torch.float64, requires_grad=True)
    z = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)

    def gradients(v: Any) -> Any:
        return torch.autograd.grad((v[0] + 2 * v[2]).square().sum(), [*u, weight, z])

    plain = [sum(z[i, j] * u[j] @ weight[i, j].T for j in range(2)) for i in range(3)]
    torch.testing.assert_close(gradients(mk.snr_trans(u, weight, z)), gradients(plain))
