"""A call of an op and how its results are judged."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import mtlkernels as mk
from mtlkernels import _backends, _extension
from mtlkernels.testing import Case, over_budget, poisoned_outputs
from tests.ops.agreement import kinds
from tests.seeding import seed

# Counted while cases run, for the summary.
counts: Counter[str] = Counter()
SECOND_TRIAL = "second trial: everything moved by rounding"
# A fault of a few roundings would pass by second trials: no more cases may need one than this share, or so many.
SHARE_OF_SECOND_TRIALS, FEW = 0.01, 4
# How far everything in a second trial is off, in eps of the dtype, how often it is drawn at most, and how many times as
# far as the furthest of the draws a result may be.
ROUNDINGS, SUM_ROUNDINGS, DRAWS, REACH = 2.0, 8.0, 64, 3.0
SUMS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.sum, torch.ops.aten.mean)
Results = dict[str, list[Any]]


@dataclass(frozen=True)
class Way:
    """How a call is made.

    Attributes:
        implementation: a backend's name, or "cpp:" and an instruction set.
        threads: for the C++ kernels.
        mode: "serve" for outputs alone, "prepared" for those of a copy that ``mk.prepare`` made, "graph" for those of
            the compiler's graph, "again" for those of a call that was made before, "train" for gradients too, "losses"
            for those of several losses at once.
        side: on which side of a tensor the nearer forbidden page lies.
    """

    implementation: str
    threads: int = 1
    mode: str = "train"
    side: str = "after"

    @property
    def trains(self) -> bool:
        return self.mode in ("train", "losses")


def implementations(op: str) -> list[str]:
    """Those of the C++ kernels by instruction set; under Triton's interpreter its kernels alone."""
    if _backends.interpreting():
        return ["triton"]
    found = [f"cpp:{isa}" for isa in _extension.instruction_sets()] if "cpp" in mk.backends()[op]["cpu"] else []
    return ["reference", *found]


def too_many_second_trials(found: Counter[str], cases: int) -> str | None:
    """What is wrong where hardly any case is within the budget at once."""
    if found[SECOND_TRIAL] <= max(FEW, SHARE_OF_SECOND_TRIALS * cases):
        return None
    return f"{found[SECOND_TRIAL]:,} of {cases:,} cases needed a second trial: something is off by a few roundings"


