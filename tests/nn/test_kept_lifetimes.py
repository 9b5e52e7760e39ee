"""Kept calls keep nothing alive, go with their modules, and hold what they read while other threads run."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import mtlkernels as mk
from mtlkernels import _extension
from mtlkernels.ops.level.kept import KeptCalls
from tests.nn.serving import TRUNKS, are_kept, equal, fresh, keeps, kept, levels, serve

pytestmark = pytest.mark.skipif(not _extension.has_module(), reason="no direct way from this Python")


def test_nothing_is_kept_alive() -> None:
    model, x = kept("MMoE"), torch.randn(5, 20)
    layer = model.level.experts[0].linears[0]
    old = weakref.ref(layer.weight)
    layer.weight = nn.Parameter(torch.zeros_like(layer.weight))
    gc.collect()
    assert old() is None
    assert equal(serve(model, x), serve(fresh(model), x))
    gone = weakref.ref(model.level)
    del model, layer
    gc.collect()
    assert gone() is None


def test_the_class_of_a_tensor_is_held() -> None:
    """An object of another class that lies where it lay is no tensor."""
    model, x = TRUNKS["PLE"](batch_norm=True).eval(), torch.randn(5, 20)
    own = levels(model)[0].experts[0]

    class Tagged(Tensor):
        pass

    own.register_buffer("tag", torch.zeros(3).as_subclass(Tagged))
    expected = [serve(model, x) for _ in range(4)][0]
    assert are_kept(model)
    held = weakref.ref(Tagged)
    own._buffers["tag"] = None
    del Tagged
    gc.collect()
    assert held() is not None
    assert equal(serve(model, x), expected)


def test_parameters_may_be_swapped() -> None:
    model, x = kept("MMoE"), torch.randn(5, 20)
    layer = model.level.experts[0].linears[0]
    torch.utils.swap_tensors(layer.weight, nn.Parameter(torch.zeros_like(layer.weight)))
    assert equal(serve(model, x), serve(fresh(model), x))


def test_copies_keep_nothing() -> None:
    model, x = kept("PLE"), torch.randn(5, 20)
    expected = serve(model, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not any(map(keeps, levels(other)))
        assert all(equal(serve(other, x), expected) for _ in range(4)) and are_kept(other)
    assert are_kept(model)
    assert not any("_calls" in key for key in model.state_dict())
    shallow = copy.copy(levels(model)[0])
    assert shallow._calls is levels(model)[0]._calls
    shallow._modules = dict(shallow._modules)
    shallow.experts = copy.deepcopy(shallow.experts)
    with torch.no_grad():
        for expert in shallow.experts:
            for parameter in expert.parameters():
                parameter.zero_()
        for _ in range(8):
            assert not any(y.any() for y in shallow(x))
            assert equal(serve(model, x), expected)


def test_modules_that_keep_changing_are_seldom_read() -> None:
    model, x = TRUNKS["MMoE"]().eval(), torch.randn(2, 20)
    own = {name: p.detach() for name, p in model.named_parameters()}
    other = {name: -p for name, p in own.items()}
    with torch.no_grad():
        expected = [list(functional_call(model, parameters, (x,))) for parameters in (own, other)]
    with (
        mock.patch.object(KeptCalls, "keep_trunk", autospec=True, side_effect=KeptCalls.keep_trunk) as keep,
        torch.no_grad(),
    ):
        for i in range(3000):
            parameters = [own, other][i % 2]
            for y, true in zip(functional_call(model, parameters, (x,)), expected[i % 2], strict=True):
                assert torch.equal(y, true)
        assert 2 <= keep.call_count <= 24
    assert all(equal(serve(model, x), expected[0]) for _ in range(3))


@pytest.mark.parametrize("batch_norm", [False, True])
def test_weights_that_go_while_others_serve(batch_norm: bool) -> None:
    """Memory that nobody else holds any more is held until the call is over."""
    model = mk.nn.MMoE(256, 2, (512, 64), num_experts=4, batch_norm=batch_norm).eval()
    x = torch.randn(2, 256)
    layer: Any = model.level.experts[3].linears[0]
    values = [layer.weight.detach().clone(), torch.zeros_like(layer.weight)]
    expected = []
    for value in values:
        layer.weight = nn.Parameter(value.clone())
        expected.append(serve(fresh(model), x))
    wrong: list[list[Tensor]] = []
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            found = serve(model, x)
            if not any(equal(found, true) for true in expected):
                wrong.append(found)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for i in range(600):
        fill = torch.full_like(values[0], 1e6)  # takes the memory of a weight that is gone
        layer.weight = nn.Parameter(values[i % 2].clone())
        del fill
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong


def test_several_threads_at_once() -> None:
    model = kept("PLE")
    inputs = [torch.randn(rows, 20) for rows in (1, 4, 16, 50)]
    expected = [serve(model, x) for x in inputs]
    wrong: list[int] = []

    def run(i: int) -> None:
        for _ in range(200):
            if not equal(serve(model, inputs[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(50):  # what is kept may go while others serve by it
        for level in levels(model):
            level._calls._kept = level._calls._trunk = None
            level._calls = KeptCalls()
    for thread in threads:
        thread.join()
    assert not wrong
