"""What tests of the ops share: random cases, an error budget instead of guessed tolerances, poisoned outputs.

A :class:`Case` is one call of an op. :func:`evaluate` runs it, :func:`assert_within_budget` judges the result by the
error that PyTorch makes in the same dtype. Everything takes a device, so that GPU tests use the same cases. What
``python -m mtlkernels`` checks an install by is here too, so nothing of it needs pytest.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtlkernels.ops.activations import ACTIVATIONS
from mtlkernels.routing import Routing
from mtlkernels.testing.budget import assert_within_budget as assert_within_budget
from mtlkernels.testing.budget import over_budget as over_budget

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ROWS = (0, 1, 2, 3, 5, 16, 31, 64, 65, 100, 127, 128, 129, 255, 256, 257)
LAYOUTS = ("contiguous", "transposed", "strided", "offset", "expanded")


def random_routing(rng: random.Random, *, max_experts: int = 7, max_gates: int = 5, max_inputs: int = 3) -> Routing:
    """A free routing: ragged gates in any order, streams that nobody reads, experts that no gate mixes."""
    experts = rng.randint(1, max_experts)
    streams = rng.randint(1, max_inputs)
    gates = [rng.sample(range(experts), rng.randint(1, experts)) for _ in range(rng.randint(1, max_gates))]
    return Routing(tuple(rng.randrange(streams) for _ in range(experts)), tuple(map(tuple, gates)))


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """A tensor of the same shape in another memory layout; "expanded" repeats the first row, the others keep values."""
    if layout == "contiguous" or tensor.dim() < 2:
        return tensor
    if layout == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided":
        wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), float("nan"))
        wide[..., 1::2] = tensor
        return wide[..., 1::2]
    if layout == "offset":  # dense rows that start at an odd element, so that no vector load is aligned
        flat = tensor.new_full((tensor.numel() + 1,), float("nan"))
        flat[1:] = tensor.flatten()
        return flat[1:].view(tensor.shape)
    if layout == "expanded":
        return tensor[:1].expand(tensor.shape)
    raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")


def _map(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        return [_map(item, function) for item in value]
    return value


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


@dataclass(frozen=True)
class Case:
    """One call of an op.

    Attributes:
        arguments: keyword arguments; tensors in them, at any depth, are leaves.
        dtype: the dtype of the outputs.
    """

    arguments: Mapping[str, Any]
    dtype: torch.dtype

    def map(self, function: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> Case:
        """The case with ``function`` of each leaf; a leaf that stands in several places stays one."""
        done: dict[int, Tensor] = {}

        def once(tensor: Tensor) -> Tensor:
            if id(tensor) not in done:
                done[id(tensor)] = function(tensor)
            return done[id(tensor)]

        arguments = {name: _map(value, once) for name, value in self.arguments.items()}
        return Case(arguments, dtype or self.dtype)

    def to(self, dtype: torch.dtype) -> Case:
        """The case in another dtype, the same values as far as that holds them."""
        return self.map(lambda t: t.detach().to(dtype).requires_grad_(t.requires_grad), dtype)

    def leaves(self) -> dict[str, list[Tensor]]:
        """The leaves that want a gradient, each once; those of one argument (or of one of its layers) together."""
        groups: dict[str, list[Tensor]] = {}
        seen: set[int] = set()
        for name, value in self.arguments.items():
            nested = isinstance(value, list) and any(isinstance(item, list) for item in value)
            parts = {f"{name}[{i}]": item for i, item in enumerate(value)} if nested else {name: value}
            for key, part in parts.items():
                for tensor in tensors_in(part):
                    if tensor.requires_grad and id(tensor) not in seen:
                        seen.add(id(tensor))
                        groups.setdefault(key, []).append(tensor)
        return groups


def evaluate(
    function: Callable[..., Sequence[Tensor]], case: Case, *, seed: int = 0, allow_unused: bool = False
) -> dict[str, list[Tensor]]:
    """Outputs and gradients of a call, by group: "outputs", then ``case.leaves()``.

    Args:
        function: the op, or another function of the same arguments.
        case: its arguments.
        seed: of the random gradients of the outputs, the same values in every dtype.
        allow_unused: take zeros for the gradient of a leaf that ``function`` does not use. An op must not need this.
    """
    outputs = list(function(**case.arguments))
    groups = case.leaves()
    results = {"outputs": [y.detach() for y in outputs]}
    flat = [leaf for leaves in groups.values() for leaf in leaves]
    if flat:
        generator = torch.Generator().manual_seed(seed)
        cotangents = []
        for y in outputs:  # bfloat16 and float16 both hold these exactly, so every dtype sees the same values
            values = torch.randint(-64, 65, tuple(y.shape), generator=generator) / 32
            cotangents.append(values.to(y.dtype).to(y.device))
        found = iter(torch.autograd.grad(outputs, flat, cotangents, materialize_grads=allow_unused))
        for name, leaves in groups.items():
            results[name] = [next(found) for _ in leaves]
    return results


@contextmanager
def poisoned_outputs() -> Iterator[None]:
    """Within the block memory from ``torch.empty``, C++ included, holds NaN: what a kernel fails to write shows."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    deterministic: Any = torch.utils.deterministic  # a module whose class defines the attribute below
    fill = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


