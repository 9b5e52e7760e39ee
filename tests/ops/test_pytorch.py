"""The ops among PyTorch's other habits: autocast, copies, repeated and partial backward passes, inference mode."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mtlkernels as mk
from mtlkernels.testing import Case, CaseFactory, evaluate

ROUTING = mk.Routing.cgc(2, 1, 1)


def gated(**options: Any) -> Case:
    return CaseFactory(0, torch.float32).gated_mixture(20, 8, ROUTING, **options)


def expert(**options: Any) -> Case:
    return CaseFactory(0, torch.float32).expert_mixture(20, [6, 8, 5], ROUTING, activation="silu", **options)


CASES = pytest.mark.parametrize("op, make", [(mk.gated_mixture, gated), (mk.expert_mixture, expert)])


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.routing = ROUTING
        self.weight = nn.Parameter(torch.randn(3, 5, 6))
        self.gate = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(mk.expert_mixture([x, x, x], [self.weight], None, self.gate(x), self.routing), 1)


# Autocast -----------------------------------------------------------------------------------------------------------


@CASES
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast(op: Any, make: Any, low: torch.dtype, backend: str) -> None:
    """Outputs in the low dtype, gradients in the parameters' own; the values are those of a cast by hand."""
    case = make()

    def under_autocast(**arguments: Any) -> Any:
        with torch.autocast("cpu", low):
            return op(**arguments)

    def by_hand(**arguments: Any) -> Any:
        cast = Case(arguments, low).map(lambda t: t.to(low)).arguments
        return op(**{**cast, "gate_logits": arguments["gate_logits"]})

    with mk.use_backend(backend):
        got, expected = evaluate(under_autocast, case), evaluate(by_hand, case)
    assert {y.dtype for y in got["outputs"]} == {low}
    for name, group in expected.items():
        if name != "outputs":
            assert {grad.dtype for grad in got[name]} == {torch.float32}
        torch.testing.assert_close(got[name], group)


@CASES
def test_autocast_leaves_float64_alone(op: Any, make: Any, backend: str) -> None:
    case = make().to(torch.float64)
    with mk.use_backend(backend), torch.autocast("cpu", torch.bfloat16):
        outputs = op(**case.arguments)
    assert {y.dtype for y in outputs} == {torch.float64}


@CASES
def test_backward_inside_autocast(op: Any, make: Any, backend: str) -> None:
    """Autocast does not reach into the implementation of a backward pass."""
    case = make()

    def inside(**arguments: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            return op(**arguments)

    with mk.use_backend(backend):
        expected = evaluate(op, case)
        with torch.autocast("cpu", torch.bfloat16):
            got = evaluate(inside, case)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@CASES
def test_autocast_that_is_off(op: Any, make: Any) -> None:
    case = make()
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        outputs = op(**case.arguments)
    assert {y.dtype for y in outputs} == {torch.float32}


def test_autocast_of_operators_called_directly() -> None:
    experts, logits = torch.randn(4, 2, 3), torch.randn(4, 2)
    with torch.autocast("cpu", torch.bfloat16):
        (y,) = torch.ops.mtlkernels.gated_mixture_forward(experts, [logits], [0, 1], [2])
    assert y.dtype == torch.bfloat16


def test_autocast_after_a_linear_layer() -> None:
    """Inputs come in the low dtype, parameters in float32, as in a model."""
    model, x = Model(), torch.randn(7, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x.bfloat16())
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert model.weight.grad is not None and model.weight.grad.dtype == torch.float32


# Backward passes ----------------------------------------------------------------------------------------------------


@CASES
def test_second_backward_through_a_kept_graph(op: Any, make: Any, backend: str) -> None:
    case = make()
    leaves = [leaf for group in case.leaves().values() for leaf in group]
    with mk.use_backend(backend):
        loss = sum(y.square().sum() for y in op(**case.arguments))
        loss.backward(retain_graph=True)
        first = [leaf.grad.clone() for leaf in leaves]
        loss.backward()
    for leaf, grad in zip(leaves, first, strict=True):
        torch.testing.assert_close(leaf.grad, 2 * grad)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@CASES
def test_changing_an_argument_in_place_before_backward_is_an_error(op: Any, make: Any) -> None:
    case = make()
    loss = sum(y.square().sum() for y in op(**case.arguments))
    with torch.no_grad():
        next(iter(case.leaves().values()))[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@CASES
def test_outputs_may_be_changed_in_place(op: Any, make: Any, backend: str) -> None:
    case = make()

    def doubled(**arguments: Any) -> list[Tensor]:
        return [y.mul_(2) for y in op(**arguments)]

    with mk.use_backend(backend):
        got, single = evaluate(doubled, case), evaluate(op, case)
    for name, group in got.items():
        for a, b in zip(group, single[name], strict=True):
            torch.testing.assert_close(a, 2 * b)


@CASES
def test_expanded_and_overlapping_gradients(op: Any, make: Any, backend: str) -> None:
    """sum().backward() hands the op a gradient whose strides are all 0."""
    case = make()
    leaves = [leaf for group in case.leaves().values() for leaf in group]
    with mk.use_backend(backend):
        got = torch.autograd.grad(sum(y.sum() for y in op(**case.arguments)), leaves)
        outputs = op(**case.arguments)
        dense = torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs])
    torch.testing.assert_close(got, dense)


