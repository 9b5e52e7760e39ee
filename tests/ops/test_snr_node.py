"""The node in autograd's graph that C++ makes for SNR on CPUs, and which backward passes it leaves to Python."""

from __future__ import annotations

import threading
import weakref
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mtlkernels as mk
from mtlkernels.ops import _snr
from mtlkernels.testing import Case, CaseFactory
from mtlkernels.testing.snr import snr_aver, snr_trans
from tests import requires
from tests.ops.derivatives import leaves_of, loss_of

pytestmark = requires.cpp_kernels
KINDS = pytest.mark.parametrize("kind", ["matrices", "stacked", "joined", "aver"])
CLOSED_GRAD = pytest.mark.parametrize("closed_grad", [True, False])


def case_of(kind: str, outputs: int = 2, **options: Any) -> tuple[Any, Case]:
    make = CaseFactory(0, torch.float32)
    if kind == "aver":
        return mk.snr_aver, snr_aver(make, 5, 6, 3, outputs, **options)
    stacked = kind != "matrices"
    widths = [4] * outputs if stacked else [4, 7, 2][:outputs]
    case = snr_trans(make, 5, [6, 6, 6] if stacked else [6, 3, 5], widths, stacked=stacked)
    if kind == "joined":
        case.arguments["u"] = torch.stack([u.detach() for u in case.arguments["u"]]).requires_grad_()
    return mk.snr_trans, Case({**case.arguments, **options}, case.dtype)


def by_reference(op: Any, case: Case, outputs: list[int]) -> list[Tensor | None]:
    with mk.use_backend("reference"):
        found = op(**case.arguments)
    loss = loss_of(lambda: [found[i] for i in outputs])()
    return list(torch.autograd.grad(loss, leaves_of(case), allow_unused=True))


def watched() -> Any:
    """Counts the backward passes that run in Python."""
    return mock.patch.object(_snr.Routes, "backward", wraps=_snr.Routes.backward)


@KINDS
@CLOSED_GRAD
def test_trains_past_python(kind: str, closed_grad: bool) -> None:
    op, case = case_of(kind, closed_grad=closed_grad)
    expected = by_reference(op, case, [0, 1])
    outputs = op(**case.arguments)
    names = {y.grad_fn.name() for y in outputs}
    assert names == {"mtlkernels::RoutesBackward"}
    with watched() as in_python:
        found = torch.autograd.grad(loss_of(lambda: outputs)(), leaves_of(case))
    assert not in_python.called
    torch.testing.assert_close(list(found), expected)


@KINDS
@CLOSED_GRAD
@pytest.mark.parametrize("used", [[0], [2], [0, 1], [0, 2]], ids=str)
@pytest.mark.parametrize("again", [False, True])
def test_outputs_without_a_gradient(kind: str, closed_grad: bool, used: list[int], again: bool) -> None:
    """Of which matrices have none either: so a step under PCGrad goes. Past Python, but for a second derivative."""
    op, case = case_of(kind, 3, closed_grad=closed_grad)
    expected, leaves, outputs = by_reference(op, case, used), leaves_of(case), op(**case.arguments)
    loss = loss_of(lambda: [outputs[i] for i in used])()
    with watched() as in_python:
        found = torch.autograd.grad(loss, leaves, allow_unused=True, create_graph=again)
    assert in_python.call_count == again
    assert [grad is None for grad in found] == [grad is None for grad in expected]
    torch.testing.assert_close(list(found), expected)


@KINDS
def test_only_gradients_that_are_wanted_of_some_outputs(kind: str) -> None:
    op, case = case_of(kind, 3)
    expected, leaves, outputs = by_reference(op, case, [1]), leaves_of(case), op(**case.arguments)
    for leaf, grad in zip(leaves, expected, strict=True):
        loss = loss_of(lambda: [outputs[1]])()
        (found,) = torch.autograd.grad(loss, [leaf], allow_unused=True, retain_graph=True)
        assert (found is None) == (grad is None)
        torch.testing.assert_close(found, grad)


@KINDS
def test_no_output_with_a_gradient(kind: str) -> None:
    """As where a user's function behind it gives none."""

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return None

    op, case = case_of(kind)
    loss = sum(Nothing.apply(y).sum() for y in op(**case.arguments))
    assert not any(torch.is_tensor(g) for g in torch.autograd.grad(loss, leaves_of(case), allow_unused=True))


@KINDS
def test_compiled_autograd(kind: str) -> None:
    op, case = case_of(kind)
    expected = by_reference(op, case, [0, 1])
    loss = loss_of(lambda: op(**case.arguments))()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        loss.backward()
    torch.testing.assert_close([leaf.grad for leaf in leaves_of(case)], expected)


class Refusing(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "mtlkernels" in str(function):
            raise LookupError("not here")
        return function(*args, **(kwargs or {}))


@KINDS
def test_who_looks_on_sees_the_operator(kind: str) -> None:
    """And may raise, in Python's own terms."""
    op, case = case_of(kind)
    loss = loss_of(lambda: op(**case.arguments))()
    with Refusing(), pytest.raises(LookupError, match="not here"):
        loss.backward()


class Marked(torch.Tensor):
    """Of whose class PyTorch asks what is to be done with it."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))


@KINDS
def test_what_hooks_on_saved_tensors_bring_back(kind: str) -> None:
    """Tensors of other classes and in other layouts are what they hold."""
    op, case = case_of(kind)
    expected = by_reference(op, case, [0, 1])

    def unpack(packed: Tensor) -> Tensor:
        spread = packed.new_empty(*packed.shape[:-1], 2 * packed.shape[-1])[..., ::2]
        return spread.copy_(packed).as_subclass(Marked)

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), unpack):
        loss = loss_of(lambda: op(**case.arguments))()
    found = torch.autograd.grad(loss, leaves_of(case))
    torch.testing.assert_close([grad.as_subclass(Tensor) for grad in found], expected)


@KINDS
def test_what_changes_before_the_backward_pass_is_refused(kind: str) -> None:
    op, case = case_of(kind)
    loss = loss_of(lambda: op(**case.arguments))()
    with torch.no_grad():
        case.arguments["z"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@KINDS
def test_no_more_memory_after_the_backward_pass(kind: str) -> None:
    """What a call has saved goes with the pass, though its outputs stay."""
    op, case = case_of(kind)
    made = {**case.arguments, "z": case.arguments["z"] * 1}
    saved = weakref.ref(made["z"])
    outputs = op(**made)
    del made
    assert saved() is not None
    loss_of(lambda: outputs)().backward()
    assert saved() is None
    with pytest.raises(RuntimeError, match="second time"):
        loss_of(lambda: outputs)().backward()


@pytest.mark.parametrize("kind", ["matrices", "stacked", "aver"])
def test_parameters_that_move_during_calls(kind: str) -> None:
    """What is computed with stays where it is while another thread gives tensors other memory with the same values.

    Inputs in one tensor are not among them: PyTorch's own ``unbind`` takes that apart, and it crashes or waits for ever
    where its tensor gets other memory meanwhile.
    """
    op, case = case_of(kind)
    expected, leaves, done = [y.detach() for y in op(**case.arguments)], leaves_of(case), threading.Event()

    def move() -> None:
        while not done.is_set():
            for leaf in leaves:
                leaf.data = leaf.data.clone()

    mover = threading.Thread(target=move)
    mover.start()
    try:
        for _ in range(200):
            torch.testing.assert_close([y.detach() for y in op(**case.arguments)], expected)
    finally:
        done.set()
        mover.join()
