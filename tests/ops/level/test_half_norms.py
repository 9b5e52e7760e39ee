"""Norms in half precision, whose gradients modules hold within its range and within its rounding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mtlkernels as mk
from mtlkernels.ops.level import call
from tests import requires

ROUTING = mk.Routing.mmoe(1, 1)


def _batch_norm(x: Tensor, linear: nn.Linear, gamma: float) -> nn.BatchNorm1d:
    norm, z = nn.BatchNorm1d(linear.out_features), linear(x).float().detach()
    norm.running_mean.copy_(z.mean(0))  # type: ignore[union-attr]
    norm.running_var.copy_(z.var(0))  # type: ignore[union-attr]
    nn.init.constant_(norm.weight, gamma)
    return norm.eval()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("rows", "of_x", "of_weights", "gamma", "of_grads"),
    [
        (200, 1e4, 0.05, 0.01, 1.0),
        (1000, 300.0, 0.25, 1.0, 8.0),
        (200, 1e-3, 0.1, 1.0, 1e-5),
        (200, 1.0, 0.25, 1.0, 1.0),
    ],
)
def test_running_statistics_of_any_scale(
    rows: int, of_x: float, of_weights: float, gamma: float, of_grads: float, autocast: bool
) -> None:
    """Folded into weights of float16, a norm would take them and their gradients out of its range."""
    torch.manual_seed(0)
    half, wide = torch.float16, torch.float64
    x = (torch.randn(rows, 16) * of_x).to(half)
    linear = nn.Linear(16, 16).to(half)
    nn.init.normal_(linear.weight, std=of_weights)
    norm, cotangent = _batch_norm(x, linear, gamma), (torch.randn(rows, 16) * of_grads).to(half)
    if autocast:
        linear.float()
    kept = linear, norm, x
    exact_linear, exact_norm = copy.deepcopy(linear).to(wide), copy.deepcopy(norm).to(wide)

    def plain(linear: nn.Linear, norm: Any, x: Tensor) -> Tensor:
        product = linear(x)
        return norm(product if product.dtype == wide else product.float()).to(x.dtype)  # type: ignore[no-any-return]

    def ours(linear: nn.Linear, norm: Any, x: Tensor) -> Tensor:
        logits = torch.zeros(rows, 1, dtype=x.dtype)
        layer: Any = [[linear.weight]], [[linear.bias]]
        return mk.expert_mixture(x, *layer, [logits], ROUTING, activation="none", norms=[[norm]])[0]

    def found(call: Any, linear: nn.Linear, norm: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = call(linear, norm, x)
        return y.detach().to(wide), torch.autograd.grad(y, linear.weight, cotangent.to(y.dtype))[0].to(wide)

    exact = found(plain, exact_linear, exact_norm, x.to(wide))
    with torch.autocast("cpu", half, enabled=autocast):
        by_ours, by_modules = found(ours, *kept), found(plain, *kept)
        with torch.no_grad():
            served = ours(*kept)
            with mk.use_backend("reference"):
                by_reference = ours(*kept)
    assert served.dtype == by_reference.dtype == half
    by_modules = by_modules[0], by_modules[0], *by_modules
    exact = exact[0], exact[0], *exact
    for own, others, wanted in zip((served, by_reference, *by_ours), by_modules, exact, strict=True):
        assert own.isfinite().all()
        rounding = torch.finfo(half).eps * float(wanted.abs().max()) + 1e-7
        assert float((own - wanted).abs().max()) <= max(2 * float((others - wanted).abs().max()), rounding)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_layer_norm_of_few_features(half: torch.dtype, width: int, activation: str) -> None:
    """Its gradient is a difference: what is taken away has to be of the values that it is taken from, as rounded."""
    torch.manual_seed(0)
    wide = torch.float64
    x, w, v = (torch.randn(*shape).to(half) for shape in ((64, 7), (width, 7), (30, width)))
    cotangent, logits = torch.randn(64, 30).to(half), torch.zeros(64, 1).to(half)
    norm = nn.LayerNorm(width)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)

    def plain(x: Tensor, norm: Any) -> Tensor:
        z = norm((x @ w.to(x.dtype).T).to(norm.weight.dtype)).to(x.dtype)
        return getattr(torch, activation)(z) @ v.to(x.dtype).T  # type: ignore[no-any-return]

    def ours(x: Tensor, norm: Any) -> Tensor:
        options: Any = {"activation": [activation, "none"], "norms": [[norm], None]}
        return mk.expert_mixture(x, [[w], [v]], None, [logits], ROUTING, **options)[0]

    def of_inputs(call: Any, x: Tensor, norm: Any) -> Tensor:
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(call(leaf, norm), leaf, cotangent.to(x.dtype))[0].to(wide)

    exact = of_inputs(plain, x.to(wide), copy.deepcopy(norm).to(wide))
    own, modules = (float((of_inputs(call, x, norm) - exact).abs().max()) for call in (ours, plain))
    assert own <= 3 * modules


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_running_statistics_are_rounded_once(half: torch.dtype, momentum: float | None, backend: str) -> None:
    """A batch's variance may be beyond float16's range where its mean with the earlier ones is within it."""
    torch.manual_seed(0)
    linear, norm = nn.Linear(8, 6).to(half), nn.BatchNorm1d(6, momentum=momentum).to(half)
    x = (torch.randn(64, 8) * 600).to(half)
    plain = copy.deepcopy(norm).float()
    with mk.use_backend(backend):
        for scale in (1.0, 0.01):
            mk.expert_mixture(
                x * scale, [[linear.weight]], [[linear.bias]], x.new_zeros(64, 1), ROUTING, norms=[[norm]]
            )
            z = F.linear((x * scale).float(), linear.weight.float(), linear.bias.float())
            plain(z)
            for buffer in plain.buffers():  # a batch after another is rounded to what the buffers hold
                buffer.copy_(buffer.to(half) if buffer.is_floating_point() else buffer)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(norm.get_buffer(name).to(buffer.dtype), buffer, rtol=0.02, atol=0.5, equal_nan=True)


@pytest.mark.parametrize("beside", ["layer norm", "dice"])
@pytest.mark.parametrize("autocast", [False, True])
def test_norms_of_gates_beside_stored_layers(autocast: bool, beside: str) -> None:
    """Whose logits come from outside of the level, with the norms folded into the gates."""
    torch.manual_seed(0)
    x, half = torch.randn(32, 16) * 1e-4, torch.float16
    weights, gate = [torch.randn(8, 16) for _ in range(2)], torch.randn(2, 16) / 8
    gate_norm = nn.BatchNorm1d(2, eps=1e-20).eval()
    logits = x @ gate.T
    gate_norm.running_mean.copy_(logits.mean(0))  # type: ignore[union-attr]
    gate_norm.running_var.copy_(logits.var(0))  # type: ignore[union-attr]
    nn.init.constant_(gate_norm.weight, 100.0)
    given: dict[str, Any] = {"gate_norms": [gate_norm], "norms": [[nn.LayerNorm(8) for _ in range(2)]]}
    if beside == "dice":
        given = {"gate_norms": [gate_norm], "activation": "dice", "slopes": [[torch.full((8,), 0.3) for _ in range(2)]]}

    def call(dtype: torch.dtype) -> Tensor:
        layer = [weight.to(dtype) for weight in weights]
        own = copy.deepcopy(given)
        if dtype == torch.float64:
            own = {name: [n.double() for n in value] if name == "gate_norms" else value for name, value in own.items()}
            own["norms"] = own.get("norms") and [[norm.double() for norm in own["norms"][0]]]
            own["slopes"] = own.get("slopes") and [[slope.double() for slope in own["slopes"][0]]]
        routing = mk.Routing.mmoe(2, 1)
        return mk.expert_mixture(x.to(dtype), [layer], None, None, routing, gate_weights=[gate.to(dtype)], **own)[0]

    with torch.no_grad():
        wanted = call(torch.float64)
        with torch.autocast("cpu", half, enabled=autocast):
            found = call(torch.float32 if autocast else half)
    assert found.dtype == half
    assert float((found - wanted).abs().max()) < 0.02 * float(wanted.abs().max())


def test_autocast_leaves_float64() -> None:
    norms = [[nn.BatchNorm1d(8).double().eval() for _ in range(2)]]
    x, weights = torch.randn(9, 16, dtype=torch.float64), [torch.randn(2, 8, 16, dtype=torch.float64)]
    with torch.autocast("cpu", torch.float16):
        y = mk.expert_mixture(x, weights, None, x[:, :2], mk.Routing.mmoe(2, 1), norms=norms)[0]
    assert y.dtype == torch.float64


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_torch_func_differentiates_beside_narrow_statistics(half: torch.dtype) -> None:
    """It refuses other writes to what it captures than those to lists."""
    norm, weight = nn.BatchNorm1d(4).to(half), torch.randn(4, 5).to(half)
    x = torch.randn(9, 5).to(half)
    torch.func.grad(
        lambda w: mk.expert_mixture(x, [[w]], None, x.new_zeros(9, 1), ROUTING, norms=[[norm]])[0].float().sum()
    )(weight)
    assert int(norm.num_batches_tracked) == 1  # type: ignore[arg-type]
    assert norm.running_mean.abs().sum() > 0  # type: ignore[union-attr]


def of_running(width: int) -> nn.BatchNorm1d:
    norm = nn.BatchNorm1d(width).eval()
    nn.init.normal_(norm.running_mean)  # type: ignore[arg-type]
    nn.init.uniform_(norm.running_var, 0.5, 2.0)  # type: ignore[arg-type]
    return norm


@pytest.mark.parametrize("wanted", ["norms", "gate norms"])
def test_gradients_of_norms_alone(wanted: str) -> None:
    """Nothing else of the call wants any, so that all else of it could be served."""
    torch.manual_seed(0)
    x, weights, gate = torch.randn(32, 16), [torch.randn(8, 16) / 4 for _ in range(2)], torch.randn(2, 16) / 4
    norms, gate_norm = [of_running(8).requires_grad_(False) for _ in range(2)], of_running(2).requires_grad_(False)
    own = (norms[1] if wanted == "norms" else gate_norm).requires_grad_()

    def found(dtype: torch.dtype) -> list[Tensor]:
        layer, routing = [[weight.to(dtype) for weight in weights]], mk.Routing.mmoe(2, 1)
        gates: Any = {"gate_weights": [gate.to(dtype)], "gate_norms": [gate_norm]}
        y = mk.expert_mixture(x.to(dtype), layer, None, None, routing, norms=[norms], **gates)[0]
        return list(torch.autograd.grad(y.float().square().sum(), [*own.parameters()]))

    torch.testing.assert_close(found(torch.float16), found(torch.float32), rtol=1e-2, atol=1e-1)


def test_dropout_beside_norms_that_nobody_differentiates() -> None:
    """Serving would leave it out."""
    x, logits = torch.randn(32, 16).half(), torch.zeros(32, 1).half()
    options: Any = {"activation": "none", "norms": [[of_running(8)]], "dropout": 0.5}
    with torch.no_grad():
        y = mk.expert_mixture(x, [[x[:8]]], None, [logits], ROUTING, **options)[0]
    assert 64 < int((y == 0).sum()) < 192


@requires.cpp_kernels
@pytest.mark.parametrize("wants", [False, True])
@pytest.mark.parametrize("beside", [None, "layer norm"])
def test_norms_stay_outside_of_weights_where_nobody_differentiates(
    beside: str | None, wants: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C++ takes them so; to fold them all would be cast at each call."""
    served: list[str] = []
    run = call.run_operator
    monkeypatch.setattr(call, "run_operator", lambda *args: served.append(args[1]) or run(*args))
    x, norms = torch.randn(32, 16), [[of_running(16)], [nn.LayerNorm(16).requires_grad_(wants)]]
    count = 1 if beside is None else 2
    with torch.autocast("cpu", torch.float16), torch.set_grad_enabled(wants):
        mk.expert_mixture(x, [[x[:16]]] * count, None, x[:, :1], ROUTING, norms=norms[:count])
    assert served == ([] if wants else ["serve"])


