"""More than 2^31 elements in each tensor that can have them within 16 GB, forward and backward, by the C++ kernels.

Inputs are zero but for some rows on either side of element 2^31 and at the ends, and so is what comes from above. Then
all that a call gives is known from these rows alone, gradients of parameters too: it is compared with these rows in
float64, within the error budget, and the other rows with what a row of zeros gives. Where parameters are large, some of
their rows are other than zero in the same way.

These take minutes and gigabytes, so that ``make test`` leaves out what is marked ``large``; ``make large`` runs it, one
test after another. Peak memory is read from the system.

What cannot have that many elements in 16 GB, at 2 bytes each:

- The scales and shifts of a norm, and the slopes of PReLU and Dice: a layer that wide has a weight and an output of as
  many elements, and sums of a row in float32.
- The biases' gradients together with the weights' gradients: two tensors and two gradients.
- The weights of SNR-Trans in training, but for those here, whose zeros take no memory: their gradients are summed in
  float32, in 8.6 GB beside the 4.3 of the weights and of the gradients.
- z of SNR: the kernels take it as float64, which is more than 16 GB alone.
- A single row of inputs, and so one gate's or expert's row of weights: rows are taken as float32, several at a time.
"""

from __future__ import annotations

import contextlib
import gc
import math
import mmap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mtlkernels as mk
from mtlkernels.testing import Case, tensors_in
from tests import requires
from tests.ops import kept_memory
from tests.ops.agreement import assert_as_exact

pytestmark = [
    requires.cpp_kernels,  # only they fuse the forward pass on a CPU
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc, which this system lacks"),
]

GIGABYTE = 10**9
MOST = 16 * GIGABYTE
DTYPE = torch.bfloat16
# Rows of WIDTH have element 2^31 at the begin of row EDGE.
WIDTH, EDGE = 2**11, 2**20
ROWS = EDGE + 64
LOOK = torch.tensor([0, 1, EDGE - 1, EDGE, EDGE + 1, ROWS - 1])
ZERO_ROW = 5  # one that nobody looks at
assert EDGE * WIDTH == 2**31 and ZERO_ROW not in LOOK


@pytest.fixture(autouse=True)
def _within_16_gb(request: pytest.FixtureRequest) -> Iterator[None]:
    """By the C++ kernels on two threads; skips where less memory is free than the test's mark says."""
    marker = request.node.get_closest_marker("large")
    requires.memory(marker.args[0] if marker else 3)
    torch.set_num_threads(2)
    gc.collect()
    kept_memory.release()
    with contextlib.suppress(PermissionError):  # then the peak is that of the whole process
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    with mk.use_backend("cpp"):
        yield
    kept_memory.release()
    assert kept_memory.peak() <= MOST, f"{kept_memory.peak() / GIGABYTE:.1f} GB"


def zeros(*shape: int) -> Tensor:
    """Zeros that take no memory until they are written; ``torch.zeros`` writes them."""
    memory = mmap.mmap(-1, math.prod(shape) * DTYPE.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=DTYPE).view(shape)


def some_rows(*shape: int, rows: Tensor = LOOK) -> Tensor:
    """Zero but for some rows, by default those that are looked at."""
    tensor = zeros(*shape)
    tensor[rows] = torch.randn(len(rows), *shape[1:]).to(DTYPE)
    return tensor


def few_rows(*widths: int) -> list[Tensor]:
    return [torch.randn(4, width).to(DTYPE) for width in widths]


def parameter(*shape: int) -> Tensor:
    return (torch.randn(shape) / shape[-1] ** 0.5).to(DTYPE)


def looked_at(value: Any) -> Any:
    """The rows that are looked at, of each tensor that has rows."""
    if isinstance(value, Tensor):
        return value[LOOK] if value.shape[0] == ROWS else value
    return [looked_at(item) for item in value] if isinstance(value, list) else value


def evaluated(op: Callable[..., Any], arguments: dict[str, Any], upstream: list[Tensor]) -> list[Tensor]:
    """Outputs, and the gradients of all arguments that want one."""
    outputs = list(op(**arguments))
    leaves = [t for value in arguments.values() for t in tensors_in(value) if t.requires_grad]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, upstream)]


