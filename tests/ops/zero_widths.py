"""Layers of no features and batches of no rows, against the definitions; ``test_zero_widths.py`` runs this.

``python -m tests.ops.zero_widths 1 0`` runs all of them, by the reference and by each instruction set in turn, in a
process of its own: a division by zero kills it, and what it printed last is the case that did.
"""

from __future__ import annotations

import faulthandler
import functools
import itertools
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

import mtlkernels as mk
from mtlkernels import _extension
from mtlkernels.testing import DTYPES, Case, CaseFactory
from mtlkernels.testing.snr import snr_aver, snr_trans
from tests.ops.agreement import assert_agrees
from tests.ops.gated_mixture.definition import formula as mixture_formula
from tests.ops.level import gate_layers, normalized
from tests.ops.level.definition import formula as level_formula
from tests.ops.pcgrad.definition import assert_agrees as assert_pcgrad_agrees
from tests.ops.snr_aver.definition import formula as aver_formula
from tests.ops.snr_trans.definition import formula as trans_formula
from tests.summary import notes, second_trials

# The inputs' width, then the layers': none in the inputs, in the middle, at the end, and in several places.
WIDTHS = ((0, 3), (37, 0), (0, 0), (0, 20, 3), (4, 0, 3), (4, 33, 0), (4, 0, 0), (0, 0, 0), (4, 0, 5, 3), (40, 5, 0, 3))
ROWS = (0, 1, 4, 5, 33, 300)  # nothing; few; a group and less; kernels that want their weights prepared
ROUTING = gate_layers.ROUTING
NORMS: dict[str, dict[str, Any]] = {
    "batch": {"kind": "batch", "activation": "relu"},
    "layer": {"kind": "layer", "activation": "gelu"},
    "dropout": {"kind": "none", "activation": "relu", "dropout": 0.4},
    "prelu": {"kind": "layer", "activation": "prelu", "dropout": 0.2},
    "dice": {"kind": "none", "activation": "dice"},
    "batch and dice": {"kind": "batch", "activation": "dice", "dropout": 0.3},
}

Check = Callable[[], None]


def levels(make: CaseFactory, rows: int, widths: tuple[int, ...], threads: int) -> Iterator[tuple[str, Check]]:
    """Experts without norms: gates of logits and of layers, with gradients and without."""
    plain = make.expert_mixture(rows, widths, ROUTING, activation="gelu", biases=[True] * (len(widths) - 2) + [False])
    biased = make.expert_mixture(rows, widths, ROUTING, activation="leaky_relu", streams=False, stacked=True)
    layers = gate_layers.with_layers(make, rows, widths)
    for name, op, case in (
        ("logits", mk.expert_mixture, plain),
        ("stacked", mk.expert_mixture, biased),
        ("gate layers", gate_layers.by_layers, layers),
    ):
        for grad in (True, False):
            call = case if grad else case.map(torch.Tensor.detach)
            run = functools.partial(assert_agrees, op, level_formula, call, threads=threads)
            yield f"{name}, {'training' if grad else 'serving'}", run


def norms(
    make: CaseFactory, rows: int, widths: tuple[int, ...], threads: int, names: Sequence[str]
) -> Iterator[tuple[str, Check]]:
    """Experts with norms, dropout and slopes."""
    layers = len(widths) - 1
    for name in names:
        options = NORMS[name]
        if options["kind"] == "batch" and rows < 2:
            continue  # refused, as torch does
        case = normalized.case(
            make,
            rows,
            widths,
            ROUTING,
            [options["kind"]] * layers,
            activation=options["activation"],
            dropout=[options.get("dropout", 0.0)] * layers,
            eps=[0.1] * layers,
            one_slope=[layer % 2 == 1 for layer in range(layers)],
        )
        baseline = None if options["kind"] == "batch" else normalized.by_pytorch  # torch's batch norm has no [B, 0]
        arguments = (normalized.fused, level_formula, case, baseline, threads, normalized.FACTOR)
        yield name, functools.partial(assert_agrees, *arguments)


