"""What the forward pass saves of last layers, of some experts signs in its place; gradients that follow from them."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mtlkernels as mk
from mtlkernels import _extension
from mtlkernels.ops.level import reference
from mtlkernels.testing import DTYPES, Case, CaseFactory
from tests import requires
from tests.ops import agreement
from tests.ops.level import operator
from tests.ops.level.definition import formula
from tests.turns import in_turns

OPS = torch.ops.mtlkernels
INSTRUCTION_SETS = pytest.mark.parametrize("isa", _extension.instruction_sets())
KINDS = pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16], ids=str)
ROUTINGS = {
    "one gate an expert": mk.Routing((0, 0, 1), ((0, 2), (1,))),
    "one and two": mk.Routing.cgc(2, 2, 1),
    "one and many": mk.Routing((0, 0, 0), ((0, 1), (1,), (1, 2), (1,), (1,))),
}


def case(kind: torch.dtype, rows: int, routing: mk.Routing, last: str = "relu", **options: Any) -> Case:
    widths = {
        **{1: [5, 3, 1], 5: [7, 9, 8, 16], 17: [20, 33, 13], 33: [24, 16, 70], 100: [19, 24, 33], 1537: [9, 30, 41]},
        **{1100: [9, 64, 33], 1207: [5, 96, 64]},  # more than caches keep, in lines that are whole or not
    }
    names = ["tanh", "relu", "leaky_relu"][: len(widths[rows]) - 2] + [last]
    return CaseFactory(rows, kind).expert_mixture(rows, widths[rows], routing, activation=names, **options)


@INSTRUCTION_SETS
@KINDS
@pytest.mark.parametrize("rows", [1, 5, 17, 33, 100])
@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)
@pytest.mark.parametrize("last", ["relu", "none"])
def test_formula(last: str, routing: mk.Routing, rows: int, kind: torch.dtype, isa: str) -> None:
    with _extension.instruction_set(isa):
        for biases in (True, False):
            agreement.check(
                mk.expert_mixture, formula, case(kind, rows, routing, last, biases=biases), "cpp", rows % 2 + 1
            )


@INSTRUCTION_SETS
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [33, 1537])
@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)
def test_losses_at_once_as_one_by_one(routing: mk.Routing, rows: int, kind: torch.dtype, isa: str) -> None:
    """To the bit: each loss takes an expert from signs, or not, whatever others do."""
    operands = operator.of_case(case(kind, rows, routing).map(Tensor.detach))
    with _extension.instruction_set(isa):
        outputs, saved = operands.results(True)
        grads = [torch.randn_like(y) for y in outputs]
        used = [*({k} for k in range(len(grads))), {0, 1}, set(range(len(grads)))]
        losses = [[grad if k in own else None for k, grad in enumerate(grads)] for own in used]
        needs = [True] * 8
        apart = [OPS.level_backward(*operands.backward(loss, saved, needs)) for loss in losses]
        together = OPS.level_backward(*operands.backward([grad for loss in losses for grad in loss], saved, needs))
    for got, want in zip(together, [grad for own in apart for grad in own], strict=True):
        assert torch.equal(got, want)


@KINDS
@pytest.mark.parametrize("width", [0, 1, 8, 13, 33, 70])
@pytest.mark.parametrize("rows", [1, 3, 17, 100])
@pytest.mark.parametrize("isa", ["reference", *_extension.instruction_sets()])
def test_signs(isa: str, rows: int, width: int, kind: torch.dtype) -> None:
    """Bit for bit; of gates that mix a single expert the outputs are that expert's."""
    routing = mk.Routing((0, 0), ((0,), (1,)))
    operands = operator.of_case(CaseFactory(0, kind).expert_mixture(rows, [6, 20, width], routing).map(Tensor.detach))
    operands.tensors[0][rows // 2, 2] = float("nan")  # type: ignore[index]
    run = reference.forward if isa == "reference" else OPS.level_forward
    with nullcontext() if isa == "reference" else _extension.instruction_set(isa):
        outputs, (_, signs) = operands.results(True, run)
    expected = np.packbits(~(torch.stack(outputs) <= 0).numpy(), axis=-1, bitorder="little")
    assert signs.dtype == torch.uint8 and np.array_equal(signs.numpy(), expected)


LASTS, ROWS = ("relu", "none", "silu", "tanh"), (1, 5, 17, 100, 1100, 1207)


@pytest.mark.parametrize(
    "last, rows, kind, isa, name",
    in_turns(list(ROUTINGS), LASTS, ROWS, DTYPES, _extension.instruction_sets()),
    ids=str,
)
def test_last_layers(last: str, rows: int, kind: torch.dtype, isa: str, name: str) -> None:
    """Those of experts that several gates mix, in panels; of all where signs would not do."""
    routing = ROUTINGS[name]
    operands = operator.of_case(case(kind, rows, routing, last).map(Tensor.detach))
    _, expected = operands.results(True, reference.forward)
    with _extension.instruction_set(isa):
        _, saved = operands.results(True)
    uses = [sum(e in experts for experts in routing.gate_experts) for e in range(len(routing.expert_inputs))]
    count = len(uses) if last in ("silu", "tanh") or kind == torch.float16 else sum(own > 1 for own in uses)
    stacked = [len(values) for values in saved if values.dtype == kind]
    assert stacked == [len(uses)] * (len(operands.spec.layers) - 1) + [count] * (count > 0)
    for got, want in zip(saved, expected, strict=True):
        assert got.dtype == want.dtype
        if got.dtype == kind:
            scale = want.abs().max().item()  # this is about places; precision is above
            torch.testing.assert_close(got, want, rtol=0, atol=16 * torch.finfo(kind).eps * scale)


@INSTRUCTION_SETS
@KINDS
@pytest.mark.parametrize("rows", [3, 17, 40])
def test_nan_in_a_hidden_layer(rows: int, kind: torch.dtype, isa: str) -> None:
    """relu lets the gradient pass there, so that that of the biases is finite and has the row in it."""
    routing = mk.Routing((0, 0), ((0, 1), (0, 1)))
    operands = operator.of_case(CaseFactory(0, kind).expert_mixture(rows, [6, 45, 24], routing).map(Tensor.detach))
    operands.tensors[0][rows // 2, 2] = float("nan")  # type: ignore[index]
    with _extension.instruction_set(isa):
        outputs, saved = operands.results(True)
        asked = operands.backward([torch.ones_like(y) for y in outputs], saved, [i == 2 for i in range(8)])
        found = OPS.level_backward(*asked)
    for got, want in zip(found, reference.backward(*asked), strict=True):
        assert want.isfinite().all()
        error = (2 if kind == torch.bfloat16 else 64) * torch.finfo(kind).eps  # less than a row's part
        torch.testing.assert_close(got, want, rtol=0, atol=error * want.abs().max().item())


@pytest.mark.parametrize("rows", [5, 16, 20])
def test_vmap(backend: str, rows: int) -> None:
    """Panels of examples that become rows of one call are not those of each example."""
    a = CaseFactory(0, torch.float64).expert_mixture(rows, [6, 9, 7], mk.Routing((0, 0), ((0, 1), (1, 0)))).arguments
    weights = [[w.detach() for w in layer] for layer in a["weights"]]
    (x,), logits = ([tensor.detach() for tensor in a[name]] for name in ("inputs", "gate_logits"))

    def loss(x: Tensor, *logits: Tensor) -> Tensor:
        outputs = mk.expert_mixture([x], weights, None, list(logits), a["routing"], activation="tanh")
        return sum((y**2).sum() * (k + 1) for k, y in enumerate(outputs))  # type: ignore[return-value]

    examples = [torch.stack([tensor, -tensor, tensor.flip(0)]) for tensor in (x, *logits)]
    gradient = torch.func.grad(loss, (0, 1, 2))
    with mk.use_backend(backend):
        found = torch.func.vmap(gradient)(*examples)
        wanted = [gradient(*example) for example in zip(*examples, strict=True)]
    for got, want in zip(found, zip(*wanted, strict=True), strict=True):
        torch.testing.assert_close(got, torch.stack(want))


@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, 50])
def test_panels(rows: int) -> None:
    values = torch.randn(2, rows, 3)
    found = reference.panels(values)
    full = rows // 16 * 16
    parts = [values[0, first : first + 16].t() for first in range(0, full, 16)] + [values[0, full:]]
    assert torch.equal(found[0], torch.cat([part.flatten() for part in parts]))
    assert torch.equal(reference.rows_of_panels(found, rows, 3), values)


@requires.cpp_kernels
@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda last, _: [last], ValueError, "saved must hold 3 tensors, got 2"),
        (
            lambda last, signs: [last.repeat(2, 1), signs],
            ValueError,
            r"saved\[1\] must have shape \[1, 221\], got \[2, 221\]",
        ),
        (
            lambda last, signs: [last.view(1, 17, 13), signs],
            ValueError,
            r"saved\[1\] must have shape \[1, 221\], got \[1, 17, 13\]",
        ),
        (
            lambda last, signs: [last, signs.float()],
            TypeError,
            r"saved\[2\] must be a dense tensor of Byte, got Strided of Float",
        ),
        (
            lambda last, signs: [last, signs[:, :, 1:]],
            ValueError,
            r"saved\[2\] must have shape \[4, 17, 2\], got \[4, 17, 1\]",
        ),
    ],
)
def test_refusals(wrong: Any, error: type[Exception], message: str) -> None:
    operands = operator.of_case(case(torch.float32, 17, ROUTINGS["one and two"]).map(Tensor.detach))
    outputs, (hidden, *others) = operands.results(True)
    with pytest.raises(error, match=message):
        OPS.level_backward(*operands.backward(outputs, [hidden, *wrong(*others)], [True] * 8))
