"""A conversion is tried before it is made: copies with random weights run by the original code and fused.

A class that is known by its name or registered may have been edited. What a user may have added to a forward pass, such
as noise, a detached expert or gates kept for a loss, is found by comparing all that a forward and a backward pass do.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mtlkernels import _torch
from mtlkernels._convert.copies import (
    Pairs,
    agree,
    align,
    called_within,
    cast,
    close,
    difference,
    is_within,
    largest,
    pairs_of,
    random_copy,
    randomize,
    set_mode,
    take_values,
)
from mtlkernels._convert.dropouts import counted, dropouts_of, dropped_otherwise, set_rates
from mtlkernels._convert.paying import at_any_size
from mtlkernels._convert.random_states import kept_random_state, random_state, seed
from mtlkernels._convert.reached import Reached
from mtlkernels._convert.settings import settings
from mtlkernels._convert.shared_state import SharedState
from mtlkernels._convert.situations import AS_IT_IS, LARGE_WORK, LATER, OTHER_DTYPES, ROWS, SITUATIONS, Situation

_one_at_a_time = threading.RLock()  # as trials set global generators, and look at them afterwards
# Numbers may have been drawn by another thread, which seldom are again.
_DRAWS, _ATTEMPTS = "its forward draws random numbers of its own", 3


class NotFused(ValueError):
    """Arguments that a converted module would leave to its own code."""


class Verdict(NamedTuple):
    """Why fused evaluation is not the same as a class's own code, or under autocast alone; None where it is."""

    reason: str | None
    under_autocast: str | None = None


def call(module: Any, *args: Any) -> Any:
    """What ``module(*args)`` returns."""
    return module(*args)


@dataclass
class Trial:
    """Two copies of a module, one for each way, and how they are run."""

    copies: tuple[Any, Any]
    ways: tuple[Callable[..., Any], Callable[..., Any]]
    arguments: Callable[[Any, int, torch.Generator], tuple[Any, ...]]
    pairs: Pairs
    generator: torch.Generator
    shared: SharedState

    source: nn.Module
    drops: Callable[[Any, tuple[Any, ...]], tuple[Mapping[int, int | None], int]] | None
    ignored: Sequence[str]

    def __post_init__(self) -> None:
        self.under_autocast: str | None = None
        self.names = [name for name, p in self.copies[0].named_parameters() if p.requires_grad]
        self.size = sum(p.numel() for p in self.copies[0].parameters())


def disagreement(
    module: nn.Module,
    fused: Callable[..., Any],
    arguments: Callable[[Any, int, torch.Generator], tuple[Any, ...]],
    *,
    method: str = "forward",
    original: Callable[..., Any] = call,
    without: Sequence[str] = (),
    stand_ins: Mapping[str, Any] | None = None,
    ignored: Sequence[str] = (),
    drops: Callable[[Any, tuple[Any, ...]], tuple[Mapping[int, int | None], int]] | None = None,
) -> Verdict | None:
    """Tries a conversion: the one place where it is decided whether fused evaluation is the same as a class's own code.

    The module itself is not touched or called; two copies of it on the CPU are, with random weights, in float64 and at
    last in other dtypes. Compared are outputs in training and evaluation, for inputs and weights of several sizes and
    on several numbers of rows; gradients of parameters and inputs; random numbers drawn, and for how many numbers each
    dropout draws them; arguments, statistics, attributes and what else its code names afterwards. The user's random
    state stays as it is.

    Args:
        module: what is to be converted.
        fused: from a copy and arguments, what the converted module would return. However few rows there are it has to
            go the fused way, which is asked for by :func:`mtlkernels._convert.paying.at_any_size`.
        arguments: from a copy, a number of rows and a generator, arguments with float64 tensors of so many rows.
        method: the name of the method that is replaced.
        original: from a copy and arguments, what the module returns.
        without: attributes of the module, or of its sub-modules by dotted names, that neither way needs, and that may
            be large, such as embeddings: a module is a :class:`mtlkernels._convert.copies.First` in the copies,
            anything else None.
        stand_ins: attributes that the copies get in the place of their own.
        ignored: sub-modules whose statistics and attributes may differ afterwards.
        drops: from a copy and arguments, how many numbers of a row a conversion gives each dropout, see
            :func:`mtlkernels._convert.dropouts.widths_dropped`, and the number of rows.

    Returns:
        None where both agree, otherwise where they do not.
    """
    try:
        shared = SharedState(module, Reached(module, method))
    except Exception as error:
        return Verdict(f"it fails in a trial: {type(error).__name__}: {error}")
    # Whatever the caller has set, in which gradients or numbers on a CPU could not be had.
    ours = torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False)
    # A mode, which takes a microsecond at each operator.
    default = contextlib.nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")
    with _one_at_a_time, kept_random_state(), ours[0], ours[1], ours[2], default, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of code that is not ours, in a call that nobody made
        try:
            generator = torch.Generator().manual_seed(0)
            copies = random_copy(module, generator, without), random_copy(module, None, without)
            for other in copies:
                vars(other).update(stand_ins or {})
            shared.keep_common(module, copies[0])
            align(copies[1], copies[0])
            pairs = pairs_of(copies[1], copies[0], ignored)
            trial = Trial(copies, (original, fused), arguments, pairs, generator, shared, module, drops, ignored)
            reason = _first_difference(trial)
            return Verdict(reason, trial.under_autocast) if reason or trial.under_autocast else None
        except Exception as error:  # of code that is not ours; it goes into the report
            return Verdict(f"it fails in a trial: {type(error).__name__}: {error}")
        finally:
            shared.restore()


