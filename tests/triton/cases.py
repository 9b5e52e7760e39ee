"""Cases for the Triton kernels, and how they are checked; for the interpreter and for GPUs alike."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from mtlkernels import testing
from mtlkernels.ops._table import Table
from mtlkernels.ops.activations import ACTIVATIONS
from mtlkernels.ops.gated_mixture import reference as mixture_reference
from mtlkernels.ops.level import reference
from mtlkernels.ops.level.spec import Groups, Layer, LevelSpec
from tests.ops.level.operator import Operands


@dataclass(frozen=True)
class Case:
    """A call: sizes, a random ragged routing, and what is unusual about its tensors."""

    name: str
    rows: int
    widths: tuple[int, ...]  # the inputs', then each layer's
    num_experts: int = 4
    num_gates: int = 3
    activations: tuple[int, ...] = (1,)
    dtype: torch.dtype = torch.float32
    logits_dtype: torch.dtype | None = None
    num_inputs: int = 1
    biases: tuple[bool, ...] = (True, True, True)  # whether a layer has them
    gate_biases: tuple[bool, ...] = (True, False)  # whether gates that are linear layers have them, by turns
    strided: bool = False
    unaligned: bool = False
    largest_gate: int = 6
    fused: bool = True  # mix in the last layer's kernel, where the number of gates allows that

    def __str__(self) -> str:
        return self.name

    def backward_parts(self, device: str) -> tuple[int, ...]:
        """Into how many parts the backward pass divides each sum; in the interpreter, which is slow, by turns."""
        if device == "cpu":
            return (1 + 2 * (len(self.name) % 2),)
        return (1, 3)


def cases(scale: int = 1) -> list[Case]:
    """Small sizes for the interpreter; on a GPU, ``scale`` makes the batches of the larger ones larger."""
    f32, f16, bf16 = torch.float32, torch.float16, torch.bfloat16
    found = [
        Case("one_row", 1, (7, 5)),
        Case("no_rows", 0, (7, 6, 5), activations=(1, 3)),
        Case("odd", 37 * scale, (33, 21, 19), activations=(1, 2), num_inputs=3),
        Case("aligned", 40 * scale, (48, 32, 16), activations=(1, 1), num_inputs=2),
        Case("aligned_many_rows", 140 * scale, (80, 144, 80), 3, 2, (3, 1)),
        Case("aligned_few_columns", 70 * scale, (64, 32), 3, 2, (3,)),
        Case("three_layers", 45 * scale, (16, 32, 48, 16), activations=(4, 5, 6), dtype=f16),
        Case("three_layers_odd", 21, (9, 20, 11, 7), activations=(3, 4, 0)),
        Case("unaligned", 37 * scale, (32, 32, 16), activations=(1, 1), unaligned=True),
        Case("strided", 35, (32, 16, 16), activations=(1, 4), num_inputs=2, strided=True),
        Case("no_biases", 18, (20, 12, 8), activations=(1, 1), biases=(False, False)),
        Case("some_biases", 18, (20, 12, 8), activations=(2, 5), biases=(False, True)),
        Case("five_gates", 35, (20, 12), 3, 5),
        Case("seven_gates", 35, (20, 12), 5, 7),
        Case("more_gates_than_fit", 35, (20, 12), 3, 9),
        Case("unfused", 35, (20, 12, 24), 3, 2, (3, 4), fused=False),
        Case("unfused_one_layer", 5, (16, 16), activations=(0,), fused=False, strided=True),
        Case("many_experts_and_gates", 3, (4, 3), 70, 66, largest_gate=3),
        Case("large_gate", 18, (5, 4), 70, 2, largest_gate=70),
        Case("wide", 9, (8, 270), 2, 2, (5,)),
        Case("bf16", 40 * scale, (48, 32, 16), activations=(1, 1), dtype=bf16, num_inputs=2),
        Case("bf16_odd", 37, (19, 21, 9), activations=(3, 1), dtype=bf16, num_inputs=2),
        Case("bf16_float32_logits", 20, (16, 16), dtype=bf16, logits_dtype=f32),
        Case("bf16_many_rows", 130 * scale, (64, 144), 2, 2, (4,), dtype=bf16),
        Case("f16", 40 * scale, (48, 32, 16), activations=(1, 2), dtype=f16, num_inputs=2),
        Case("f16_odd_unfused", 37, (19, 21, 9), activations=(4, 6), dtype=f16, fused=False),
        Case("float32_half_logits", 20, (16, 16), logits_dtype=f16, strided=True),
    ]
    found += [Case(f"{name}", 18, (20, 12, 9), 3, 2, (code, code)) for code, name in enumerate(ACTIVATIONS)]
    return found


@dataclass
class Arguments:
    """The tensors of a case, with gates of either kind, and its routing."""

    inputs: list[Tensor]
    weights: list[Tensor]
    biases: list[Tensor | None]
    gate_logits: list[Tensor]
    gate_weights: list[Tensor]  # in the place of the logits
    gate_biases: list[Tensor | None]
    grad_outputs: list[Tensor]
    expert_inputs: list[int]
    gate_experts: list[int]
    gate_sizes: list[int]
    gate_inputs: list[int]
    activations: list[int]

    @property
    def gates(self) -> tuple[list[int], list[int]]:
        return self.gate_experts, self.gate_sizes

    def level(self, linear: bool) -> Operands:
        """As the operators of a level take it; ``linear``: with gates that are linear layers."""
        wiring = (self.expert_inputs, self.gate_experts, self.gate_sizes)
        layers = tuple(map(Layer, self.activations))
        spec = LevelSpec(
            len(self.inputs),
            *map(tuple, wiring),
            layers,
            tuple(self.gate_inputs if linear else ()),  # type: ignore[arg-type]
        )
        gates = [*self.gate_weights, *self.gate_biases] if linear else self.gate_logits
        return Operands(spec, [*self.inputs, *self.weights, *self.biases, *gates])


def arguments(case: Case, device: str) -> Arguments:
    """Random tensors for a case, the same at every call."""
    generator = torch.Generator().manual_seed(case.rows + sum(case.widths))
    choose = random.Random(case.name)

    def tensor(*shape: int, scale: float = 1.0, dtype: torch.dtype = case.dtype) -> Tensor:
        if case.strided:
            value = torch.randn(*shape[::-1], generator=generator).t() if len(shape) == 2 else torch.randn(
                shape[0], 2, generator=generator)[:, 1]  # fmt: skip
        else:
            value = torch.randn(*shape, generator=generator)
        moved = (value * scale).to(dtype).to(device)
        if case.unaligned:
            room = torch.zeros(moved.numel() + 1, dtype=dtype, device=device)
            room[1:] = moved.flatten()
            moved = room[1:].view(shape)
        return moved

    sizes = [choose.randint(1, min(case.largest_gate, case.num_experts)) for _ in range(case.num_gates)]
    sizes[0] = min(case.largest_gate, case.num_experts)
    members = [choose.sample(range(case.num_experts), size) for size in sizes]
    layers = len(case.activations)
    pairs = list(zip(case.widths[:-1], case.widths[1:], strict=True))
    logits = tensor(case.rows, sum(sizes), dtype=case.logits_dtype or case.dtype)
    return Arguments(
        inputs=[tensor(case.rows, case.widths[0]) for _ in range(case.num_inputs)],
        weights=[tensor(o, i, scale=i**-0.5) for i, o in pairs for _ in range(case.num_experts)],
        biases=[
            tensor(pairs[layer][1]) if case.biases[layer] else None
            for layer in range(layers)
            for _ in range(case.num_experts)
        ],
        gate_logits=list(logits.split(sizes, dim=1)),
        grad_outputs=[tensor(case.rows, case.widths[-1]) for _ in sizes],
        gate_weights=[tensor(size, case.widths[0], scale=case.widths[0] ** -0.5) for size in sizes],
        gate_biases=[
            tensor(size) if case.gate_biases[k % len(case.gate_biases)] else None for k, size in enumerate(sizes)
        ],
        expert_inputs=[choose.randrange(case.num_inputs) for _ in range(case.num_experts)],
        gate_experts=[e for gate in members for e in gate],
        gate_sizes=sizes,
        gate_inputs=[k % case.num_inputs for k in range(case.num_gates)],
        activations=list(case.activations),
    )


@contextmanager
def poisoned() -> Iterator[None]:
    """Fills what launchers allocate with NaN, so that an element that no kernel writes is seen.

    Tensors that would share an allocation have their own.
    """

    def fill(allocate: Any) -> Any:
        def allocated(*args: Any, **kwargs: Any) -> Tensor:
            tensor: Tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return allocated

    def apart(table: Table, like: Tensor, shapes: Any, dtype: torch.dtype | None = None) -> list[Tensor]:
        return [table.room(like, shape, dtype) for shape in shapes]

    with (
        mock.patch.object(Table, "together", apart),
        mock.patch.object(torch, "empty", fill(torch.empty)),
        mock.patch.object(torch, "empty_like", fill(torch.empty_like)),
        mock.patch.object(Tensor, "new_empty", fill(Tensor.new_empty)),
    ):
        yield


@contextmanager
def split_into(count: int) -> Iterator[None]:
    """Divides each sum into that many parts, as far as it has terms."""
    from mtlkernels.ops import _triton_splits

    with mock.patch.object(_triton_splits, "splits", lambda sums, _: max(1, min(count, sums.terms))):
        yield


def exact(value: Any) -> Any:
    """The tensors of ``value`` in float64, but for a seed."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return [exact(item) for item in value] if isinstance(value, (list, tuple)) else value


