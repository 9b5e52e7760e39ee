"""Messages of errors say what to do, where one call can be mended in one way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import mtlkernels as mk

X, LOGITS, ROUTING = torch.ones(3, 4), torch.ones(3, 4), mk.Routing.mmoe(2, 2)
WEIGHTS = [torch.ones(2, 5, 4)]


def level(**given: Any) -> Any:
    arguments = {"inputs": X, "weights": WEIGHTS, "biases": None, "gate_logits": LOGITS, "routing": ROUTING, **given}
    return mk.expert_mixture(**arguments)


def backward(losses: Any, **options: Any) -> Any:
    weight = torch.ones(2, requires_grad=True)
    return mk.optim.PCGrad(torch.optim.SGD([weight]), **options).pc_backward(losses(weight))


def in_the_backend(name: str, run: Callable[[], Any]) -> Any:
    with mk.use_backend(name):
        return run()


SPARSE = torch.eye(2).to_sparse().requires_grad_()
SGD = torch.optim.SGD([torch.ones(2, requires_grad=True)])
GATES = [torch.ones(2, 4), torch.ones(2, 4)]
CALLS: list[tuple[Callable[[], Any], str]] = [
    (lambda: level(weights=[WEIGHTS[0].double()]), r"got torch.float64: cast one by .to\(dtype\)"),
    (lambda: level(weights=[WEIGHTS[0].to("meta")]), r"cpu, got meta: move one by .to\(device\)"),
    (lambda: level(weights=[[torch.ones(5, 4), torch.ones(4, 5)]]), r"\[5, 4\], got \[4, 5\]: transpose it"),
    (lambda: level(weights=[torch.ones(2, 4, 5)]), r"\[0\]\[0\] must have shape \[H_out, 4\], got \[4, 5\]: transpose"),
    (lambda: level(weights=[torch.ones(2, 5, 3)]), r"\[0\]\[0\] .* \[5, 4\], got \[5, 3\]: inputs have 4 features$"),
    (lambda: level(weights=[[torch.ones(5, 4), torch.ones(4, 7)]]), r"must have shape \[5, 4\], got \[4, 7\]$"),
    (lambda: level(gate_logits=None), "gate_logits must be .*, got NoneType and no gate_weights"),
    (
        lambda: level(gate_logits=None, gate_weights=GATES, gate_norms=[nn.BatchNorm1d(2)] * 2),
        r"gate_norms\[0\] must .*, got one that takes the batch's: call its eval\(\)",
    ),
    (lambda: backward(lambda w: [w]), r"got shape \[2\]: take its mean\(\) or sum\(\)"),
    (lambda: backward(lambda w: w.detach()), "got a tensor that does not: is no_grad on"),
    (
        lambda: backward(len, shared=[nn.Parameter(torch.ones(3))]),
        r"got another of \[3\]: add it there, or give its own",
    ),
    (lambda: mk.optim.PCGrad(mk.optim.PCGrad(SGD)), "got PCGrad: pass its .optimizer"),
    (lambda: mk.pcgrad([[SPARSE], [SPARSE]]), r"got one that does: detach\(\) it"),
    (
        lambda: in_the_backend("cuda", lambda: mk.snr_aver([X], torch.ones(1, 1))),
        r"mtlkernels.show_config\(\) for what",
    ),
]


@pytest.mark.parametrize("call, words", CALLS)
def test_what_to_do(call: Callable[[], Any], words: str) -> None:
    with pytest.raises((TypeError, ValueError, RuntimeError), match=words):
        call()