def _first_difference(trial: Trial) -> str | None:
    dropouts = [dropouts_of(other) for other in trial.copies]
    rates = [module.p for module in dropouts[0]]
    set_rates(dropouts, [0.0] * len(rates))
    reason = _compare_all(trial, SITUATIONS) or _compare_settings(trial) or _compare_as_it_is(trial)
    reason = reason or _compare_dtypes(trial) or _compare_all(trial, LATER)
    if reason is not None or not rates:
        return reason
    set_rates(dropouts, rates)
    drawn = all(_draws_beside(trial, dropouts[0]) for _ in range(_ATTEMPTS))
    align(trial.copies[1], trial.copies[0])
    if drawn:
        return _DRAWS
    # What is dropped where: a rate of 1 draws nothing and shows. It may become one later where it is 0 now.
    for first in (0, 1):
        set_rates(dropouts, [float(i % 2 == first) for i in range(len(rates))])
        reason = _compare(trial, Situation("in training with dropout", True), draws=False)
        if reason is not None:
            return reason
    set_rates(dropouts, rates)
    return _compare_masks(trial, dropouts)


def _compare_all(trial: Trial, situations: Sequence[Situation]) -> str | None:
    """The first difference in any of them."""
    return next(filter(None, (_compare(trial, situation) for situation in situations)), None)


def _compare_as_it_is(trial: Trial) -> str | None:
    """The first difference with the module's own values: a mask, say, is none of random numbers."""
    first, second = trial.copies
    reason = None
    if take_values(first, trial.source):
        align(second, first)
        reason = _compare(trial, AS_IT_IS)
    randomize(first, trial.generator)
    align(second, first)
    return reason


def _compare_dtypes(trial: Trial) -> str | None:
    """The first difference in other dtypes than the trial's own, which the copies have again afterwards."""
    reason = None
    for situation in OTHER_DTYPES:
        cast(trial.copies, situation.dtype)
        reason = reason or _compare(trial, situation)
    cast(trial.copies, torch.float64)
    align(trial.copies[1], trial.copies[0])
    return reason


def _compare_settings(trial: Trial) -> str | None:
    """The first difference where each number, or small tensor, is another that a part keeps as an attribute.

    A schedule may change it after a conversion: fused evaluation has to see that too.
    """
    found = [setting for other in trial.copies for setting in settings(other)]
    if not found:
        return None
    for setting in found:
        setting.put(setting.another)
    words = ", ".join(dict.fromkeys(setting.name for setting in found))
    modes = (("training", True), ("evaluation", False))
    reason = _compare_all(trial, [Situation(f"in {m} with another {words}", t, needed=False) for m, t in modes])
    for setting in found:
        setting.restore()
    return reason


