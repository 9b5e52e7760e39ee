"""What ``python -m mtlkernels`` checks an install by: each op, as every implementation here computes it.

A trial is a call with small random arguments. Its results, outputs and gradients, are held against what the op means,
in float64, and may be off by three times the error of the reference in the same dtype; those of the reference by three
times the error of PyTorch's own operators. See :func:`mtlkernels.testing.over_budget`.
"""

from __future__ import annotations

import contextlib
import functools
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import torch
from torch import Tensor

import mtlkernels as mk
from mtlkernels import _backends
from mtlkernels.ops import _snr
from mtlkernels.ops.gated_mixture import plain as plain_mixture
from mtlkernels.ops.level import plain as plain_level
from mtlkernels.testing import DTYPES, Case, CaseFactory, evaluate, over_budget, poisoned_outputs
from mtlkernels.testing.snr import snr_aver, snr_trans

_ROUTING = mk.Routing.cgc(num_tasks=2, num_specific=2, num_shared=1, shared_gate=True)
_ORDER = [[1, 2], [2, 0], [0, 1]]
# Faults of a function that are printed.
_SHOWN = 2


@dataclass(frozen=True)
class Trial:
    """A call of an op, and the op by its meaning: PyTorch's own operators, which autograd differentiates.

    Without leaves that want a gradient it is a call that serves. Other implementations than the reference refuse one
    that is ``of_reference``.
    """

    name: str
    op: Callable[..., Sequence[Tensor]]
    meaning: Callable[..., Sequence[Tensor]]
    case: Case
    of_reference: bool = False

    def of_call(self, function: Callable[..., Sequence[Tensor]], dtype: torch.dtype | None = None) -> Any:
        """Outputs and gradients of a function in the dtype of the case, or in another."""
        case = self.case if dtype is None else self.case.to(dtype)
        with torch.set_grad_enabled(bool(case.leaves())):
            return evaluate(function, case, allow_unused=function is self.meaning)


@dataclass(frozen=True)
class Finding:
    """What trials of one implementation of an op came to, on one kind of device and in one dtype."""

    device: str
    implementation: str
    dtype: torch.dtype
    trials: int
    faults: tuple[str, ...]


def _level(**arguments: Any) -> Sequence[Tensor]:
    names = ("inputs", "weights", "biases", "gate_logits", "routing", "activation")
    defaults = {"gate_weights": None, "gate_biases": None, "gate_norms": None, "norms": None, "dropout": 0.0}
    given = {**defaults, "slopes": None, "dice_eps": 1e-3, **arguments}
    order = (*names, *defaults, "slopes", "dice_eps")
    return plain_level.expert_mixture(*(given[name] for name in order))


def _mixture(experts: Tensor, gate_logits: Any, routing: mk.Routing) -> Sequence[Tensor]:
    flat = [e for gate in routing.gate_experts for e in gate]
    return plain_mixture.mix(experts, gate_logits, flat, [len(gate) for gate in routing.gate_experts])


def _trans(u: Any, weight: Any, z: Tensor) -> Sequence[Tensor]:
    return _snr.plain(True, u, [matrix for row in weight for matrix in row], z, len(weight))


def _aver(u: Any, z: Tensor) -> Sequence[Tensor]:
    return _snr.plain(True, u, None, z, z.shape[0])


def _flat(grads: Sequence[Sequence[Tensor]]) -> Tensor:
    return torch.stack([torch.cat([grad.double().flatten() for grad in row]) for row in grads])


def _gram(grads: Sequence[Sequence[Tensor]]) -> Sequence[Tensor]:
    tasks = _flat(grads)
    return [_as_exact_as(grads[0][0], tasks @ tasks.T)]


def _as_exact_as(grad: Tensor, gram: Tensor) -> Tensor:
    """The matrix in the dtype that it is judged in: kernels may multiply float32 as such where float64 is slow."""
    return gram if grad.dtype == torch.float64 else gram.float()