@CASES
def test_gradients_of_another_layout(op: Any, make: Any, backend: str) -> None:
    case = make()
    leaves = [leaf for group in case.leaves().values() for leaf in group]
    with mk.use_backend(backend):
        outputs = op(**case.arguments)
        cotangents = [torch.randn(y.shape[::-1]).t() for y in outputs]
        got = torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True)
        dense = torch.autograd.grad(outputs, leaves, [c.contiguous() for c in cotangents])
    torch.testing.assert_close(got, dense)


def test_activation_checkpointing() -> None:
    case = expert()

    def checkpointed(**arguments: Any) -> Any:
        return checkpoint(lambda: mk.expert_mixture(**arguments), use_reentrant=False)

    got, expected = evaluate(checkpointed, case), evaluate(mk.expert_mixture, case)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@CASES
def test_hooks_on_saved_tensors(op: Any, make: Any) -> None:
    """Everything that the backward needs is saved where PyTorch can move it away."""
    case = make()
    with torch.autograd.graph.save_on_cpu():
        got = evaluate(op, case)
    torch.testing.assert_close(got, evaluate(op, case), rtol=0, atol=0)


# Modes and copies ---------------------------------------------------------------------------------------------------


@CASES
def test_inference_mode(op: Any, make: Any, backend: str) -> None:
    case = make()
    with mk.use_backend(backend):
        with torch.inference_mode():
            serving = op(**case.arguments)
        training = op(**case.arguments)
    for a, b in zip(serving, training, strict=True):
        assert a.is_inference()
        torch.testing.assert_close(a, b.detach())


@CASES
def test_inference_tensors_as_arguments(op: Any, make: Any, backend: str) -> None:
    with torch.inference_mode():
        case = make().map(lambda t: t.detach().clone())
        with mk.use_backend(backend):
            outputs = op(**case.arguments)
    assert all(torch.isfinite(y).all() for y in outputs)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_model(duplicate: Any) -> None:
    model, x = Model(), torch.randn(7, 6)
    again = duplicate(model)
    assert again.routing == model.routing
    assert torch.equal(again(x), model(x))
    again(x).sum().backward()
    assert again.weight.grad is not None and model.weight.grad is None


def test_state_dict_of_a_model(tmp_path: Any) -> None:
    model, other, x = Model(), Model(), torch.randn(7, 6)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(other(x), model(x))


def test_functional_call() -> None:
    model, x = Model(), torch.randn(7, 6)
    parameters = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    assert not torch.func.functional_call(model, parameters, (x,)).any()


def test_a_model_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = Model()
    y = model(torch.empty(7, 6, device="meta"))
    assert y.shape == (7, 10)
    y.sum().backward()
    assert model.weight.grad is not None and model.weight.grad.is_meta


def test_subclasses_of_tensors_and_default_dtype() -> None:
    """Parameters are tensors; the default dtype does not leak into a result."""
    case = gated()
    torch.set_default_dtype(torch.float64)
    try:
        outputs = mk.gated_mixture(**case.arguments)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {y.dtype for y in outputs} == {torch.float32}


@pytest.mark.parametrize("kind", [{}, {"batch_norm": True}, {"activation": "prelu"}, {"dropout": 0.5}])
@pytest.mark.parametrize("training", [False, True])
def test_gradients_switched_on_within_inference_mode(kind: dict[str, Any], training: bool, backend: str) -> None:
    """Nothing is recorded there, and what is made there cannot be saved; modules do not raise either."""
    model, x = mk.nn.PLE(6, 2, (5,), num_specific=1, num_shared=1, **kind).train(training), torch.randn(7, 6)
    u, weight, z = (
        torch.randn(2, 7, 6),
        torch.randn(2, 2, 5, 6, requires_grad=True),
        torch.rand(2, 2, requires_grad=True),
    )
    with mk.use_backend(backend):
        with torch.inference_mode(), torch.enable_grad():
            found = [*model(x), *mk.snr_trans(u, weight, z), *mk.snr_aver(u, z)]
        assert all(output.is_inference() and not output.requires_grad for output in found)
        sum(output.square().sum() for output in (*model(x), *mk.snr_trans(u, weight, z))).backward()
    assert all(parameter.grad is not None for parameter in model.parameters()) and weight.grad is not None


def test_custom_operators_of_models() -> None:
    """Their kernels run below autograd, where modules record nothing."""
    model, u = mk.nn.MMoE(6, 2, (5,), num_experts=2), torch.randn(7, 6)
    weight, z = torch.randn(2, 2, 5, 6, requires_grad=True), torch.rand(2, 2, requires_grad=True)

    @torch.library.custom_op("mtlkernels_tests::below_autograd", mutates_args=())
    def below(x: Tensor) -> list[Tensor]:
        return [*model(x), *mk.snr_trans([x, x], weight, z), *mk.snr_aver([x, x], z)]

    assert not any(output.requires_grad for output in below(u))
