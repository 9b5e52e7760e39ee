"""Forward-mode differentiation: right tangents of every op and module, whatever grad mode and frozen weights say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import mtlkernels as mk
from tests.ways_out.kinds import ALL, SNRS, Kind, assert_same

# Forward-mode differentiation is itself made of torch.jit.script.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


ROUTING = mk.Routing.mmoe(3, 2)
X, WEIGHT, LOGITS, GATES = double(5, 6), double(3, 4, 6), double(5, 6), double(6, 6) / 2
EXPERTS, U, MATRICES = double(5, 3, 4), double(2, 5, 6), double(3, 2, 4, 6)
Z = torch.tensor([[0.25, 0.5], [1.0, 0.75], [0.2, 0.3]], dtype=torch.float64)
GRADS, ORDER = double(3, 9), [[1, 2], [0, 2], [0, 1]]
NORMS = [[nn.BatchNorm1d(4, track_running_stats=False).double() for _ in range(3)]]

# op and argument -> the op as a function of that argument, and its value.
CASES: dict[str, tuple[Callable[[Tensor], Any], Tensor]] = {
    "expert_mixture, inputs": (lambda x: mk.expert_mixture(x, [WEIGHT], None, LOGITS, ROUTING, activation="silu"), X),
    "expert_mixture, weights": (lambda w: mk.expert_mixture(X, [w], None, LOGITS, ROUTING, activation="tanh"), WEIGHT),
    "expert_mixture, logits": (lambda z: mk.expert_mixture(X, [WEIGHT], None, z, ROUTING), LOGITS),
    "expert_mixture, gate_weights": (
        lambda w: mk.expert_mixture(X, [WEIGHT], None, None, ROUTING, gate_weights=w),
        GATES,
    ),
    "expert_mixture, inputs of norms": (
        lambda x: mk.expert_mixture(x, [WEIGHT], None, LOGITS, ROUTING, norms=NORMS, activation="tanh"),
        X,
    ),
    "gated_mixture, experts": (lambda x: mk.gated_mixture(x, LOGITS, ROUTING), EXPERTS),
    "gated_mixture, logits": (lambda z: mk.gated_mixture(EXPERTS, z, ROUTING), LOGITS),
    "snr_trans, u": (lambda u: mk.snr_trans(u, MATRICES, Z), U),
    "snr_trans, weight": (lambda w: mk.snr_trans(U, w, Z), MATRICES),
    "snr_trans, z": (lambda z: mk.snr_trans(U, MATRICES, z), Z),
    "snr_aver, u": (lambda u: mk.snr_aver(u, Z), U),
    "snr_aver, z": (lambda z: mk.snr_aver(U, z), Z),
    "hard_concrete": (lambda a: (mk.hard_concrete(a),), Z),
    "gram": (lambda g: (mk.gram(g),), GRADS),
    "pcgrad": (lambda g: (mk.pcgrad(g, order=ORDER),), GRADS),
}


def numerically(function: Callable[[Tensor], Any], value: Tensor, tangent: Tensor, eps: float = 1e-6) -> list[Tensor]:
    with torch.no_grad():
        pairs = zip(function(value + eps * tangent), function(value - eps * tangent), strict=True)
        return [(above - below) / (2 * eps) for above, below in pairs]


@pytest.mark.parametrize("grad", [True, False], ids=["frozen", "no_grad"])
@pytest.mark.parametrize("name", CASES)
def test_tangents(name: str, grad: bool) -> None:
    function, value = CASES[name]
    tangent = double(*value.shape) / 2
    expected = numerically(function, value, tangent)
    with torch.set_grad_enabled(grad):
        with forward_ad.dual_level():
            found = [forward_ad.unpack_dual(y).tangent for y in function(forward_ad.make_dual(value, tangent))]
        _, of_func = torch.func.jvp(lambda v: tuple(function(v)), (value,), (tangent,))
    for a, b, c in zip(found, of_func, expected, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-7)  # what finite differences give
        torch.testing.assert_close(b, c, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", CASES)
def test_jacobians_and_forward_over_reverse(name: str) -> None:
    function, value = CASES[name]

    def first(v: Tensor) -> Tensor:
        return function(v)[0]

    torch.testing.assert_close(torch.func.jacfwd(first)(value), torch.func.jacrev(first)(value))
    small = value.flatten()[:4]

    def scalar(v: Tensor) -> Tensor:
        return first(torch.cat([v, value.flatten()[4:]]).view(value.shape)).square().sum()

    forward = torch.func.jacfwd(torch.func.jacrev(scalar))(small)
    torch.testing.assert_close(forward, torch.func.jacrev(torch.func.jacrev(scalar))(small))


def test_a_closed_route() -> None:
    """Its z has a tangent, as it has a gradient, unless ``closed_grad`` is False; what is not finite stays out."""
    z = Z.clone()
    z[0, 0] = 0.0
    u = U.clone()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(z, torch.ones_like(z))
        found = forward_ad.unpack_dual(mk.snr_aver(u, dual)[0]).tangent
        without = forward_ad.unpack_dual(mk.snr_aver(u, dual, closed_grad=False)[0]).tangent
    torch.testing.assert_close(found, u[0] + u[1])
    torch.testing.assert_close(without, u[1])
    u[0] = torch.nan
    z[1:, 0] = 0.0
    with forward_ad.dual_level():
        assert torch.isfinite(mk.snr_aver(u, forward_ad.make_dual(z, torch.ones_like(z)))[0]).all()


def test_gradients_that_carry_tangents() -> None:
    """A forward pass before the dual level: its Function says that it has no tangents, and drops none."""
    x = X.clone().requires_grad_()
    y = mk.expert_mixture(x, [WEIGHT], None, LOGITS, ROUTING)[0]
    with forward_ad.dual_level():
        seed = forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y))
        with pytest.raises((RuntimeError, NotImplementedError), match="jvp"):
            torch.autograd.grad(y, x, seed)


def test_operators_called_directly() -> None:
    value, tangent = LOGITS, double(5, 6)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(value, tangent)
        flat, sizes = [0, 1, 2, 0, 1, 2], [3, 3]
        (y, _) = torch.ops.mtlkernels.gated_mixture_forward(EXPERTS, list(dual.split(3, 1)), flat, sizes)
        found = forward_ad.unpack_dual(y).tangent
    expected = numerically(CASES["gated_mixture, logits"][0], value, tangent)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)  # what finite differences give


@pytest.mark.parametrize("name", [name for name in ALL if name != "deepctr PLE"])
def test_modules(name: str) -> None:
    """Of parameters, which lead to every part."""
    kind: Kind = ALL[name]
    model = kind.model().double()
    x = tuple(t.double() for t in kind.inputs(6, 0))
    values = {key: p.detach() for key, p in model.named_parameters()}
    tangents = {key: torch.full_like(p, 0.01) for key, p in values.items()}

    def run(given: dict[str, Tensor]) -> Tensor:
        found = torch.func.functional_call(model, given, x)
        return torch.cat([y.flatten() for y in torch.utils._pytree.tree_leaves(found)])

    with torch.no_grad():
        _, found = torch.func.jvp(run, (values,), (tangents,))
        eps = 1e-5
        above, below = (run({key: p + s * eps * tangents[key] for key, p in values.items()}) for s in (1, -1))
    assert found.abs().max() > 0
    torch.testing.assert_close(found, (above - below) / (2 * eps), rtol=1e-3, atol=1e-5 * float(found.abs().max()))


# FlopCounterMode ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("name", ALL)
def test_flops(name: str, training: bool) -> None:
    """Those of the model's own modules, and of the reference, forward and backward, and the right numbers."""
    kind = ALL[name]
    model = kind.model(training)
    plain = kind.original(training) if kind.convert else kind.model(training)
    x = kind.inputs(40, 0)
    counts = []
    for module, backend in ((model, None), (plain, "reference")):
        torch.manual_seed(0)
        counter = FlopCounterMode(display=False)
        with mk.use_backend(backend) if backend else FlopCounterMode(display=False), counter:
            found = torch.utils._pytree.tree_leaves(module(*x))
            if any(y.requires_grad for y in found):
                sum(y.square().sum() for y in found).backward()
        counts.append((counter.get_total_flops(), [y.detach() for y in found]))
    assert counts[0][0] == counts[1][0] > 0
    assert_same(counts[0][1], counts[1][1])


def test_flops_by_hand() -> None:
    """Two layers of three experts, gates that are layers, and two gates over all experts."""
    model = mk.nn.MMoE(7, 2, expert_units=(6, 5), num_experts=3).eval()
    x = torch.randn(40, 7)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    assert counter.get_total_flops() == 2 * 40 * (3 * (7 * 6 + 6 * 5) + 7 * 6 + 2 * 3 * 5)


def test_flops_of_a_backward_pass_whose_forward_came_before() -> None:
    x = torch.randn(40, 7, requires_grad=True)
    loss = mk.expert_mixture(x, [torch.randn(3, 5, 7)], None, torch.randn(40, 6), ROUTING)[0].sum()
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    assert counter.get_total_flops() > 0


@pytest.mark.parametrize("name", SNRS)
def test_flops_of_an_exported_graph(name: str) -> None:
    kind = SNRS[name]
    x = kind.inputs(12, 0)
    with torch.no_grad():
        program = torch.export.export(kind.model(), x).module()
        with FlopCounterMode(display=False) as counter:
            program(*x)
        with FlopCounterMode(display=False) as expected:
            kind.model()(*x)
    assert counter.get_total_flops() >= expected.get_total_flops() > 0