def assert_within_budget(
    what: str, found: Sequence[Tensor], expected: Sequence[Tensor], true: Sequence[Tensor]
) -> None:
    """Dense tensors, each within the budget that the reference's error in the same dtype gives it."""
    assert all(y.is_contiguous() for y in found), f"not all of {what} are contiguous"
    groups = ({f"{what}[{i}]": [y] for i, y in enumerate(tensors)} for tensors in (found, true, expected))
    testing.assert_within_budget(*groups)


def check_level(case: Case, device: str, linear: bool = False, needs: tuple[bool, ...] = (True,) * 5) -> None:
    """Forward with and without saving, and backward, against the reference.

    ``linear``: with gates that are linear layers. ``needs`` are of inputs, weights, biases, gates and their biases.
    """
    from mtlkernels.ops.level.triton import tiles

    a = arguments(case, device)
    most = tiles.MAX_FUSED_GATES if case.fused else 0
    with mock.patch.object(tiles, "MAX_FUSED_GATES", most):
        saved = check_forward(a.level(linear))
    kinds = Groups(*needs[:3], False, False, False, *needs[3:], *[False] * (5 - len(needs)))
    for count in case.backward_parts(device):
        check_backward(a.level(linear), a.grad_outputs, saved, kinds, count)


def check_forward(level: Operands) -> list[Tensor]:
    """The forward pass with and without saving, against the reference; what it saves."""
    from mtlkernels.ops.level import triton as kernels

    expected, kept = level.results(True, reference.forward)
    true, true_kept = level.spec.split_results(reference.forward(*map(exact, level.forward(True))))
    with poisoned():
        with split_into(3):
            found, saved = level.results(True, kernels.forward)
        with split_into(1):
            alone, statistics = level.results(False, kernels.forward)
    assert_within_budget("outputs", found, expected, true)
    assert_within_budget("outputs without saving", alone, expected, true)
    stored, of_norms, logits, signs = level.spec.split_saved(saved)
    expected_kept, true_kept = (_kept_in_rows(level, values) for values in (kept, true_kept))
    for what, mine, same, ideal in zip(
        ("saved", "statistics", "logits"), (stored, of_norms, logits), expected_kept, true_kept, strict=True
    ):
        # On a CPU the reference leaves the last of several layers of a chain out.
        assert_within_budget(what, mine[: len(same)], same, ideal)
    assert len(stored) == len(level.spec.layers) and len(statistics) == len(of_norms)
    for i, words in zip(level.spec.hidden_signs, signs, strict=True):
        assert torch.equal(words, reference.signs(stored[i], 32).view(torch.int32))
    return saved