class CaseFactory:
    """Makes the tensors of random cases.

    Args:
        seed: two factories of one seed make the same values, whatever the dtype and device.
        dtype: of the tensors.
        device: of the tensors.
        layouts: memory layouts to choose from for matrices.
    """

    def __init__(
        self,
        seed: int,
        dtype: torch.dtype,
        *,
        device: torch.device | str = "cpu",
        layouts: Sequence[str] = ("contiguous",),
    ) -> None:
        self.rng = random.Random(seed)
        self.dtype = dtype
        self.device = device
        self.layouts = tuple(layouts)
        self._generator = torch.Generator().manual_seed(seed)

    def leaf(self, *shape: int, scale: float = 1.0, requires_grad: bool = True) -> Tensor:
        """A normal tensor times ``scale``, in one of the layouts."""
        values = torch.randn(shape, generator=self._generator) * scale
        tensor = laid_out(values.to(self.dtype).to(self.device), self.rng.choice(self.layouts))
        return tensor.detach().requires_grad_(requires_grad)

    def logits(self, rows: int, routing: Routing, *, joined: bool = False) -> Tensor | list[Tensor]:
        """Gate logits: K tensors [rows, N_k], or one [rows, sum N_k]."""
        sizes = [len(gate) for gate in routing.gate_experts]
        return self.leaf(rows, sum(sizes)) if joined else [self.leaf(rows, size) for size in sizes]

    def gated_mixture(self, rows: int, features: int, routing: Routing, *, joined_logits: bool = False) -> Case:
        """A call of :func:`mtlkernels.gated_mixture`."""
        arguments = {
            "experts": self.leaf(rows, routing.num_experts, features),
            "gate_logits": self.logits(rows, routing, joined=joined_logits),
            "routing": routing,
        }
        return Case(arguments, self.dtype)

    def expert_mixture(
        self,
        rows: int,
        widths: Sequence[int],
        routing: Routing,
        *,
        activation: str | Sequence[str] = "relu",
        biases: bool | Sequence[bool] = True,
        streams: bool = True,
        stacked: bool = False,
        joined_logits: bool = False,
    ) -> Case:
        """A call of :func:`mtlkernels.expert_mixture`.

        Args:
            rows: B.
            widths: the number of input features, then the width of each layer.
            routing: who reads what.
            activation: a name, or one a layer.
            biases: whether layers have a bias, or whether each has.
            streams: an input a stream; otherwise one tensor that every expert reads.
            stacked: a layer's weights in one tensor instead of one an expert.
            joined_logits: all gates' logits in one tensor.
        """
        experts, layers = routing.num_experts, len(widths) - 1
        has_bias = [biases] * layers if isinstance(biases, bool) else list(biases)
        weights: list[Any] = []
        offsets: list[Any] = []
        for layer, (fan_in, width) in enumerate(zip(widths, widths[1:], strict=False)):
            scale = max(fan_in, 1) ** -0.5
            if stacked:
                weights.append(self.leaf(experts, width, fan_in, scale=scale))
                offsets.append(self.leaf(experts, width) if has_bias[layer] else None)
            else:
                weights.append([self.leaf(width, fan_in, scale=scale) for _ in range(experts)])
                offsets.append([self.leaf(width) for _ in range(experts)] if has_bias[layer] else None)
        x = [self.leaf(rows, widths[0]) for _ in range(routing.num_inputs)] if streams else self.leaf(rows, widths[0])
        arguments = {
            "inputs": x,
            "weights": weights,
            "biases": offsets if any(has_bias) else None,
            "gate_logits": self.logits(rows, routing, joined=joined_logits),
            "routing": routing,
            "activation": activation,
        }
        return Case(arguments, self.dtype)