@functools.cache
def _preloaded() -> Any:
    """guarded.cpp, if it is in this process."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "guard"):
        return None
    library.guard.argtypes = [ctypes.c_bool, ctypes.c_bool]
    library.guarded.restype = ctypes.c_long
    return library


@contextlib.contextmanager
def made_by(way: Way) -> Iterator[None]:
    """Within the block calls are made that way; what PyTorch allocates lies between forbidden pages if it can."""
    name, _, isa = way.implementation.partition(":")
    usual_threads, library = torch.get_num_threads(), _preloaded()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mk.use_backend(name))
        if isa:
            stack.enter_context(_extension.instruction_set(isa))
        stack.enter_context(poisoned_outputs())
        torch.set_num_threads(way.threads)
        if library:
            library.guard(True, way.side == "before")
        try:
            yield
        finally:
            if library:
                library.guard(False, False)
                counts["tensors of PyTorch between forbidden pages"] = library.guarded()
            torch.set_num_threads(usual_threads)


def evaluate(function: Callable[..., Sequence[Tensor]], case: Case, way: Way, used: Sequence[int]) -> Results:
    """Outputs and gradients by group; a gradient is None where autograd gives none.

    Args:
        function: the op or its formula.
        case: its arguments.
        way: which of the results are wanted.
        used: the outputs that the losses read.
    """
    groups = case.leaves()
    flat = [leaf for leaves in groups.values() for leaf in leaves]
    if not way.trains or not flat or not used:
        with torch.no_grad():
            return {"outputs": [y.detach() for y in function(**case.arguments)]}
    outputs = list(function(**case.arguments))
    results: Results = {"outputs": [y.detach() for y in outputs]}
    losses = 3 if way.mode == "losses" else 1
    read = [outputs[k] for k in used]
    generator = torch.Generator().manual_seed(0)
    cotangents = []
    for y in read:  # every dtype holds these exactly
        values = torch.randint(-64, 65, (losses, *y.shape), generator=generator) / 32
        cotangents.append(values.to(y.dtype).to(y.device))
    with_grad = [(y, c if losses > 1 else c[0]) for y, c in zip(read, cotangents, strict=True) if y.requires_grad]
    found: Any = [None] * len(flat)
    if with_grad:
        differentiable, upstream = zip(*with_grad, strict=True)
        found = torch.autograd.grad(differentiable, flat, upstream, allow_unused=True, is_grads_batched=losses > 1)
    each = iter(found)
    for name, leaves in groups.items():
        results[name] = [next(each) for _ in leaves]
    return results


def _without_none(results: Results, like: Results) -> dict[str, list[Tensor]]:
    """The entries where ``like`` has a tensor; None stands for zeros."""
    return {
        name: [
            torch.zeros_like(want) if got is None else got
            for got, want in zip(results[name], like[name], strict=True)
            if want is not None
        ]
        for name in like
    }


@dataclass(frozen=True)
class Meaning:
    """What an op means.

    Attributes:
        formula: in float64, by ordinary operators.
        baseline: what a user would write in PyTorch, in the dtype of the case.
        factor: how many times the baseline's error is allowed.
    """

    formula: Callable[..., Sequence[Tensor]]
    baseline: Callable[..., Sequence[Tensor]]
    factor: float = 3.0


def check(op: Callable[..., Sequence[Tensor]], meaning: Meaning, case: Case, way: Way, used: Sequence[int]) -> None:
    """Holds an op against its meaning.

    Raises:
        AssertionError: what is wrong.
    """
    counts[f"by {way.implementation}"] += 1
    counts[f"in {str(case.dtype).removeprefix('torch.')}"] += 1
    counts[f"mode {way.mode}"] += 1
    wide = case.to(torch.float64)
    exact = evaluate(meaning.formula, wide, way, used)
    usual = evaluate(meaning.baseline, case, way, used)
    with made_by(way):
        actual = evaluate(op, case, way, used)
    every = range(len(exact["outputs"]))
    if set(used) != set(every) and way.trains:
        reached = evaluate(meaning.formula, wide, way, every)
        for name, group in exact.items():
            for i, (want, anyhow) in enumerate(zip(group, reached.get(name, group), strict=True)):
                got = actual[name][i] if name in actual else None
                if want is None and anyhow is not None and got is not None:
                    raise AssertionError(f"{name} {i}: a gradient, though no loss reaches it")
    for name, group in actual.items():
        for i, (got, want) in enumerate(zip(group, exact[name], strict=True)):
            if want is None and got is not None and got.any():
                raise AssertionError(f"{name} {i}: the gradient is not zero, though the formula does without it")
    found, right, base = (_without_none(results, exact) for results in (actual, exact, usual))
    wrong = over_budget(found, right, base, factor=meaning.factor)
    if wrong is None:
        return
    for slack in _slacks(meaning, wide, case.dtype, way, used, exact):
        still = over_budget(found, right, base, factor=meaning.factor, slack=slack)
        if still is None:
            counts[SECOND_TRIAL] += 1
            return
    raise AssertionError(still)


class Rounding(TorchDispatchMode):
    """Within the block each result of an operator is off by a few roundings of a dtype, at random.

    Sums, products of matrices among them, are also off by roundings of the sum of all magnitudes.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._eps = ROUNDINGS * torch.finfo(dtype).eps
        self._sum_eps = SUM_ROUNDINGS * torch.finfo(torch.promote_types(dtype, torch.float32)).eps

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if any(value.alias_info for value in function._schema.returns):  # a view, or written in place
            return result
        if function.overloadpacket in SUMS and result.dtype == torch.float64:
            magnitudes = function(*tree_map_only(Tensor, torch.abs, args), **(kwargs or {}))
            result = result + magnitudes * _noise(magnitudes, self._sum_eps)
        return tree_map_only(Tensor, self._rounded, result)

    def _rounded(self, exact: Tensor) -> Tensor:
        return exact * (1 + _noise(exact, self._eps)) if exact.dtype == torch.float64 else exact