def _pcgrad(grads: Sequence[Sequence[Tensor]], order: Sequence[Sequence[int]]) -> Sequence[Tensor]:
    """Algorithm 1 of the paper, over whole gradients in float64."""
    tasks = _flat(grads)
    total = torch.zeros_like(tasks[0])
    for own, others in zip(tasks, order, strict=True):
        projected = own
        for other in tasks[list(others)]:
            inner = projected @ other
            if inner < 0:
                projected = projected - inner / (other @ other) * other
        total = total + projected
    parts = total.split([grad.numel() for grad in grads[0]])
    return [part.view(grad.shape).to(grad.dtype) for part, grad in zip(parts, grads[0], strict=True)]


def _levels(make: CaseFactory) -> Iterator[Trial]:
    """Kinks, beside which rounding decides, stay out of gradients in low precision."""
    smooth = make.dtype in (torch.bfloat16, torch.float16)
    for rows in (1, 70):
        served = make.expert_mixture(rows, [40, 48, 17], _ROUTING)
        gates = [make.leaf(len(gate), 40, scale=0.2) for gate in _ROUTING.gate_experts]
        arguments = {**served.arguments, "gate_logits": None, "gate_weights": gates}
        yield Trial(f"serving {rows} rows", mk.expert_mixture, _level, _frozen(Case(arguments, make.dtype)))
    trained = make.expert_mixture(70, [24, 40, 17], _ROUTING, activation="silu" if smooth else "relu")
    yield Trial("training", mk.expert_mixture, _level, trained)
    sloped = make.expert_mixture(33, [24, 20, 16], _ROUTING, activation=["dice", "tanh"])
    slopes = [[make.leaf(20, scale=0.3) for _ in range(_ROUTING.num_experts)], None]
    arguments = {**sloped.arguments, "slopes": slopes}
    yield Trial("training with slopes", mk.expert_mixture, _level, Case(arguments, make.dtype))


def _mixtures(make: CaseFactory) -> Iterator[Trial]:
    for rows, features in ((1, 16), (65, 33)):
        yield from _both_ways(mk.gated_mixture, _mixture, make.gated_mixture(rows, features, _ROUTING))


def _snr_trans(make: CaseFactory) -> Iterator[Trial]:
    for rows in (1, 70):
        yield from _both_ways(mk.snr_trans, _trans, snr_trans(make, rows, [24, 17, 40], [16, 33]))


def _snr_aver(make: CaseFactory) -> Iterator[Trial]:
    for rows in (1, 70):
        yield from _both_ways(mk.snr_aver, _aver, snr_aver(make, rows, 33, 3, 4))


def _both_ways(op: Any, meaning: Any, case: Case) -> Iterator[Trial]:
    yield Trial("training", op, meaning, case)
    yield Trial("serving", op, meaning, _frozen(case))


def _frozen(case: Case) -> Case:
    return case.map(lambda tensor: tensor.detach())


def _gradients(make: CaseFactory) -> list[list[Tensor]]:
    """Of three tasks, of which the first conflicts with the others."""
    common = [make.leaf(*shape).detach() for shape in ((33, 5), (7,), (300,))]
    rows = [[make.leaf(*part.shape).detach() + sign * part for part in common] for sign in (-1.5, 1.0, 0.5)]
    return [[part.requires_grad_() for part in row] for row in rows]


def _grams(make: CaseFactory) -> Iterator[Trial]:
    def op(grads: Any) -> Sequence[Tensor]:
        return [_as_exact_as(grads[0][0], mk.gram(grads))]

    yield from _of_gradients(op, _gram, Case({"grads": _gradients(make)}, make.dtype))


def _projections(make: CaseFactory) -> Iterator[Trial]:
    yield from _of_gradients(mk.pcgrad, _pcgrad, Case({"grads": _gradients(make), "order": _ORDER}, make.dtype))


def _of_gradients(op: Any, meaning: Any, case: Case) -> Iterator[Trial]:
    """Without derivatives, as optimizers call it, and with, which the reference alone has."""
    yield Trial("values", op, meaning, _frozen(case))
    yield Trial("derivatives", op, meaning, case, of_reference=True)