def random_gated_mixture(seed: int, dtype: torch.dtype, *, device: torch.device | str = "cpu") -> Case:
    """A free routing, odd shapes, any layout."""
    make = CaseFactory(seed, dtype, device=device, layouts=LAYOUTS)
    rng = make.rng
    routing = random_routing(rng)
    return make.gated_mixture(rng.choice(ROWS), rng.randint(1, 70), routing, joined_logits=rng.random() < 0.3)


def random_expert_mixture(
    seed: int, dtype: torch.dtype, *, device: torch.device | str = "cpu", max_width: int = 70
) -> Case:
    """A free routing, one to three layers of odd widths, any activations, biases in some layers, any layout."""
    make = CaseFactory(seed, dtype, device=device, layouts=LAYOUTS)
    rng = make.rng
    routing = random_routing(rng)
    layers = rng.randint(1, 3)
    one_name = rng.random() < 0.5
    return make.expert_mixture(
        rng.choice(ROWS),
        [rng.randint(1, max_width) for _ in range(layers + 1)],
        routing,
        activation=rng.choice(ACTIVATIONS) if one_name else [rng.choice(ACTIVATIONS) for _ in range(layers)],
        biases=[rng.random() < 0.7 for _ in range(layers)],
        streams=rng.random() < 0.7,
        stacked=rng.random() < 0.3,
        joined_logits=rng.random() < 0.3,
    )


SHAPES: tuple[tuple[int, ...], ...] = ((), (1,), (7,), (300,), (5, 3), (33, 65), (4, 3, 3, 3), (0,), (17, 1), (40000,))


@dataclass(frozen=True)
class TaskGradients:
    """Gradients of T tasks for P parameters, as :func:`mtlkernels.pcgrad` takes them, and an order of projections."""

    grads: list[list[Tensor | None]]
    order: Tensor

    @property
    def num_tasks(self) -> int:
        return len(self.grads)


def some_rows(grad: Tensor, rng: random.Random) -> Tensor:
    """A sparse gradient with about half of the rows of a dense one; one of three is not coalesced."""
    rows = [i for i in range(grad.shape[0]) if rng.random() < 0.5]
    kept = torch.zeros_like(grad, memory_format=torch.contiguous_format)
    kept[rows] = grad[rows]
    found = kept.to_sparse(1)
    if rng.random() < 0.3:
        half = found._values() / 2
        indices = found._indices().repeat(1, 2)
        return torch.sparse_coo_tensor(indices, torch.cat([half, half]), grad.shape, check_invariants=False)
    return found


def random_task_gradients(
    seed: int, *, device: torch.device | str = "cpu", max_tasks: int = 12, sparse: float = 0.0
) -> TaskGradients:
    """Tasks of scales from 1e-12 to 1e8, None and zero gradients, dtypes that differ by parameter, any layout.

    float16 is among the dtypes only where scales are such that it holds the results. ``sparse`` is the share of
    parameters of which most tasks have a sparse gradient.
    """
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    num_tasks = rng.randint(1, max_tasks)
    narrow = rng.random() < 0.3
    scales = [10.0 ** (rng.uniform(-2, 1) if narrow else rng.uniform(-12, 8)) for _ in range(num_tasks)]
    dtypes = (torch.float32, torch.bfloat16, torch.float16 if narrow else torch.float64)
    columns = []
    for _ in range(rng.randint(1, 8)):
        shape, dtype, layout = rng.choice(SHAPES), rng.choice(dtypes), rng.choice(LAYOUTS)
        common = torch.randn(shape, generator=generator)  # makes tasks agree or conflict
        by_rows = sparse > 0 and len(shape) > 0 and rng.random() < sparse
        column: list[Tensor | None] = []
        for scale in scales:
            if rng.random() < 0.15:
                column.append(None)
                continue
            values = torch.randn(shape, generator=generator) + rng.uniform(-1.5, 1.5) * common
            grad = (values * (0.0 if rng.random() < 0.1 else scale)).to(dtype).to(device)
            if by_rows and rng.random() < 0.8:
                column.append(some_rows(grad, rng))
            else:
                column.append(laid_out(grad, layout if rng.random() < 0.8 else "contiguous"))
        columns.append(column)
    grads: list[list[Tensor | None]] = [list(row) for row in zip(*columns, strict=True)]
    width = num_tasks if rng.random() < 0.5 else num_tasks - 1
    rows = []
    for i in range(num_tasks):
        row = rng.sample(range(num_tasks), num_tasks)
        rows.append(row if width == num_tasks else [j for j in row if j != i])
    return TaskGradients(grads, torch.tensor(rows, dtype=torch.int64).reshape(num_tasks, width))
