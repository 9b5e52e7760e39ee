"""The node that C++ puts into autograd's graph: which passes it runs itself, and which it hands to Python."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import mtlkernels as mk
from mtlkernels import _extension
from mtlkernels.ops.level.node import level_of
from tests import requires
from tests.seeding import seed

pytestmark = requires.cpp_kernels
ROOT = str(Path(mk.__file__).parent)


class Level:
    """A level in float64 and the tensors that it is a function of; ``linear``: its gates are layers."""

    def __init__(self, linear: bool = True, **options: Any) -> None:
        seed(0)
        self.options, self.routing = options, mk.Routing.cgc(2, 2, 1, single_input=True)
        sizes = [len(gate) for gate in self.routing.gate_experts]

        def made(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.float64, requires_grad=True)

        self.x = made(6, 5)
        self.weights = [[made(b, a) for _ in range(self.routing.num_experts)] for a, b in ((5, 4), (4, 3))]
        self.biases = [[made(4) for _ in self.weights[0]], None]
        self.gates = [made(size, 5) if linear else made(6, size) for size in sizes]
        self.linear = linear

    @property
    def tensors(self) -> list[Tensor]:
        biases = self.biases[0]
        assert biases is not None
        return [self.x, *self.weights[0], *self.weights[1], *biases, *self.gates]

    def __call__(self) -> tuple[Tensor, ...]:
        gates = {"gate_logits": None, "gate_weights": self.gates} if self.linear else {"gate_logits": self.gates}
        return mk.expert_mixture(
            self.x, self.weights, self.biases, routing=self.routing, activation="tanh", **gates, **self.options
        )

    def loss(self) -> Tensor:
        return torch.stack([y.square().sum() for y in self()]).sum()


class Watching(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def is_from_cpp(y: Tensor) -> bool:
    return not hasattr(y.grad_fn, "saved_tensors") and level_of(y.grad_fn) is not None


@contextmanager
def python_calls() -> Iterator[list[str]]:
    """The functions of this package that are called meanwhile."""
    found: list[str] = []

    def profile(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(ROOT):
            found.append(frame.f_code.co_name)

    sys.setprofile(profile)
    try:
        yield found
    finally:
        sys.setprofile(None)


def by_function(level: Level, run: Callable[[], Any]) -> Any:
    """What ``run`` returns where the level goes by the Function in Python."""
    with mk.use_backend("reference"):
        assert not is_from_cpp(level()[0])
        return run()


@pytest.mark.parametrize("linear", [True, False])
def test_a_backward_pass_without_python(linear: bool) -> None:
    level = Level(linear)
    expected = by_function(level, lambda: torch.autograd.grad(level.loss(), level.tensors))
    loss = level.loss()
    assert all(is_from_cpp(y) for y in level())
    with python_calls() as calls:
        found = torch.autograd.grad(loss, level.tensors)
    assert not calls
    torch.testing.assert_close(found, expected)


def test_what_is_printed_of_an_output() -> None:
    assert "grad_fn=<ExpertMixtureBackward>" in repr(Level()()[0])


@pytest.mark.parametrize("linear", [True, False])
def test_some_outputs_and_some_tensors(linear: bool) -> None:
    """None where no gradient reaches a tensor; those that are not asked for are not computed."""
    level = Level(linear)
    for k in range(len(level.gates)):
        for wanted in (level.tensors, [level.x], [level.gates[k]], level.weights[1]):
            options: dict[str, Any] = {"inputs": wanted, "allow_unused": True}
            expected = by_function(level, lambda k=k, o=options: torch.autograd.grad(level()[k].sum(), **o))
            found = torch.autograd.grad(level()[k].sum(), **options)
            assert [grad is None for grad in found] == [grad is None for grad in expected]
            torch.testing.assert_close(found, expected)


def test_tensors_that_want_no_gradient() -> None:
    level = Level()
    frozen = [level.x, level.weights[0][1], level.gates[0]]
    for tensor in frozen:
        tensor.requires_grad_(False)
    rest = [tensor for tensor in level.tensors if tensor.requires_grad]
    expected = by_function(level, lambda: torch.autograd.grad(level.loss(), rest))
    level.loss().backward()
    torch.testing.assert_close(tuple(tensor.grad for tensor in rest), expected)
    assert all(tensor.grad is None for tensor in frozen)


@pytest.mark.parametrize("linear", [True, False])
def test_derivatives_of_gradients(linear: bool) -> None:
    level = Level(linear)

    def twice() -> Any:
        grads = torch.autograd.grad(level.loss(), level.tensors, create_graph=True)
        return torch.autograd.grad(torch.stack([grad.square().sum() for grad in grads]).sum(), level.tensors)

    torch.testing.assert_close(twice(), by_function(level, twice))


def test_batched_gradients() -> None:
    level = Level()
    cotangents = torch.randn(3, 6, 3, dtype=torch.float64)

    def batched() -> Any:
        return torch.autograd.grad(level()[0], [level.x], cotangents, is_grads_batched=True)

    torch.testing.assert_close(batched(), by_function(level, batched))


def test_a_mode_around_the_backward_pass_sees_it() -> None:
    level = Level()
    expected = by_function(level, lambda: torch.autograd.grad(level.loss(), level.tensors))
    loss = level.loss()
    with Watching() as watching:
        found = torch.autograd.grad(loss, level.tensors, retain_graph=True)
    assert torch.ops.mtlkernels.level_backward.default in watching.seen
    torch.testing.assert_close(found, expected)
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(loss, level.tensors)
    assert counter.get_total_flops() > 0


def test_a_graph_is_used_up_unless_it_is_kept() -> None:
    level = Level()
    loss = level.loss()
    first = torch.autograd.grad(loss, level.tensors, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, level.tensors), first, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, level.tensors)


@pytest.mark.parametrize("which", ["x", "weight", "gate"])
def test_a_tensor_that_was_changed_is_an_error(which: str) -> None:
    level = Level()
    loss = level.loss()
    tensor = {"x": level.x, "weight": level.weights[1][0], "gate": level.gates[0]}[which]
    with torch.no_grad():
        tensor.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("watched", [False, True])
def test_an_error_of_a_hook_reaches_the_caller(watched: bool) -> None:
    """Also through Python and back."""
    level = Level()

    def unpack(_: Any) -> Tensor:
        raise ZeroDivisionError

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
        loss = level.loss()
    mode = Watching() if watched else nullcontext()
    with mode, pytest.raises(ZeroDivisionError):
        loss.backward()


def test_what_a_graph_holds_is_let_go_of() -> None:
    level = Level()
    packed: list[int] = []

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor
            packed.append(1)

        def __del__(self) -> None:
            packed.pop()

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        loss = level.loss()
    assert len(packed) > len(level.tensors)
    loss.backward()
    assert not packed
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        loss = level.loss()
    del loss
    assert not packed


def test_graphs_in_several_threads() -> None:
    level = Level()
    expected = torch.autograd.grad(level.loss(), level.tensors)
    found: list[Any] = []

    def run() -> None:
        for i in range(20):
            loss = level.loss()
            with Watching() if i % 2 else nullcontext():
                found.append(torch.autograd.grad(loss, level.tensors))

    threads = [Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 80
    for grads in found:
        torch.testing.assert_close(grads, expected, rtol=0, atol=0)


def test_one_graph_in_several_threads() -> None:
    level = Level()
    loss = level.loss()
    expected = torch.autograd.grad(loss, level.tensors, retain_graph=True)
    found: list[Any] = []

    def run(watched: bool) -> None:
        with Watching() if watched else nullcontext():
            for _ in range(10):
                found.append(torch.autograd.grad(loss, level.tensors, retain_graph=True))

    threads = [Thread(target=run, args=(i % 2 == 1,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 40
    for grads in found:
        torch.testing.assert_close(grads, expected)


def test_compiled_autograd() -> None:
    level = Level()
    expected = torch.autograd.grad(level.loss(), level.tensors)
    for _ in range(2):
        for tensor in level.tensors:
            tensor.grad = None
        loss = level.loss()
        assert is_from_cpp(level()[0])
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
            loss.backward()
        torch.testing.assert_close(tuple(tensor.grad for tensor in level.tensors), expected)


def test_compiled_autograd_of_many_experts() -> None:
    """Of whose numbers not every byte is a letter."""
    experts = [torch.randn(5, 6, requires_grad=i == 129) for i in range(130)]  # each that is trained takes long
    ys = mk.expert_mixture(torch.randn(4, 6), [experts], None, [torch.randn(4, 130)], mk.Routing.mmoe(130, 1))
    (expected,) = torch.autograd.grad(ys[0].square().sum(), experts[-1], retain_graph=True)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        ys[0].square().sum().backward()
    torch.testing.assert_close(experts[-1].grad, expected)


def test_an_error_in_python_reaches_the_caller() -> None:
    class Failing(Watching):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.mtlkernels.level_backward.default:
                raise ZeroDivisionError
            return func(*args, **(kwargs or {}))

    loss = Level().loss()
    with Failing(), pytest.raises(ZeroDivisionError):
        loss.backward()


class Twice(torch.autograd.Function):
    """A node that Python runs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return 2 * grads[0]


@pytest.mark.skipif(not _extension.has_module(), reason="no direct way from this Python")
@pytest.mark.parametrize("make", [lambda: Level()()[0], lambda: Twice.apply(torch.ones(2, requires_grad=True))])
@pytest.mark.parametrize("kind", ["register_hook", "register_prehook"])
def test_hooks_on_nodes(kind: str, make: Callable[[], Tensor]) -> None:
    y, has_hooks = make(), _extension.function("has_node_hooks")
    node = y.grad_fn  # which older versions of PyTorch hold by the tensor alone
    assert node is not None and not has_hooks(node)
    hook = getattr(node, kind)(lambda *args: None)
    assert has_hooks(node)
    hook.remove()
    assert not has_hooks(object())
