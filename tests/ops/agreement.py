"""How an op is held against its formula: by the error that PyTorch makes in the same dtype."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import mtlkernels as mk
from mtlkernels.testing import Case, assert_within_budget, evaluate, poisoned_outputs
from tests.seeding import seed
from tests.summary import note_second_trial

# The slope below zero of the activations that have a kink there.
KINKED = {"relu": 0.0, "leaky_relu": 0.01}


def kink_slack(case: Case, exact: dict[str, list[Tensor]], formula: Callable[..., Any]) -> dict[str, list[Tensor]]:
    """How far gradients move when units within rounding distance of a kink fall on either side of it, at random.

    Two correct implementations may round such a unit's input to different sides of zero.
    """
    wide = case.to(torch.float64)
    noisy = functools.partial(formula, kink_noise=4 * torch.finfo(case.dtype).eps)
    slack = {name: [torch.zeros_like(t) for t in group] for name, group in exact.items()}
    with torch.random.fork_rng(devices=[]):
        seed(0)
        for _ in range(8):
            moved = evaluate(noisy, wide, allow_unused=True)
            for name, group in slack.items():
                for total, a, b in zip(group, moved[name], exact[name], strict=True):
                    total += (a - b).abs()
    return slack


def assert_agrees(
    op: Callable[..., Any],
    formula: Callable[..., Any],
    case: Case,
    baseline: Callable[..., Any] | None = None,
    threads: int = 1,
    factor: float = 3.0,
) -> None:
    """An op's outputs and gradients against its formula in float64.

    Args:
        op: the public function, in the block of the implementation under test.
        formula: what the op means, of the same arguments.
        case: the arguments.
        baseline: PyTorch in the dtype of the case; by default the formula itself.
        threads: how many the op gets.
        factor: how many times the baseline's error is allowed.
    """
    exact = evaluate(formula, case.to(torch.float64), allow_unused=True)
    usual = evaluate(baseline or formula, case, allow_unused=True)
    usual_threads = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with poisoned_outputs():
            actual = evaluate(op, case)
    finally:
        torch.set_num_threads(usual_threads)
    try:
        assert_within_budget(actual, exact, usual, factor=factor)
    except AssertionError:
        names = case.arguments.get("activation", ())
        if not {"prelu", *KINKED} & ({names} if isinstance(names, str) else set(names)):
            raise
        assert_within_budget(actual, exact, usual, factor=factor, slack=kink_slack(case, exact, formula))
        note_second_trial("within the budget where units beside a kink may fall on either side of it")


def assert_as_exact(found: Any, exact: Any, usual: Any) -> None:
    """Each tensor of a nested result is as close to float64 as PyTorch's in its dtype, within the budget.

    Args:
        found: of what is tested.
        exact: the same in float64.
        usual: the same by PyTorch in the dtype of ``found``.
    """
    trees = (found, exact, usual)
    leaves = [[y.detach() for y in torch.utils._pytree.tree_leaves(tree) if isinstance(y, Tensor)] for tree in trees]
    assert_within_budget(*({f"result {i}": [y] for i, y in enumerate(each)} for each in leaves))


def reference_op(op: Callable[..., Any], **arguments: Any) -> Any:
    """The op by its reference implementation, whatever the block around asks for."""
    with mk.use_backend("reference"):
        return op(**arguments)


def check(
    op: Callable[..., Any],
    formula: Callable[..., Any],
    case: Case,
    backend: str,
    threads: int = 1,
    *,
    by_pytorch: Callable[..., Any] | None = None,
    factor: float = 3.0,
) -> None:
    """An implementation against the formula: the reference is judged by plain PyTorch, the others by the reference."""
    baseline = by_pytorch if backend == "reference" else functools.partial(reference_op, op)
    with mk.use_backend(backend):
        assert_agrees(op, formula, case, baseline, threads, factor)


def kinds(x: Tensor) -> Tensor:
    """0 where finite, 1 and -1 where infinite, 2 where NaN."""
    return torch.where(x.isnan(), 2, torch.where(x.isinf(), x.sign(), 0))
