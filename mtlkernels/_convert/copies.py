"""Copies of modules for trials, and what two copies have become."""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import math
import operator
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtlkernels import _torch


class First(nn.Module):
    """Stands for a part that a trial leaves out: returns its first argument, which may come by name."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the first of them."""
        return next(iter((*args, *kwargs.values())))


# Numbers in a table of embeddings that copies have in full, and in a tensor that is neither parameter nor buffer.
TABLE_SIZE, MOST_COPIED = 2**20, 2**24


class FewRows(nn.Module):
    """Stands for a large table of embeddings, or one with sparse gradients: a small one, by codes modulo its rows."""

    def __init__(self, table: nn.Embedding | nn.EmbeddingBag) -> None:
        super().__init__()
        rows = max(1, min(table.num_embeddings, TABLE_SIZE // max(1, table.embedding_dim)))
        options: dict[str, Any] = {"mode": table.mode} if isinstance(table, nn.EmbeddingBag) else {}
        self.table = type(table)(rows, table.embedding_dim, dtype=torch.float64, **options)

    def forward(self, codes: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the table's."""
        return self.table(codes % self.table.num_embeddings, *args, **kwargs)


def _is_large_table(module: nn.Module) -> bool:
    if type(module) is not nn.Embedding and type(module) is not nn.EmbeddingBag:
        return False
    return module.sparse or module.num_embeddings * module.embedding_dim > TABLE_SIZE


def random_copy(module: nn.Module, generator: torch.Generator | None, without: Sequence[str] = ()) -> Any:
    """A copy in evaluation with random weights, or zeros, in float64 on the CPU; ``without`` some parts.

    No weight of the module is copied on the way, and nothing is made where it is. Large tables of embeddings are small.
    """
    memo: dict[int, Any] = {}
    dropped = [operator.attrgetter(name)(module) for name in without]
    memo |= {id(part): First() if isinstance(part, nn.Module) else None for part in dropped}
    left_out = {id(inner) for part in dropped if isinstance(part, nn.Module) for inner in part.modules()}
    tables = [part for part in module.modules() if id(part) not in left_out and _is_large_table(part)]
    memo |= {id(part): FewRows(part) for part in tables}  # type: ignore[arg-type]
    left_out |= set(map(id, tables))
    filled = {id(tensor) for tensor in _values(module)}
    for part in module.modules():
        if id(part) in left_out:
            continue
        for tensor in tensors_in(vars(part)):
            if id(tensor) not in memo and type(tensor) in (Tensor, nn.Parameter):
                memo[id(tensor)] = _stand_in(tensor, id(tensor) in filled)
    other: Any = copy.deepcopy(module, memo)
    if generator is not None:
        randomize(other, generator)
    return other.eval()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors that a module keeps, within containers, and those of no sub-module."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors_in(part)


def _stand_in(tensor: Tensor, filled: bool) -> Tensor:
    """A tensor of its shape in float64 on the CPU: of zeros if it will be ``filled`` or is huge, else of its values.

    Of other kinds than floating-point ones it has the values too, which may be indices.
    """
    dtype = torch.float64 if tensor.is_floating_point() else tensor.dtype
    if tensor.is_meta or (tensor.is_floating_point() and (filled or tensor.numel() > MOST_COPIED)):
        other = torch.zeros(tensor.shape, dtype=dtype)
    else:
        other = tensor.detach().to("cpu", dtype, copy=True)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(other, requires_grad=tensor.requires_grad)
    return other


@torch.no_grad()
def randomize(
    module: nn.Module, generator: torch.Generator, scale: float = 1.0, signed: bool = False, masked: bool = False
) -> None:
    """Fills parameters and buffers: matrices with numbers around 0, times ``scale``; others with positive ones.

    ``signed``: vectors that are parameters with numbers of either sign. ``masked``: zeros in the place of every other
    number of buffers and of parameters that are frozen.
    """
    parameters = set(map(id, module.parameters()))
    for tensor in _values(module):
        if tensor.is_floating_point():
            # Positive, for variances, and of a size that keeps softmax away from 0 and 1.
            values = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
            if tensor.dim() > 1:
                values.sub_(0.5).mul_(3 * scale * tensor.shape[-1] ** -0.5)
            elif signed and id(tensor) in parameters:
                values.sub_(0.5).mul_(2)
            else:
                values.add_(0.1)
            if masked and not tensor.requires_grad:
                values.view(-1)[::2] = 0
            tensor.copy_(values)


@torch.no_grad()
def take_values(module: nn.Module, source: nn.Module) -> bool:
    """Gives a copy the values of the parameters and buffers that it was made of; whether all are to be had.

    Those of large tables, which are other ones in a copy, stay random.
    """
    named = dict((*source.named_parameters(remove_duplicate=False), *source.named_buffers(remove_duplicate=False)))
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        value = named.get(name)
        if value is None or value.shape != tensor.shape:
            continue
        if value.is_meta or type(value) not in (Tensor, nn.Parameter):
            return False
        tensor.copy_(value)
    return True


@torch.no_grad()
def align(module: nn.Module, other: nn.Module) -> None:
    """Gives ``module`` the values of ``other``, a copy of the same."""
    for tensor, value in zip(_values(module), _values(other), strict=True):
        tensor.copy_(value)


def cast(modules: Iterable[nn.Module], dtype: torch.dtype) -> None:
    """``module.to(dtype)`` of each, by which parameters get other memory: to be swapped, nothing else may hold them."""
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(False)
    try:
        for module in modules:
            module.to(dtype)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swaps)


def _values(module: nn.Module) -> list[Tensor]:
    """All parameters, then all buffers, as ``nn.Module`` has them, which asks each part again for each kind."""
    parts = parts_of(module)
    return [*_each_once(part._parameters for part in parts), *_each_once(part._buffers for part in parts)]


def _each_once(named: Iterable[Mapping[str, Tensor | None]]) -> Iterable[Tensor]:
    found = {id(tensor): tensor for tensors in named for tensor in tensors.values() if tensor is not None}
    return found.values()


def parts_of(module: nn.Module) -> list[nn.Module]:
    """What ``module.modules()`` gives, without a generator for each level of it: a trial asks some hundred times."""
    found: dict[int, nn.Module] = {}
    ahead = [module]
    while ahead:
        part = ahead.pop()
        if id(part) not in found:
            found[id(part)] = part
            ahead += [inner for inner in reversed(part._modules.values()) if inner is not None]
    return list(found.values())


def set_mode(module: nn.Module, training: bool) -> None:
    """As ``module.train(training)``, where that changes anything."""
    if not all(part.training is training for part in parts_of(module)):
        module.train(training)


@contextlib.contextmanager
def called_within(module: nn.Module) -> Iterator[list[Any]]:
    """Which parts of a module are called within the block."""
    called: list[Any] = []
    handles = [part.register_forward_pre_hook(lambda part, _: called.append(part)) for part in module.modules()]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()


def close(actual: Tensor, expected: Tensor, tolerance: float, size: float | None = None) -> bool:
    """Whether two tensors are the same within ``tolerance`` times the largest number, or times ``size``."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return False
    if not expected.is_floating_point():
        return torch.equal(actual, expected)
    if not expected.numel():
        return True
    if size is None:
        size = largest([expected])
    off = (actual.detach() - expected.detach()).abs_().max().item()
    if math.isfinite(off):
        return off <= tolerance * size
    return torch.allclose(actual, expected, rtol=0, atol=tolerance * size, equal_nan=True)


def largest(tensors: Sequence[Tensor | None]) -> float:
    """The largest finite number in some tensors."""
    most = 0.0
    for tensor in tensors:
        if tensor is not None and tensor.numel():
            low, high = torch.aminmax(tensor.detach())
            size = max(-low.item(), high.item())
            finite = math.isfinite(size)
            most = max(most, size if finite else tensor.detach().abs().nan_to_num(0, 0, 0).max().item())
    return most


# Pairs that are compared already, or just now, by their addresses; kept, as the address of what is gone is used again.
Seen = dict[tuple[int, int], tuple[Any, Any]]


def agree(actual: Any, expected: Any, tolerance: float) -> bool:
    """Whether two results, tensors within lists, tuples and dicts, are the same within rounding."""
    leaves, structure = _torch.tree_flatten(actual)
    others, other_structure = _torch.tree_flatten(expected)
    if structure != other_structure:
        return False
    size = largest([leaf for leaf in others if isinstance(leaf, Tensor) and leaf.is_floating_point()])
    for leaf, other in zip(leaves, others, strict=True):
        if isinstance(other, Tensor):
            if not isinstance(leaf, Tensor) or leaf.requires_grad != other.requires_grad:
                return False
            if not close(leaf, other, tolerance, size):
                return False
        elif not same(leaf, other, tolerance, {}):
            return False
    return True


def same(actual: Any, expected: Any, tolerance: float, seen: Seen) -> bool:
    """Whether two attributes of copies are the same; objects of which nothing can be seen pass."""
    if type(actual) is not type(expected):
        return False
    if actual is expected or (id(actual), id(expected)) in seen or isinstance(expected, nn.Module):
        return True
    seen[id(actual), id(expected)] = actual, expected
    if isinstance(expected, Tensor):
        return close(actual, expected, tolerance)
    if isinstance(expected, Mapping):
        pairs = [(actual[key], value) for key, value in expected.items() if key in actual]
        return len(actual) == len(expected) == len(pairs) and all(same(a, b, tolerance, seen) for a, b in pairs)
    if isinstance(expected, float):
        return bool(abs(actual - expected) <= tolerance * abs(expected) or actual == expected or expected != expected)
    if isinstance(expected, types.FunctionType):
        return _same_functions(actual, expected, tolerance, seen)
    if isinstance(expected, (str, bytes, int, type(None), types.BuiltinFunctionType)):
        return bool(actual == expected)
    if isinstance(expected, (set, frozenset)):
        return len(actual) == len(expected)  # of copies, whose members may be compared by identity
    if type(expected).__module__ == "numpy":
        return _same_arrays(actual, expected, tolerance)
    if isinstance(expected, (list, tuple, collections.deque)):
        parts: Any = list(zip(actual, expected, strict=False))
        return len(actual) == len(expected) and all(same(a, b, tolerance, seen) for a, b in parts)
    if isinstance(expected, types.MethodType):
        return actual.__func__ is expected.__func__ and same(actual.__self__, expected.__self__, tolerance, seen)
    if isinstance(expected, functools.partial):
        parts = zip(*((p.func, p.args, p.keywords) for p in (actual, expected)), strict=True)
        return all(same(a, b, tolerance, seen) for a, b in parts)
    if hasattr(expected, "__dict__") and not same(vars(actual), vars(expected), tolerance, seen):
        return False
    slots = [name for kind in type(expected).__mro__ for name in slots_of(kind)]
    if slots:
        return all(same(getattr(actual, name, None), getattr(expected, name, None), tolerance, seen) for name in slots)
    return hasattr(expected, "__dict__") or _same_states(actual, expected, tolerance, seen)


def _same_functions(actual: Any, expected: Any, tolerance: float, seen: Seen) -> bool:
    """The same of functions that are made anew for each copy, of one code: by what they close over and keep."""
    if actual.__code__ is not expected.__code__:
        return False
    ours, theirs = ([_contents(f), f.__defaults__, f.__kwdefaults__, vars(f)] for f in (actual, expected))
    return same(ours, theirs, tolerance, seen)


def _contents(function: types.FunctionType) -> list[Any]:
    """What a function closes over, without what is not there yet."""
    found = []
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):
            found.append(cell.cell_contents)
    return found


def slots_of(kind: type) -> Sequence[str]:
    """The names of a class's slots."""
    names = vars(kind).get("__slots__", ())
    return [name for name in ((names,) if isinstance(names, str) else names) if name not in ("__dict__", "__weakref__")]


def _same_states(actual: Any, expected: Any, tolerance: float, seen: Seen) -> bool:
    """The same of objects of which pickle alone knows what they keep, such as iterators and arrays of bytes."""
    try:
        states = actual.__reduce_ex__(4), expected.__reduce_ex__(4)
    except Exception:  # those that cannot be pickled pass
        return True
    if not all(isinstance(state, tuple) for state in states):
        return bool(states[0] == states[1])
    inner = list(zip(*(state[1:] for state in states), strict=False))  # not marked as seen: they are gone soon
    return len(inner) == len(states[1]) - 1 and all(_same_parts(a, b, tolerance, seen) for a, b in inner)


def _same_parts(actual: Any, expected: Any, tolerance: float, seen: Seen) -> bool:
    if isinstance(expected, tuple) and isinstance(actual, tuple):
        pairs = list(zip(actual, expected, strict=False))
        return len(actual) == len(expected) and all(same(a, b, tolerance, seen) for a, b in pairs)
    return same(actual, expected, tolerance, seen)


def _same_arrays(actual: Any, expected: Any, tolerance: float) -> bool:
    """The same of NumPy's arrays and scalars; of objects and dates by their shapes alone."""
    kind = getattr(getattr(expected, "dtype", None), "kind", None)
    if kind is None:
        return bool(actual == expected)
    if kind in "biuf":
        return close(torch.as_tensor(actual), torch.as_tensor(expected), tolerance)
    return bool(actual.shape == expected.shape and (kind not in "SU" or (actual == expected).all()))


Pairs = Sequence[tuple[str, nn.Module, nn.Module]]


def pairs_of(actual: nn.Module, expected: nn.Module, ignored: Sequence[str]) -> Pairs:
    """The parts of two copies of a module by their names, without the parts of ``ignored``."""
    named = zip(expected.named_modules(), actual.modules(), strict=True)
    return [(f"{path}." if path else "", other, part) for (path, part), other in named if not is_within(path, ignored)]


def is_within(path: str, names: Sequence[str]) -> bool:
    """Whether the part at a path is one of those names, or lies within one."""
    return any(path == name or path.startswith(f"{name}.") for name in names)


def difference(pairs: Pairs, tolerance: float) -> str | None:
    """The first thing that copies of one module do not have in common any more, in the report's words."""
    for prefix, other, part in pairs:
        reason = _difference(vars(other), vars(part), prefix, tolerance)
        if reason is not None:
            return reason
    return None


def _is_unchanged(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    """:func:`close`, which takes longer than to see that nothing has changed at all, as is usual."""
    alike = actual.dtype == expected.dtype and actual.shape == expected.shape
    return (alike and torch.equal(actual, expected)) or close(actual, expected, tolerance)


def _difference(actual: Mapping[str, Any], expected: Mapping[str, Any], prefix: str, tolerance: float) -> str | None:
    """The same for one module's attributes."""
    for name in ("_parameters", "_buffers", "_modules"):
        if actual[name].keys() != expected[name].keys():
            odd = next(iter(actual[name].keys() ^ expected[name].keys()))
            return f"its forward sets {prefix}{odd}"
    for name, parameter in expected["_parameters"].items():
        other = actual["_parameters"][name]
        if parameter is None or other is None:
            continue
        if other.requires_grad != parameter.requires_grad or not _is_unchanged(other, parameter, tolerance):
            return f"its forward writes to {prefix}{name}"
    for name, buffer in expected["_buffers"].items():
        other = actual["_buffers"][name]
        if buffer is not None and not _is_unchanged(other, buffer, tolerance):
            return f"its forward leaves another {prefix}{name} behind than its parts do"
    for name, value in expected.items():
        other = actual.get(name)
        if value is other or name in ("_parameters", "_buffers", "_modules"):
            continue
        if isinstance(value, dict) and not value and isinstance(other, dict) and not other:
            continue  # most are: those of hooks
        if name not in actual or not same(other, value, tolerance, {}):
            return f"its forward sets {prefix}{name}"
    odd = next((name for name in actual if name not in expected), None)
    return None if odd is None else f"its forward sets {prefix}{odd}"