def few(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same arguments of the rows that are looked at, in some dtype."""
    own = Case({name: looked_at(value) for name, value in arguments.items()}, DTYPE)
    return dict(own.to(dtype).arguments)


def small(
    op: Callable[..., Any], arguments: dict[str, Any], upstream: list[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """What :func:`evaluated` gives for the rows that are looked at, by the reference in some dtype."""
    with mk.use_backend("reference"):
        return evaluated(op, few(arguments, dtype), [y[LOOK].to(dtype) for y in upstream])


def check(op: Callable[..., Any], arguments: dict[str, Any], widths: list[int], wanted: tuple[str, ...] = ()) -> None:
    """A call of which what is in ``wanted``, or everything, gets a gradient; ``widths`` are those of its outputs."""
    for name in wanted or arguments:
        for tensor in tensors_in(arguments[name]):
            tensor.requires_grad_()
    upstream = [some_rows(ROWS, width) for width in widths]
    found = evaluated(op, arguments, upstream)
    assert_as_exact(
        looked_at(found),
        small(op, arguments, upstream, torch.float64),
        small(op, arguments, upstream, DTYPE),
    )
    for result in found:
        if result.shape[0] == ROWS:
            assert others_are_alike(result)


def assert_close(found: Tensor, exact: Tensor) -> None:
    """Within what bfloat16 rounds off."""
    assert (found.double() - exact).norm() <= 2**-7 * exact.norm()


def others_are_alike(result: Tensor) -> bool:
    """Whether all rows that were not looked at are the same, of an input of zeros; changes those that were."""
    row = result[ZERO_ROW].clone()
    result[LOOK] = row
    return all(bool((part == row).all()) for part in result.split(2**14))


# expert_mixture -----------------------------------------------------------------------------------------------------


def level(**arguments: Any) -> Any:
    routing = mk.Routing.mmoe(len(arguments["weights"][0]), 1)
    return mk.expert_mixture(**arguments, routing=routing, activation="silu")


def level_arguments(experts: int, *widths: int) -> dict[str, Any]:
    layers = list(zip(widths[1:], widths, strict=False))
    return {
        "inputs": some_rows(ROWS, widths[0]),
        "weights": [[parameter(out, into) for _ in range(experts)] for out, into in layers],
        "biases": [[parameter(out) for _ in range(experts)] for out, _ in layers],
        "gate_logits": [some_rows(ROWS, experts)],
    }


@pytest.mark.slow
def test_an_intermediate_is_never_allocated() -> None:
    """Serving: only a block of rows of it is ever there."""
    arguments = level_arguments(32, 4, WIDTH // 32)
    before = kept_memory.peak()
    with torch.inference_mode():
        (found,) = level(**arguments)
    assert kept_memory.peak() - before < GIGABYTE
    with mk.use_backend("reference"):
        assert_close(found[LOOK], level(**few(arguments, torch.float64))[0])


@pytest.mark.large(7)
def test_inputs_of_a_level() -> None:
    check(level, level_arguments(2, WIDTH, 4), [4])


@pytest.mark.large(10)
def test_outputs_of_a_level() -> None:
    """With what the last layer gives, which is kept for the backward pass, two tensors."""
    check(level, level_arguments(1, 4, WIDTH), [WIDTH])


@pytest.mark.large(7)
def test_hidden_units_of_a_level() -> None:
    """They are kept for the backward pass."""
    check(level, level_arguments(1, 4, WIDTH, 4), [4])


@pytest.mark.large(10)
def test_layer_norm_of_a_level() -> None:
    """Its layer's results before and after it are as large."""
    norm = torch.nn.LayerNorm(WIDTH, dtype=DTYPE)
    wide = torch.nn.LayerNorm(WIDTH, dtype=torch.float64)

    def normalized(**arguments: Any) -> Any:
        own = wide if arguments["inputs"].dtype == torch.float64 else norm
        return level(**arguments, norms=[[own], None])

    check(normalized, level_arguments(1, 4, WIDTH, 4), [4])


@pytest.mark.large(10)
def test_stacked_weights_of_a_level() -> None:
    """Few rows of 513 experts, all but some of which are zero."""
    experts = 513
    some = torch.tensor([0, 1, 511, 512])
    weights = some_rows(experts, WIDTH, WIDTH, rows=some)
    x, logits, upstream = few_rows(WIDTH, experts, WIDTH)
    call = {"inputs": x, "weights": [weights], "biases": None, "gate_logits": logits}
    tensors = [t.requires_grad_() for t in (x, weights)]
    (y,) = mk.expert_mixture(**call, routing=mk.Routing.mmoe(experts, 1), activation="none")
    dx, dw = torch.autograd.grad(y, tensors, upstream)
    x, shares, up = x.detach().double(), logits.double().softmax(1), upstream.double()
    dense = weights.detach()[some].double()
    assert_close(y, torch.einsum("be,ehd,bd->bh", shares[:, some], dense, x))
    assert_close(dx, torch.einsum("be,ehd,bh->bd", shares[:, some], dense, up))
    for e in (0, 1, 255, 510, 511, 512):
        assert_close(dw[e], torch.einsum("b,bh,bd->hd", shares[:, e], up, x))


@pytest.mark.large(7)
def test_one_weight_of_a_level() -> None:
    out, into = 2**16, 2**15 + 1
    some = torch.tensor([0, 1, out - 3, out - 2, out - 1])
    weight = some_rows(out, into, rows=some)
    x, upstream = few_rows(into, out)
    call = {"inputs": x, "weights": [[weight]], "biases": None, "gate_logits": zeros(4, 1)}
    tensors = [t.requires_grad_() for t in (x, weight)]
    (y,) = mk.expert_mixture(**call, routing=mk.Routing.mmoe(1, 1), activation="none")
    dx, dw = torch.autograd.grad(y, tensors, upstream)
    x, up, dense = x.detach().double(), upstream.double(), weight.detach()[some].double()
    assert_close(y[:, some], x @ dense.T)
    assert y.count_nonzero() <= 4 * len(some)
    assert_close(dx, up[:, some] @ dense)
    for h in (0, 1, out // 2, out - 3, out - 2, out - 1):
        assert_close(dw[h], up[:, h] @ x)


@pytest.mark.large(7)
def test_gate_weights_of_a_level() -> None:
    """Of 32,769 experts with an output each, all but some of which are zero, as their gates' weights are."""
    experts, into = 2**15 + 1, 2**16
    some = torch.tensor([0, 1, experts - 2, experts - 1])
    weights, gates = some_rows(experts, 1, into, rows=some), some_rows(experts, into, rows=some)
    weights[some] /= 256
    gates[some] /= 2048
    x, upstream = few_rows(into, 1)
    call = {"inputs": x, "weights": [weights], "biases": None, "gate_logits": None, "gate_weights": [gates]}
    gates.requires_grad_()
    (y,) = mk.expert_mixture(**call, routing=mk.Routing.mmoe(experts, 1), activation="none")
    (dw,) = torch.autograd.grad(y, gates, upstream)
    logits, values = torch.zeros(4, experts).double(), torch.zeros(4, experts).double()
    logits[:, some], values[:, some] = (x.double() @ t.double().T for t in (gates.detach()[some], weights[some, 0]))
    shares = logits.softmax(1)
    mixed = (shares * values).sum(1, keepdim=True)
    assert_close(y.detach(), mixed)
    inner = shares * (values - mixed) * upstream.double()
    for e in some.tolist():
        assert_close(dw[e], inner[:, e] @ x.double())


@pytest.mark.large(15)
def test_biases_of_a_level() -> None:
    """One row, and weights that want no gradient."""
    experts, out = 2**10 + 1, 2**21
    some = torch.tensor([0, 1, experts - 2, experts - 1])
    biases = some_rows(experts, out, rows=some).requires_grad_()
    x, logits, upstream = (t[:1] for t in few_rows(1, experts, out))
    call = {"inputs": x, "weights": [zeros(experts, out, 1)], "biases": [biases], "gate_logits": logits}
    (y,) = mk.expert_mixture(**call, routing=mk.Routing.mmoe(experts, 1), activation="none")
    (db,) = torch.autograd.grad(y, biases, upstream)
    shares = logits.double().softmax(1)
    assert_close(y.detach(), shares[:, some] @ biases.detach()[some].double())
    for e in (*some.tolist(), experts // 2):
        assert_close(db[e], shares[0, e] * upstream[0].double())


# gated_mixture ------------------------------------------------------------------------------------------------------


def mixture(**arguments: Any) -> Any:
    return mk.gated_mixture(**arguments, routing=mk.Routing.mmoe(arguments["experts"].shape[1], 1))


@pytest.mark.large(7)
def test_experts_of_gated_mixture() -> None:
    check(mixture, {"experts": some_rows(ROWS, 32, 64), "gate_logits": [some_rows(ROWS, 32)]}, [64])


@pytest.mark.large(10)
def test_outputs_of_gated_mixture() -> None:
    check(mixture, {"experts": some_rows(ROWS, 1, WIDTH), "gate_logits": [some_rows(ROWS, 1)]}, [WIDTH])


@pytest.mark.large(7)
def test_logits_of_gated_mixture() -> None:
    experts = torch.randn(1, WIDTH, 1).to(DTYPE).expand(ROWS, WIDTH, 1)
    check(mixture, {"experts": experts, "gate_logits": [some_rows(ROWS, WIDTH)]}, [1], ("gate_logits",))


# SNR ----------------------------------------------------------------------------------------------------------------


@pytest.mark.large(7)
def test_inputs_of_snr_trans() -> None:
    arguments = {"u": [some_rows(ROWS, WIDTH)], "weight": [[parameter(4, WIDTH)]], "z": torch.ones(1, 1, dtype=DTYPE)}
    check(lambda **given: mk.snr_trans(**given), arguments, [4])


@pytest.mark.large(10)
def test_outputs_of_snr_trans() -> None:
    arguments = {"u": [some_rows(ROWS, 4)], "weight": [[parameter(WIDTH, 4)]], "z": torch.ones(1, 1, dtype=DTYPE)}
    check(lambda **given: mk.snr_trans(**given), arguments, [WIDTH])


@pytest.mark.large(15)
def test_weights_of_snr_trans() -> None:
    """Of 513 outputs, all but some of which are zero."""
    outputs, rows = 513, 4
    some = torch.tensor([0, 1, 511, 512])
    weight = some_rows(outputs, 1, WIDTH, WIDTH, rows=some).requires_grad_()
    u, upstream = torch.randn(rows, WIDTH).to(DTYPE), torch.randn(outputs, rows, WIDTH).to(DTYPE)
    ys = mk.snr_trans([u], weight, torch.ones(outputs, 1, dtype=DTYPE))
    (dw,) = torch.autograd.grad(ys, [weight], list(upstream))
    for i in (0, 1, 255, 510, 511, 512):
        assert_close(ys[i].detach(), u.double() @ weight.detach()[i, 0].double().T)
        assert_close(dw[i, 0], upstream[i].double().T @ u.double())


@pytest.mark.large(10)
def test_snr_aver() -> None:
    """Its inputs and its outputs are of one width."""
    arguments = {"u": [some_rows(ROWS, WIDTH)], "z": torch.full((1, 1), 0.5, dtype=DTYPE)}
    check(lambda **given: mk.snr_aver(**given), arguments, [WIDTH])


# PCGrad -------------------------------------------------------------------------------------------------------------

ORDER = torch.tensor([[1], [0]])


def conflicting(length: int) -> list[list[Tensor]]:
    """Gradients of two tasks that conflict, in memory that both share."""
    base = zeros(length + 1)
    base[LOOK * WIDTH % length] = torch.tensor([2.0, -3.0, 5.0, -7.0, 11.0, 13.0], dtype=DTYPE)
    base[LOOK * WIDTH % length + 1] = -1.0
    return [[base[:length]], [base[1:]]]


def repaired(first: Tensor, second: Tensor) -> Tensor:
    """What PCGrad makes of two gradients, in float64."""
    a, b = first.double(), second.double()
    inner = float(a @ b)
    assert inner < 0
    return a - inner / float(b @ b) * b + b - inner / float(a @ a) * a


def found_in(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Where a tensor is not zero, and what is there; piece by piece."""
    places = [part.nonzero()[:, 0] + i * 2**26 for i, part in enumerate(tensor.split(2**26))]
    where = torch.cat(places)
    return where, tensor[where]


@pytest.mark.large(7)
def test_one_gradient_of_pcgrad() -> None:
    ((first,), (second,)) = grads = conflicting(2**31 + 2**17)
    where = torch.cat([found_in(first)[0], found_in(second)[0]]).unique()
    a, b = first[where].double(), second[where].double()
    gram = mk.gram(grads)
    assert_close(gram, torch.stack([torch.stack([p @ q for q in (a, b)]) for p in (a, b)]))
    (found,) = mk.pcgrad(grads, order=ORDER)
    assert torch.equal(found_in(found)[0], where)
    assert_close(found[where], repaired(a, b))


@pytest.mark.slow
def test_many_gradients_of_pcgrad() -> None:
    """33 parameters, the same gradients for each of them."""
    ((first,), (second,)) = conflicting(2**26)
    gram = mk.gram([[first] * 33, [second] * 33])
    a, b = first.double(), second.double()
    assert_close(gram, 33 * torch.stack([torch.stack([p @ q for q in (a, b)]) for p in (a, b)]))
