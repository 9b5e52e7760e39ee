"""Every mistake gets a ValueError or TypeError that names the argument, what was expected and what was found."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import mtlkernels as mk
from mtlkernels.testing import CaseFactory

# Two tasks, two specific experts each and one shared: 5 experts, 3 streams, gates of 3, 3 and 5.
ROUTING = mk.Routing.cgc(2, 2, 1, shared_gate=True)
Mistake = tuple[str, Callable[[dict[str, Any]], None], type[Exception], str]


def put(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    """A mistake: ``value`` at a place in the arguments; a function of what is there, or the thing itself."""

    def make(arguments: dict[str, Any]) -> None:
        at: Any = arguments
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value(at[path[-1]]) if callable(value) and not isinstance(value, (Tensor, type)) else value

    return make


def drop(*path: Any) -> Callable[[dict[str, Any]], None]:
    """A mistake: the last entry of a list is missing."""
    return put(*path, value=lambda entries: entries[:-1])


def zeros(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(*shape, **options)


LOGITS: list[Mistake] = [
    ("logits of a kind", put("gate_logits", value=3.0), TypeError, r"gate_logits must be .*tensor.*, got float"),
    ("logits none", put("gate_logits", value=None), TypeError, r"gate_logits must be .*, got NoneType"),
    ("logits a generator", put("gate_logits", value=lambda ls: iter(ls)), TypeError, r"gate_logits must be .*iterator"),
    ("too few gates", drop("gate_logits"), ValueError, r"gate_logits .* each of 3 gates, got 2"),
    ("no gates", put("gate_logits", value=[]), ValueError, r"gate_logits .* each of 3 gates, got 0"),
    (
        "gate of a kind",
        put("gate_logits", 1, value=[0.0]),
        TypeError,
        r"gate_logits\[1\] must be a tensor .*, got list",
    ),
    ("gate width", put("gate_logits", 1, value=zeros(6, 4)), ValueError, r"gate_logits\[1\] .*\[6, 3\], got \[6, 4\]"),
    ("gate rows", put("gate_logits", 2, value=zeros(5, 5)), ValueError, r"gate_logits\[2\] .*\[6, 5\], got \[5, 5\]"),
    ("gate 1-D", put("gate_logits", 0, value=zeros(3)), ValueError, r"gate_logits\[0\] must have shape .*, got \[3\]"),
    (
        "gate integer",
        put("gate_logits", 0, value=zeros(6, 3, dtype=torch.int64)),
        TypeError,
        r"gate_logits\[0\] must be float32, .*, got torch.int64",
    ),
    (
        "gate float64",
        put("gate_logits", value=lambda ls: [x.double() for x in ls]),
        TypeError,
        r"gate_logits\[0\] must .*float32.*, got torch.float64",
    ),
    (
        "gates of two dtypes",
        put("gate_logits", 2, value=lambda x: x.half()),
        TypeError,
        r"gate_logits\[2\] must have the dtype of .*torch.float32, got torch.float16",
    ),
    (
        "gate device",
        put("gate_logits", 1, value=zeros(6, 3, device="meta")),
        ValueError,
        r"gate_logits\[1\] must be on .*cpu, got meta",
    ),
    (
        "gate sparse",
        put("gate_logits", 0, value=zeros(6, 3).to_sparse()),
        TypeError,
        r"gate_logits\[0\] .*dense.*sparse",
    ),
    ("joined width", put("gate_logits", value=zeros(6, 12)), ValueError, r"gate_logits .*\[6, 11\].*, got \[6, 12\]"),
    ("joined rows", put("gate_logits", value=zeros(7, 11)), ValueError, r"gate_logits .*\[6, .*\], got \[7, "),
    ("joined 3-D", put("gate_logits", value=zeros(6, 11, 1)), ValueError, r"gate_logits .*, got \[6, 11, 1\]"),
    ("routing a tuple", put("routing", value=((0,), ((0,),))), TypeError, r"routing must be .*Routing, got tuple"),
    ("routing none", put("routing", value=None), TypeError, r"routing must be .*Routing, got NoneType"),
]

GATED: list[Mistake] = [
    (
        "experts a list",
        put("experts", value=lambda t: [t]),
        TypeError,
        r"experts must be a tensor \[B, E, H\], got list",
    ),
    (
        "experts 2-D",
        put("experts", value=zeros(6, 5)),
        ValueError,
        r"experts must have shape \[B, E, H\], got \[6, 5\]",
    ),
    ("experts too few", put("experts", value=zeros(6, 4, 7)), ValueError, r"experts .*\[B, 5, H\].*, got \[6, 4, 7\]"),
    (
        "experts integer",
        put("experts", value=zeros(6, 5, 7, dtype=torch.int32)),
        TypeError,
        r"experts must be float32.*, got torch.int32",
    ),
    (
        "experts complex",
        put("experts", value=zeros(6, 5, 7, dtype=torch.complex64)),
        TypeError,
        r"experts must be float32.*, got torch.complex64",
    ),
    ("experts sparse", put("experts", value=zeros(6, 5, 7).to_sparse()), TypeError, r"experts .*dense.*sparse"),
]

EXPERT: list[Mistake] = [
    ("inputs of a kind", put("inputs", value="x"), TypeError, r"inputs must be a tensor .*, got str"),
    ("inputs none", put("inputs", value=None), TypeError, r"inputs must be a tensor .*, got NoneType"),
    ("too few streams", drop("inputs"), ValueError, r"inputs .* 3 streams .*, got 2"),
    ("no streams", put("inputs", value=[]), ValueError, r"inputs .* 3 streams .*, got 0"),
    ("stream of a kind", put("inputs", 1, value=None), TypeError, r"inputs\[1\] must be a tensor .*, got NoneType"),
    ("stream 3-D", put("inputs", 0, value=zeros(6, 4, 1)), ValueError, r"inputs\[0\] .*\[B, D\], got \[6, 4, 1\]"),
    ("stream width", put("inputs", 2, value=zeros(6, 5)), ValueError, r"inputs\[2\] .*\[6, 4\], got \[6, 5\]"),
    ("stream rows", put("inputs", 1, value=zeros(7, 4)), ValueError, r"inputs\[1\] .*\[6, 4\], got \[7, 4\]"),
    (
        "stream dtype",
        put("inputs", 1, value=lambda x: x.bfloat16()),
        TypeError,
        r"inputs\[1\] must have the dtype of inputs\[0\], torch.float32, got torch.bfloat16",
    ),
    (
        "stream device",
        put("inputs", 1, value=zeros(6, 4, device="meta")),
        ValueError,
        r"inputs\[1\] .*device.* cpu, got meta",
    ),
    (
        "integer input",
        put("inputs", value=zeros(6, 4, dtype=torch.int64)),
        TypeError,
        r"inputs must be float32.*, got torch.int64",
    ),
    ("1-D input", put("inputs", value=zeros(4)), ValueError, r"inputs must have shape \[B, D\], got \[4\]"),
    (
        "weights a tensor",
        put("weights", value=zeros(5, 3, 4)),
        TypeError,
        r"weights must be a sequence.*, got a tensor",
    ),
    ("weights none", put("weights", value=None), TypeError, r"weights must be a sequence.*, got NoneType"),
    ("no layers", put("weights", value=[]), ValueError, r"weights must hold at least one layer, got none"),
    ("layer none", put("weights", 1, value=None), TypeError, r"weights\[1\] must be .*, got NoneType"),
    ("expert missing", drop("weights", 1), ValueError, r"weights\[1\] .*5 experts, got 4"),
    (
        "weight of a kind",
        put("weights", 0, 2, value=1.0),
        TypeError,
        r"weights\[0\]\[2\] must be a tensor .*, got float",
    ),
    (
        "weight fan-in",
        put("weights", 0, 3, value=zeros(8, 9)),
        ValueError,
        r"weights\[0\]\[3\] .*\[8, 4\], got \[8, 9\]",
    ),
    (
        "weight width",
        put("weights", 0, 3, value=zeros(9, 4)),
        ValueError,
        r"weights\[0\]\[3\] .*\[8, 4\], got \[9, 4\]",
    ),
    (
        "weight of the layer below",
        put("weights", 1, value=lambda ws: [zeros(3, 7) for _ in ws]),
        ValueError,
        r"weights\[1\]\[0\] .*\[3, 8\], got \[3, 7\]",
    ),
    ("weight 1-D", put("weights", 1, 0, value=zeros(8)), ValueError, r"weights\[1\]\[0\] .*, 8\], got \[8\]"),
    (
        "weight dtype",
        put("weights", 1, 4, value=lambda w: w.double()),
        TypeError,
        r"weights\[1\]\[4\] must have the dtype of inputs, torch.float32, got torch.float64",
    ),
    (
        "weight device",
        put("weights", 1, 4, value=zeros(3, 8, device="meta")),
        ValueError,
        r"weights\[1\]\[4\] .*device of inputs, cpu, got meta",
    ),
    (
        "stacked weights too few",
        put("weights", 0, value=zeros(4, 8, 4)),
        ValueError,
        r"weights\[0\] .*\[5, H_out, 4\], got \[4, 8, 4\]",
    ),
    (
        "stacked weights 2-D",
        put("weights", 0, value=zeros(8, 4)),
        ValueError,
        r"weights\[0\] .*\[5, H_out, 4\], got \[8, 4\]",
    ),
    ("stacked fan-in", put("weights", 0, value=zeros(5, 8, 5)), ValueError, r"weights\[0\].*8, 4\], got .*8, 5\]"),
    ("biases a tensor", put("biases", value=zeros(5, 8)), TypeError, r"biases must be None or .*, got a tensor"),
    ("biases a number", put("biases", value=0.0), TypeError, r"biases must be None or .*, got float"),
    ("biases too few", drop("biases"), ValueError, r"biases must hold .* 2 layers, got 1"),
    ("bias missing", drop("biases", 0), ValueError, r"biases\[0\] .*5 experts, got 4"),
    ("bias width", put("biases", 1, 2, value=zeros(4)), ValueError, r"biases\[1\]\[2\] .*\[3\], got \[4\]"),
    ("bias 2-D", put("biases", 1, 2, value=zeros(1, 3)), ValueError, r"biases\[1\]\[2\] .*\[3\], got \[1, 3\]"),
    (
        "bias of a kind",
        put("biases", 1, 2, value=None),
        TypeError,
        r"biases\[1\]\[2\] must be a tensor .*, got NoneType",
    ),
    (
        "bias dtype",
        put("biases", 0, 0, value=lambda b: b.half()),
        TypeError,
        r"biases\[0\]\[0\] must have the dtype of inputs, torch.float32, got torch.float16",
    ),
    (
        "bias device",
        put("biases", 0, 0, value=zeros(8, device="meta")),
        ValueError,
        r"biases\[0\]\[0\] .*device of inputs, cpu, got meta",
    ),
    ("stacked biases", put("biases", 0, value=zeros(5, 9)), ValueError, r"biases\[0\].*\[8\], got \[9\]"),
    (
        "activation unknown",
        put("activation", value="rlu"),
        ValueError,
        r"activation must be one of none, relu, .*, got 'rlu'",
    ),
    (
        "activation per layer",
        put("activation", value=["relu", "Relu"]),
        ValueError,
        r"activation.* must be one of none, relu, .*, got 'Relu'",
    ),
    ("activations too many", put("activation", value=["relu"] * 3), ValueError, r"activation .* 2 layers, got 3"),
    ("activation none", put("activation", value=None), TypeError, r"activation must be a name .*, got NoneType"),
    ("activation a list", put("activation", value=[["relu"], "relu"]), TypeError, r"activation .*names, got list"),
    ("activation a function", put("activation", value=[torch.relu, "relu"]), TypeError, r"activation .*names, got "),
]


def gated() -> dict[str, Any]:
    return dict(CaseFactory(0, torch.float32).gated_mixture(6, 7, ROUTING).arguments)


def expert() -> dict[str, Any]:
    return dict(CaseFactory(0, torch.float32).expert_mixture(6, [4, 8, 3], ROUTING).arguments)


@pytest.fixture(params=["training", "serving"], autouse=True)
def _mode(request: pytest.FixtureRequest) -> Iterator[None]:
    """Serving may take another way to the operator than training."""
    with torch.set_grad_enabled(request.param == "training"):
        yield


def check(op: Callable[..., Any], arguments: dict[str, Any], mistake: Mistake, monkeypatch: pytest.MonkeyPatch) -> None:
    _, make, kind, message = mistake
    make(arguments)

    def computed(*_: Any) -> None:
        raise AssertionError("computed before all checks have passed")

    monkeypatch.setattr("mtlkernels.ops._call.implementation", computed)
    for module in ("gated_mixture", "level"):
        monkeypatch.setattr(f"mtlkernels.ops.{module}.autograd.implementation", computed)
    with pytest.raises((ValueError, TypeError)) as caught:
        op(**arguments)
    assert caught.type is kind
    assert re.search(message, str(caught.value)), str(caught.value)


@pytest.mark.parametrize("mistake", LOGITS + GATED, ids=lambda m: m[0])
def test_gated_mixture(mistake: Mistake, monkeypatch: pytest.MonkeyPatch) -> None:
    check(mk.gated_mixture, gated(), mistake, monkeypatch)


@pytest.mark.parametrize("mistake", LOGITS + EXPERT, ids=lambda m: m[0])
def test_expert_mixture(mistake: Mistake, monkeypatch: pytest.MonkeyPatch) -> None:
    check(mk.expert_mixture, expert(), mistake, monkeypatch)


def test_arguments_without_a_mistake_pass() -> None:
    mk.gated_mixture(**gated())
    mk.expert_mixture(**expert())