def _compare_masks(trial: Trial, dropouts: Sequence[Sequence[Any]]) -> str | None:
    """Whether both ways draw a mask for as many numbers: tasks may share one, or each have its own."""
    if trial.drops is None:
        return None
    left_out = {part for path, part in trial.copies[0].named_modules() if is_within(path, trial.ignored)}
    given = trial.arguments(trial.copies[0], ROWS, trial.generator)
    counts = []
    for way, other in enumerate(trial.copies):
        other.train()
        with counted(dropouts[way]) as found:
            _run(trial, way, given, Situation("in training", True))
        counts.append(found)
    read = [None if module in left_out else module for module in dropouts[0]]
    widths, rows = trial.drops(trial.copies[0], given)
    return dropped_otherwise(read, counts[0], counts[1], widths, rows)


@dataclass
class _Run:
    """What one way has done."""

    outputs: Any
    leaves: list[Tensor]
    arguments: Any
    random_state: Any


def _compare(trial: Trial, situation: Situation, draws: bool = True) -> str | None:
    """As :func:`_difference_in`; what differs under autocast is noted and goes by."""
    reason: str | None = _DRAWS
    for _ in range(_ATTEMPTS):
        if reason == _DRAWS:
            align(trial.copies[1], trial.copies[0])
            reason = _difference_in(trial, situation, draws)
    if reason is None or not situation.autocast:
        return reason
    trial.under_autocast = trial.under_autocast or reason
    align(trial.copies[1], trial.copies[0])
    return None


def _difference_in(trial: Trial, situation: Situation, draws: bool) -> str | None:
    """The first difference between both ways in one situation."""
    words = situation.words
    rows = min(situation.rows, max(ROWS, int(LARGE_WORK / max(1, trial.size))))
    if situation.weights is not None:
        randomize(trial.copies[0], trial.generator, situation.weights, situation.signed, situation.masked)
        align(trial.copies[1], trial.copies[0])
    for other in trial.copies:
        set_mode(other, situation.training)
    given = trial.arguments(trial.copies[0], rows, trial.generator)
    try:
        expected = _run(trial, 0, given, situation)
    except Exception as error:
        if situation.needed:
            raise
        if situation.special:
            with contextlib.suppress(Exception):
                _run(trial, 1, given, situation)
                return f"{words} its own code raises {type(error).__name__}, and the fused way does not"
        align(trial.copies[0], trial.copies[1])  # what it did before it failed is of no interest
        return None
    changed = trial.shared.change()
    if changed is not None:
        return f"its forward changes {changed}, which is not its own"
    try:
        actual = _run(trial, 1, given, situation)
    except Exception as error:
        if situation.wider:
            return f"{words} the fused way raises {type(error).__name__}, and its own code does not"
        usual = situation.dtype == torch.float64 and not situation.autocast
        if rows and (usual or not isinstance(error, NotFused)):
            raise
        align(trial.copies[1], trial.copies[0])
        return None  # converted modules leave so few rows to modules, and what there are no kernels for
    if draws and expected.random_state != actual.random_state:
        return _DRAWS
    if not agree(actual.outputs, expected.outputs, situation.tolerance):
        return f"{words} {_words_for_outputs(actual.outputs, expected.outputs)}"
    if not agree(actual.arguments, expected.arguments, situation.tolerance):
        return "its forward changes its arguments"
    reason = difference(trial.pairs, situation.tolerance)
    if reason is None and situation.gradients:
        reason = _compare_gradients(trial, actual, expected, situation)
    return reason