def mixtures(make: CaseFactory, rows: int, threads: int) -> Iterator[tuple[str, Check]]:
    """gated_mixture without features, SNR without features on either side."""
    trans = (mk.snr_trans, trans_formula)
    checks: list[tuple[str, Any, Any, Case]] = [
        ("gated_mixture", mk.gated_mixture, mixture_formula, make.gated_mixture(rows, 0, ROUTING)),
        ("snr_aver", mk.snr_aver, aver_formula, snr_aver(make, rows, 0, 3, 2, share=0.8)),
    ]
    for ins, outs in (((0, 0), (3,)), ((4, 0), (0, 5)), ((7,), (0, 0)), ((0,), (0,)), ((0, 40), (33, 0, 2))):
        case = snr_trans(make, rows, ins, outs, share=0.8)
        checks.append((f"snr_trans {ins} to {outs}", *trans, case))
    for ins, outs in ((0, 3), (3, 0), (0, 0)):
        case = snr_trans(make, rows, [ins] * 2, [outs] * 3, stacked=True, stacked_inputs=True)
        checks.append((f"stacked snr_trans {ins} to {outs}", *trans, case))
    for name, *arguments in checks:
        yield name, functools.partial(assert_agrees, *arguments, threads=threads)


def check_pcgrad(dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    """Parameters without elements, alone and among others."""
    make = CaseFactory(0, dtype)
    grads = [[make.leaf(size, requires_grad=False) for size in sizes] for _ in range(3)]
    order = torch.tensor([[1, 2], [2, 0], [0, 1]])
    for options in ({}, {"normalize": True, "max_norm": 0.5}, {"reduction": "mean", "project": False}):
        assert_pcgrad_agrees(grads, order, **options)
    if len(sizes) == 1:
        assert_pcgrad_agrees([[grad] for (grad,) in grads], order)
        joined = mk.pcgrad(torch.stack([grad for (grad,) in grads]), order=order)
        assert joined.shape == sizes and joined.dtype == dtype
    assert mk.gram(grads).shape == (3, 3)


def cases(dtypes: tuple[torch.dtype, ...] = DTYPES, rows: tuple[int, ...] = ROWS) -> Iterator[tuple[str, Check]]:
    """Every check, by a name that tells what it does; dtypes, threads and norms take turns."""
    for number, count in enumerate(rows):
        for index, widths in enumerate(WIDTHS):
            dtype = dtypes[(number // 2 + index) % len(dtypes)]
            threads = (1, 3)[(number + index // 2) % 2]  # three share the experts among them
            make = CaseFactory(count, dtype)
            names = list(NORMS)[(number + index) % 2 :: 2]
            for name, check in itertools.chain(
                levels(make, count, widths, threads), norms(make, count, widths, threads, names)
            ):
                yield f"{name}, {dtype}, {count} rows, widths {widths}, {threads} threads", check
        for dtype in dtypes:
            for name, check in mixtures(CaseFactory(count, dtype), count, 1 + 2 * (number % 2)):
                yield f"{name}, {dtype}, {count} rows", check
    for dtype in dtypes:
        for sizes in ((0,), (0, 0), (0, 5, 0), (5, 0)):
            yield f"pcgrad, {dtype}, parameters of {sizes}", functools.partial(check_pcgrad, dtype, sizes)


NAMES = ("reference", *_extension.instruction_sets())
THIRDS = NAMES[1:-1]  # which share their sources with the best: each checks a third, and three of them all


@contextmanager
def running(name: str) -> Iterator[None]:
    """In the block the reference is called, or that instruction set."""
    if name == "reference":
        with mk.use_backend("reference"):
            yield
    else:
        with _extension.instruction_set(name), mk.use_backend("cpp"):
            yield


def main(every: int, first: int) -> None:
    """Runs every ``every``-th check, from number ``first`` on."""
    faulthandler.enable()
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    count, failed = 0, 0
    for number, (case, check) in enumerate(cases()):
        for name in NAMES:
            if number % every != first or (name in THIRDS and (number - THIRDS.index(name)) % 3):
                continue
            print(f"{case}, {name}", flush=True)
            count += 1
            try:
                with running(name):
                    check()
            except Exception:
                failed += 1
                traceback.print_exc(limit=-3, file=sys.stdout)
    print(f"{count} checks, {failed} failed; {second_trials(len(notes))}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