def _kept_in_rows(level: Operands, saved: Sequence[Tensor]) -> tuple[Sequence[Tensor], ...]:
    """What the reference saved, in parts, the last layer in rows as on a GPU."""
    stored, *others, _ = level.spec.split_saved(saved)
    groups = level.spec.split(level.tensors)
    rows, width = groups.inputs[0].shape[0], groups.weights[-1].shape[0]
    return [reference.rows_of_panels(s, rows, width) if s.dim() == 2 else s for s in stored], *others


def check_backward(
    level: Operands, grad_outputs: Sequence[Tensor | None], saved: Sequence[Tensor], needs: Groups, parts: int
) -> None:
    """The backward pass, its sums in that many parts, against the reference."""
    from mtlkernels.ops.level import triton as kernels

    arguments = level.backward(grad_outputs, saved, needs)
    wanted = reference.backward(*arguments)
    ideal = reference.backward(*map(exact, arguments))
    with poisoned(), split_into(parts):
        got = kernels.backward(*arguments)
    of_kinds, count = level.spec.spread(Groups._fields), level.spec.num_tensors
    names = [of_kinds[at % count] for at in level.spec.returned(grad_outputs, level.tensors, needs)]
    assert len(got) == len(names)
    for name, *tensors in zip(names, got, wanted, ideal, strict=True):
        assert_within_budget(f"gradients of {name}", *([tensor] for tensor in tensors))


def check_gated_mixture(case: Case, device: str, needs: tuple[bool, bool] = (True, True)) -> None:
    """Forward and backward against the reference, for experts of two layouts."""
    from mtlkernels.ops.gated_mixture import triton as kernels

    a = arguments(case, device)
    shape = (case.num_experts, case.rows, case.widths[-1])
    stacked = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(case.dtype).to(device)
    layouts = [stacked.transpose(0, 1), stacked.transpose(0, 1).contiguous()]
    if case.strided:
        layouts = [stacked.permute(2, 1, 0).contiguous().permute(1, 2, 0)]
    for experts in layouts:
        expected = mixture_reference.forward(experts, a.gate_logits, *a.gates)
        true = mixture_reference.forward(exact(experts), exact(a.gate_logits), *a.gates)
        backward = (a.grad_outputs, experts, a.gate_logits)
        wanted = mixture_reference.backward(*backward, *a.gates, *needs)
        ideal = mixture_reference.backward(*map(exact, backward), *a.gates, *needs)
        with poisoned():
            found = kernels.forward(experts, a.gate_logits, *a.gates)
            got = kernels.backward(*backward, *a.gates, *needs)
        assert_within_budget("outputs", found, expected, true)
        names = ["experts"] * needs[0] + ["logits"] * (needs[1] * len(a.gate_logits))
        for name, *tensors in zip(names, got, wanted, ideal, strict=True):
            assert_within_budget(f"gradients of {name}", *([tensor] for tensor in tensors))