def _noise(like: Tensor, size: float) -> Tensor:
    return size * (2 * torch.rand(like.shape, dtype=like.dtype) - 1)


def _draws(
    function: Callable[..., Sequence[Tensor]], wide: Case, dtype: torch.dtype, way: Way, used: Sequence[int]
) -> Iterator[Results]:
    """Results where arguments and each operator's results are off by a few roundings of the dtype."""
    eps = ROUNDINGS * torch.finfo(dtype).eps
    with torch.random.fork_rng(devices=[]):
        for draw in range(DRAWS):
            seed(draw)
            moved = wide.map(lambda t: (t.detach() * (1 + eps * torch.randn_like(t))).requires_grad_(t.requires_grad))
            with Rounding(dtype):
                results = evaluate(function, moved, way, used)
            yield results


def _slacks(
    meaning: Meaning, wide: Case, dtype: torch.dtype, way: Way, used: Sequence[int], exact: Results
) -> Iterator[dict[str, list[Tensor]]]:
    """How far results move by roundings.

    No implementation in the dtype does better where terms cancel, as in front of a norm, where a norm divides by a
    spread that is hardly larger than a rounding, or for units beside a kink. Of such a unit some draws only tell, so
    that there are as many as it takes, up to a limit; what counts is the furthest of them.
    """
    right = _without_none(exact, exact)
    furthest = {name: [torch.zeros_like(t) for t in group] for name, group in right.items()}
    for draw in _draws(meaning.formula, wide, dtype, way, used):
        results = _without_none(draw, exact)
        for name, group in furthest.items():
            for i, (a, b) in enumerate(zip(results[name], right[name], strict=True)):
                group[i] = torch.maximum(group[i], REACH * (a - b).abs())
        yield furthest


def check_special(
    op: Callable[..., Sequence[Tensor]],
    baseline: Callable[..., Sequence[Tensor]],
    case: Case,
    way: Way,
    used: Sequence[int],
) -> None:
    """NaN and infinities of the arguments come out where PyTorch's own operators have them.

    Infinities of both signs may meet in a sum, so that here NaN and infinity count as one. A value that rounding takes
    to either side of zero makes an infinity of either sign, which relu tells apart; then it may also be as PyTorch has
    it where everything is off by roundings.
    """
    counts["special values"] += 1
    way = replace(way, mode="train") if way.trains else way
    right = evaluate(baseline, case, way, used)
    with made_by(way):
        actual = evaluate(op, case, way, used)
    for name, group in right.items():
        for i, (got, want) in enumerate(zip(actual[name], group, strict=True)):
            if got is None and want is not None and want.any():
                raise AssertionError(f"{name} {i}: no gradient, though PyTorch has one that is not zero")
            if want is None and got is not None and got.any():
                raise AssertionError(f"{name} {i}: the gradient is not zero, though PyTorch has none")
    wrong = _misplaced(actual, right, right)
    if wrong is None:
        return
    for draw in _draws(baseline, case.to(torch.float64), case.dtype, way, used):
        if _misplaced(actual, right, draw) is None:
            counts["second trial: a value beside zero times an infinity"] += 1
            return
    raise AssertionError(wrong)


def _misplaced(actual: Results, right: Results, other: Results) -> str | None:
    """The first element that is finite or not as neither of two results of PyTorch has it."""
    for name, group in right.items():
        for i, (got, *wanted) in enumerate(zip(actual[name], group, other[name], strict=True)):
            if got is None or any(want is None for want in wanted):
                continue
            odd = [(kinds(got) != 0) != (kinds(want) != 0) for want in wanted]
            different = odd[0] & odd[1]
            if different.any():
                at = tuple(different.nonzero()[0].tolist())
                return f"{name} {i}{list(at)} is {got[at].item()}, PyTorch has {wanted[0][at].item()}"
    return None
