"""Calls of several Python threads at a time give the bits that they give alone, also inside autograd's own threads."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import mtlkernels as mk
from tests.ops.calls import Results, calls

PYTHON_THREADS, ROUNDS = 4, 3
# As deep as this autograd goes on in a thread of its own, so that the stack does not overflow.
DEEPEST_IN_ONE_THREAD = 60


def same(found: Results, expected: Results) -> bool:
    return all(torch.equal(a, b) for name in expected for a, b in zip(found[name], expected[name], strict=True))


def together(run: Callable[[int], None]) -> None:
    """Runs it in several threads, which start at the same moment; raises what the first of them has raised."""
    start = threading.Barrier(PYTHON_THREADS)
    errors: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            start.wait()
            run(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(PYTHON_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("threads", [1, 2])
def test_every_operator(threads: int) -> None:
    """On the same tensors, each thread in an order of its own; they share the pool of memory."""
    torch.set_num_threads(threads)
    made = calls(dropout=0.0)
    expected = {name: call() for name, call in made.items()}

    def run(number: int) -> None:
        for turn in range(ROUNDS):
            names = list(made)
            random.Random(ROUNDS * number + turn).shuffle(names)
            wrong = [name for name in names if not same(made[name](), expected[name])]
            assert not wrong, wrong

    together(run)


def test_one_model() -> None:
    """A model that several threads evaluate and differentiate, with checkpoints that run its levels in backward."""
    trunk = mk.nn.PLE(40, 2, (48, 40), num_specific=2, num_shared=2, num_levels=2)
    x = torch.randn(200, 40)

    def step() -> list[Tensor]:
        own = x.clone().requires_grad_()
        outputs = checkpoint(lambda rows: tuple(trunk(rows)), own, use_reentrant=False)
        return list(torch.autograd.grad([y.square().sum() for y in outputs], [own, *trunk.parameters()]))

    expected = step()

    def run(_: int) -> None:
        for _ in range(ROUNDS):
            assert all(map(torch.equal, step(), expected))

    together(run)


class Nested(torch.autograd.Function):
    """The gradient of ``call`` at x, taken inside ``depth`` backward passes, and the thread in which it was taken."""

    seen: set[int]

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: Callable[[Tensor], Tensor], depth: int) -> Tensor:
        ctx.x, ctx.call, ctx.depth = x.detach(), call, depth
        return x.detach().sum()

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        with torch.enable_grad():
            x = ctx.x.requires_grad_()
            if ctx.depth == 0:
                Nested.seen.add(threading.get_ident())
                y = ctx.call(x)
            else:
                y = Nested.apply(x, ctx.call, ctx.depth - 1)  # type: ignore[no-untyped-call]
            return *torch.autograd.grad(y, x), None, None


def test_inside_autograds_threads() -> None:
    weights, logits = [torch.randn(3, 8, 16)], torch.randn(70, 6)

    def call(x: Tensor) -> Tensor:
        return torch.cat(mk.expert_mixture(x, weights, None, logits, mk.Routing.mmoe(3, 2))).square().sum()

    x = torch.randn(70, 16, requires_grad=True)
    (expected,) = torch.autograd.grad(call(x), x)
    Nested.seen = set()
    for depth in (0, DEEPEST_IN_ONE_THREAD + 10):
        y = Nested.apply(x, call, depth)  # type: ignore[no-untyped-call]
        (found,) = torch.autograd.grad(y, x)
        assert torch.equal(found, expected)
    assert len(Nested.seen) == 2, "both were taken in one thread, so that this tests nothing of autograd's own"


# What each of four threads does with one model, whose parameters other operators of PyTorch's read meanwhile.
SHARED = """
import threading
import torch
from torch import nn
import mtlkernels as mk

torch.set_num_threads(1)
x, serves = torch.randn(200, 12), False
{model}
call = globals().get("call", model)

def work(number):
    with torch.set_grad_enabled(number > 0 and not serves):
        for _ in range(250):
            call(x)
            if number > 1:
                with torch.enable_grad():
                    for parameter in model.parameters():
                        parameter * 2

threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""
MODELS = {
    "a trunk": "model = mk.nn.MMoE(12, 3, (12, 7), num_experts=4)",
    "a trunk with dropout": "model = mk.nn.MMoE(12, 3, (12, 7), num_experts=4, dropout=0.1)",
    "a trunk with batch norm": "model = mk.nn.MMoE(12, 3, (12, 7), num_experts=4, batch_norm=True).eval()",
    "a trunk under autocast": """
model = mk.nn.MMoE(12, 3, (12, 7), num_experts=4)
def call(x):
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
""",
    "SNR-Trans": "model = mk.nn.SNR(12, 3, (12, 7), (4, 4))",
    "SNR-Aver": "model = mk.nn.SNR(12, 3, (12, 7), (4, 4), mode='aver')",
    "an exported trunk": """
model = torch.export.export(mk.nn.MMoE(12, 3, (12, 7), num_experts=4), (x,)).module()
""",
    "an exported SNR": "model = torch.export.export(mk.nn.SNR(12, 3, (12, 7), (4, 4)), (x,)).module()",
    "a compiled trunk": """
model = torch.compile(mk.nn.MMoE(12, 3, (12, 7), num_experts=4), backend="eager")
model(x)
""",
    "vmap": """
model = mk.nn.MMoE(12, 3, (12, 7), num_experts=4)
call = lambda x: torch.func.vmap(lambda rows: tuple(model(rows)))(x.view(4, 50, 12))
""",
    "vjp": """
model = mk.nn.MMoE(12, 3, (12, 7), num_experts=4)
call = lambda x: torch.func.vjp(lambda rows: tuple(model(rows)), x)
""",
    "lists with joined tensors, that serve": """
model, serves = nn.ParameterList([*torch.randn(2, 4, 12, 12), torch.randn(12, 12)]), True
def call(x):
    mk.expert_mixture(x, [model[0], model[1]], None, None, mk.Routing.mmoe(4, 3), gate_weights=model[2])
""",
    "a converted library's, in evaluation": """
from tests.convert.models import by_name, features, rechub_mmoe
model, x = rechub_mmoe().float().eval(), by_name(features(200).float())
mk.convert(model, force=True)
""",
}


# Python and PyTorch take longer to start than most of these run.
SEVERAL = [list(MODELS)[i::3] for i in range(3)]


@pytest.mark.parametrize("names", SEVERAL, ids=", ".join)
def test_none_waits_for_another_for_ever(names: list[str]) -> None:
    """PyTorch makes a leaf's node under a lock, and may wait for the GIL: nobody waits for that lock with the GIL."""
    programs = {name: SHARED.format(model=MODELS[name]) for name in names}
    for_each = f"for name, program in {programs!r}.items(): print(name, flush=True), exec(program, {{}})"
    subprocess.run([sys.executable, "-c", for_each], check=True, timeout=240)


def test_mistakes_leave_what_other_threads_draw_alone() -> None:
    weights, logits, x = [torch.randn(3, 5, 4)], [torch.randn(8, 2)], torch.randn(8, 4)
    done = threading.Event()

    def mistaken() -> None:
        while not done.is_set():
            with pytest.raises(ValueError, match="gate_logits"):
                mk.expert_mixture(x, weights, None, logits, mk.Routing.mmoe(3, 1), dropout=0.5)

    other = threading.Thread(target=mistaken)
    other.start()
    try:
        drawn = [int(torch.randint(2**62, (1,))) for _ in range(5000)]
    finally:
        done.set()
        other.join()
    assert len(set(drawn)) == len(drawn)