# Function -> the op that `mk.backends` lists, and its trials.
TRIALS: dict[str, tuple[str, Callable[[CaseFactory], Iterator[Trial]]]] = {
    "expert_mixture": ("expert_mixture", _levels),
    "gated_mixture": ("gated_mixture", _mixtures),
    "pcgrad": ("pcgrad", _projections),
    "gram": ("pcgrad", _grams),
    "snr_trans": ("snr_trans", _snr_trans),
    "snr_aver": ("snr_aver", _snr_aver),
}


def devices() -> tuple[str, ...]:
    """The kinds of devices that are there, of those that implementations are for."""
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def findings(function: str) -> Iterator[Finding]:
    """What the trials of a function come to: by device, implementation and dtype."""
    listed, trials = TRIALS[function]
    for device in devices():
        for name in mk.backends()[listed][device]:
            for dtype in DTYPES:
                if not _backends.serves(listed, name, dtype):
                    continue
                of_name = [
                    trial
                    for trial in trials(CaseFactory(0, dtype, device=device))
                    if name == "reference" or not trial.of_reference
                ]
                found = [(trial, _fault(trial, name)) for trial in of_name]
                faults = tuple(f"{trial.name}: {fault}" for trial, fault in found if fault is not None)
                yield Finding(device, name, dtype, len(found), faults)


def _fault(trial: Trial, implementation: str) -> str | None:
    """What is wrong with an implementation's results, or how it fails; None where all is right."""
    try:
        with mk.use_backend("reference"), _one_thread():
            exact = trial.of_call(trial.meaning, torch.float64)
            usual = trial.of_call(trial.meaning if implementation == "reference" else trial.op)
        with mk.use_backend(implementation), poisoned_outputs():
            actual = trial.of_call(trial.op)
    except Exception as error:  # whatever an implementation raises is a finding
        return f"{type(error).__name__}: {error}"
    return over_budget(actual, exact, usual)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """For calls so small that threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def run(out: TextIO) -> int:
    """Prints a line a function and what to do where one is wrong; returns the exit status, 0 where all are right."""
    say = functools.partial(print, file=out, flush=True)
    start = time.perf_counter()
    say("Self-check: outputs and gradients of small random cases, by every implementation on every device here")
    trials, wrong, used = 0, {}, set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of operators without a deterministic version, where memory is poisoned
        for function in TRIALS:
            found = list(findings(function))
            trials += sum(finding.trials for finding in found)
            used |= {(finding.device, finding.implementation) for finding in found}
            faulty = [finding for finding in found if finding.faults]
            if faulty:
                wrong[function] = faulty
            say(f"{function:<15} {'WRONG' if faulty else 'right'}  {_described(faulty or found)}")
    for device in devices():
        if not any(kind == device and name != "reference" for kind, name in used):
            say(f"There are no kernels for {device} here, only the reference; above is said how to get them.")
    seconds = f"{trials} trials in {time.perf_counter() - start:.1f} s"
    if not wrong:
        say(f"All is right: {seconds}.")
        return 0
    say(f"{', '.join(wrong)}: WRONG on this machine; {seconds}.")
    say("Please report this as a bug, with all of the text above.")
    if all(finding.implementation != "reference" for faulty in wrong.values() for finding in faulty):
        say('Until it is mended, put calls into a block `with mtlkernels.use_backend("reference"):`.')
    return 1


def _described(found: Sequence[Finding]) -> str:
    """Findings in a line; those without a fault by what was tried, the others by what is wrong."""
    faults = [
        f"{finding.implementation} on {finding.device} in {_name(finding.dtype)}, {fault}"
        for finding in found
        for fault in finding.faults
    ]
    if faults:
        more = f"; and {len(faults) - _SHOWN} more faults" if len(faults) > _SHOWN else ""
        return "; ".join(faults[:_SHOWN]) + more
    places: dict[tuple[str, str], list[str]] = {}
    for finding in found:
        places.setdefault((finding.device, finding.implementation), []).append(_name(finding.dtype))
    kinds: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (device, implementation), dtypes in places.items():
        kinds.setdefault((device, tuple(dtypes)), []).append(implementation)
    parts = [f"{' and '.join(names)} on {device} in {', '.join(dtypes)}" for (device, dtypes), names in kinds.items()]
    return "; ".join(parts)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