def _run(trial: Trial, way: int, given: Any, situation: Situation) -> _Run:
    """One way with tensors of its own, which want gradients in most situations."""
    flat, structure = _torch.tree_flatten(given)
    leaves, values = [], []
    for value in flat:
        if isinstance(value, Tensor) and value.is_floating_point():
            leaf = (value.detach() * situation.scale).to(situation.dtype)
            if situation.special and leaf.dim() > 0 and len(leaf) > 1:
                leaf[0] = 0
                leaf[(1,) + (0,) * (leaf.dim() - 1)] = torch.nan
            if situation.wider and leaf.dim() > 1:
                leaf = torch.cat([leaf, leaf[..., :1]], -1)
            if situation.by_columns and leaf.dim() > 1:
                leaf = leaf.transpose(0, 1).contiguous().transpose(0, 1)
            leaves.append(leaf)
            value = leaf
            if situation.wanting:
                leaf.requires_grad_()
                value = leaf * 1  # not a leaf, which nothing may be written into
        elif isinstance(value, Tensor):
            value = value.clone()
        values.append(value)
    arguments = _torch.tree_unflatten(values, structure)
    seed()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(situation.gradients or situation.training))
        if situation.autocast:
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        if way == 1:
            stack.enter_context(at_any_size())
        outputs = trial.ways[way](trial.copies[way], *arguments)
    return _Run(outputs, leaves, arguments, random_state())


def _compare_gradients(trial: Trial, actual: _Run, expected: _Run, situation: Situation) -> str | None:
    """Gradients of all outputs, then of every other one: those of an unused output reach nothing."""
    generator = torch.Generator().manual_seed(1)
    outputs = [[t for t in _tensors(run.outputs) if t.requires_grad] for run in (expected, actual)]
    factors = [torch.rand(t.shape, generator=generator, dtype=torch.float64) + 0.5 for t in outputs[0]]
    inputs = ["its input"] if len(actual.leaves) == 1 else [f"input {i}" for i in range(len(actual.leaves))]
    names = [*trial.names, *inputs]
    subsets = [range(len(factors)), range(0, len(factors), 2), range(1, len(factors), 2)]
    for subset in subsets if situation.scale == 1 and len(factors) > 1 else subsets[:1]:
        if not subset:
            continue
        both, again = [], False
        for other, run, ys in zip(trial.copies, (expected, actual), outputs, strict=True):
            wanted = [p for p in other.parameters() if p.requires_grad] + run.leaves
            loss = sum((ys[i] * factors[i]).sum() for i in subset)
            with called_within(other) as called:
                both.append(torch.autograd.grad(loss, wanted, allow_unused=True, retain_graph=True))  # type: ignore
            again = again or (other is trial.copies[0] and bool(called))
        if again:
            return "its backward pass calls parts again, to take less memory as torch.utils.checkpoint does"
        theirs, ours = both
        size = 1e-3 * largest(theirs)  # sums of nearly nothing are as wrong as others, not as they are small
        for name, a, b in zip(names, ours, theirs, strict=True):
            if (a is None) != (b is None):
                which = "its own code" if b is None else "the fused way"
                return f"{situation.words} gradients of {name} differ: {which} gives none"
            if a is not None and not close(a, b, situation.tolerance, max(size, largest([b]))):
                return f"{situation.words} gradients of {name} differ"
    return None


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in _torch.tree_flatten(value)[0] if isinstance(leaf, Tensor)]


def _words_for_outputs(actual: Any, expected: Any) -> str:
    """How outputs differ: by their dtypes, or in another way."""
    both = [[str(t.dtype).removeprefix("torch.") for t in _tensors(outputs)] for outputs in (actual, expected)]
    for ours, theirs in zip(*both, strict=False):
        if ours != theirs:
            return f"its outputs are {theirs}, but {ours} fused"
    return "its outputs differ from those of its experts and gates"


def _draws_beside(trial: Trial, dropouts: Sequence[nn.Module]) -> bool:
    """Whether the original draws, in training, more random numbers than its dropout modules."""
    other = trial.copies[0].train()
    states: list[Any] = []
    handles = []
    for module in dropouts:
        handles += [
            module.register_forward_pre_hook(lambda *_: states.append(torch.get_rng_state())),
            module.register_forward_hook(lambda *_: torch.set_rng_state(states.pop())),
        ]
    seeded = seed()
    trial.ways[0](other, *trial.arguments(other, ROWS, trial.generator))
    for handle in handles:
        handle.remove()
    return bool(random_state() != seeded)