@pytest.mark.parametrize("kind", ["batch", "layer"])
def test_norms_that_are_not_folded_stay_in_float16(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in float32 take longer."""
    monkeypatch.setattr(call, "_in_float32", lambda *_: pytest.fail("all was cast"))
    norm: nn.Module = nn.LayerNorm(8) if kind == "layer" else nn.BatchNorm1d(8)
    x = torch.randn(32, 16)
    with torch.autocast("cpu", torch.float16):
        assert mk.expert_mixture(x, [[x[:8]]], None, x[:, :1], ROUTING, norms=[[norm]])[0].dtype == torch.float16


def test_a_layer_by_the_batch_beside_one_by_running_statistics() -> None:
    """Its statistics are brought up to date where nobody wants gradients, too."""
    torch.manual_seed(0)
    norm, plain, fixed = nn.BatchNorm1d(6), nn.BatchNorm1d(6), of_running(8)
    x, first, second = torch.randn(32, 16).half(), torch.randn(8, 16).half() / 4, torch.randn(6, 8).half() / 4
    with torch.no_grad():
        y = mk.expert_mixture(x, [[first], [second]], None, x[:, :1], ROUTING, norms=[[fixed], [norm]])[0]
        expected = plain(fixed(x.float() @ first.float().T).relu() @ second.float().T).relu()
    torch.testing.assert_close(y.float(), expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(norm.running_mean, plain.running_mean, rtol=1e-2, atol=1e-2)
    assert int(norm.num_batches_tracked) == 1  # type: ignore[arg-type]
