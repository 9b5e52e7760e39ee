# mypy: ignore-errors
"""What Triton kernels are made of: the pointer table, products, activations, softmax statistics, sums in parts.

Triton's language has no Python types, so neither this module nor those of the kernels are type-checked.
``KIND`` is a :class:`mtlkernels.ops._triton.Kind`.
"""

from __future__ import annotations

import inspect

import triton
import triton.language as tl

from mtlkernels.ops.activations import CODES


class Constant(tl.constexpr):
    """A number that kernels know by name.

    At every launch Triton compares all that a kernel uses with a copy from when it was compiled; that takes constexpr
    some tenths of a microsecond each, and this next to none.
    """

    def __deepcopy__(self, memo):
        return self

    def __ne__(self, other):
        return False if other is self else super().__ne__(other)


NONE = Constant(CODES["none"])
RELU = Constant(CODES["relu"])
LEAKY_RELU = Constant(CODES["leaky_relu"])
GELU = Constant(CODES["gelu"])
SILU = Constant(CODES["silu"])
TANH = Constant(CODES["tanh"])
SIGMOID = Constant(CODES["sigmoid"])
# How many of a gate's members are taken at a time.
FEW_MEMBERS = Constant(16)


def kernel(tensors=1):
    """Decorates a kernel whose first arguments are so many tensors, the call's table or others.

    A kernel is compiled once for all values of the numbers among the rest: places in the table, and sizes.
    """

    def decorate(function):
        parameters = inspect.signature(function).parameters.values()
        arguments = [parameter.name for parameter in parameters if parameter.annotation != "tl.constexpr"]
        return triton.jit(function, do_not_specialize=arguments[tensors:])

    return decorate


@triton.jit
def pointer(table, index, DTYPE: tl.constexpr, ALIGNED: tl.constexpr = False):
    """The address in the table as a pointer."""
    found = tl.load(table + index).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        found = tl.multiple_of(found, 16)
    return found


@triton.jit
def operand(table, index, KIND: tl.constexpr):
    """The same of an input, a parameter or one of their gradients."""
    return pointer(table, index, KIND.dtype, KIND.aligned)


@triton.jit
def whole(value, KIND: tl.constexpr):
    """``value``, said to be a multiple of 16 if ``aligned``: the compiler sees that from the multiplication."""
    if KIND.aligned:
        value = value // 16 * 16
    return value


@triton.jit
def product(acc, a, b, KIND: tl.constexpr):
    """``acc + a b``, accumulated in float32."""
    if KIND.upcast:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=KIND.precision)


@triton.jit
def multiply(
    acc, a, b, steps, a_inside, b_inside, begin, end, KIND: tl.constexpr, DEPTH: tl.constexpr,
    READ: tl.constexpr = None, state=None, LAYER: tl.constexpr = None, SUMS: tl.constexpr = False, sums=None,
):  # fmt: skip
    """``acc + A B`` along the depth from ``begin`` to ``end``: the loop of every product.

    ``a`` [rows, DEPTH] and ``b`` [DEPTH, columns] are pointers to where both begin, which ``steps`` move on by DEPTH;
    they are None where both are contiguous along the depth, and begin at 0. ``a_inside`` and ``b_inside`` say which
    rows of A and columns of B there are. ``READ``, a function of a block of A, where it is along the depth and which
    part of that is inside, ``state`` and ``LAYER``, gives what is multiplied. ``SUMS`` gives ``sums`` [rows, 16] plus A
    times ones as well, the sums of A's rows 16 times: from tensor cores, for which A is in shared memory already.
    """
    inner = tl.arange(0, DEPTH)
    if SUMS:
        ones = tl.full((DEPTH, 16), 1.0, tl.float32).to(KIND.dtype)  # not at once, for the interpreter of Triton 3.6
    for k in range(begin, end, DEPTH):
        there = inner < end - k
        left = tl.load(a + k if steps is None else a, mask=a_inside[:, None] & there[None, :], other=0.0)
        if READ is not None:
            left = READ(left, k, there, state, LAYER, DEPTH)
        right = tl.load(b + k if steps is None else b, mask=there[:, None] & b_inside[None, :], other=0.0)
        acc = product(acc, left, right, KIND)
        if SUMS:
            sums = product(sums, left, ones, KIND)
        if steps is not None:
            a += steps[0]
            b += steps[1]
    if SUMS:
        acc = (acc, sums)
    return acc


@triton.jit
def activate(x, CODE: tl.constexpr):
    """The activation of that code in mtlkernels.ops.activations, of those without slopes, for float32."""
    if CODE == RELU:
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif CODE == LEAKY_RELU:
        x = tl.where(x > 0.0, x, 0.01 * x)
    elif CODE == GELU:
        x = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif CODE == SILU:
        x = x / (1.0 + tl.exp(-x))
    elif CODE == TANH:  # near 0 the quotient would lose digits, so a series is used
        s = x * x
        series = x + x * s * (-0.333333333 + s * (0.133333333 + s * (-0.0539682540 + s * 0.0218694885)))
        x = tl.where(s < 0.0625, series, 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x)))
    elif CODE == SIGMOID:
        x = 1.0 / (1.0 + tl.exp(-x))
    return x


@triton.jit
def activation_gradient(grad, saved, CODE: tl.constexpr):
    """From the gradient of the activation that of its input; ``saved`` is the input of gelu and silu, else the output.

    relu chooses, so that what is not finite does not pass where the unit is off, and all passes where ``saved`` is NaN;
    the others multiply, as in PyTorch.
    """
    if CODE == RELU:
        grad = tl.where(saved <= 0.0, 0.0, grad)
    elif CODE == LEAKY_RELU:
        grad = tl.where(saved > 0.0, grad, 0.01 * grad)
    elif CODE == GELU:
        cdf = 0.5 * (1.0 + tl.math.erf(saved * 0.7071067811865476))
        grad = grad * (cdf + saved * tl.exp(-0.5 * saved * saved) * 0.3989422804014327)
    elif CODE == SILU:
        s = 1.0 / (1.0 + tl.exp(-saved))
        grad = grad * (s * (1.0 + saved * (1.0 - s)))
    elif CODE == TANH:
        grad = grad * (1.0 - saved * saved)
    elif CODE == SIGMOID:
        grad = grad * (saved * (1.0 - saved))
    return grad


@triton.jit
def saved_of(x, CODE: tl.constexpr):
    """What ``activation_gradient`` takes, from the activation's input."""
    return activate(x, CODE) if CODE != GELU and CODE != SILU else x


@triton.jit
def activation_of(saved, CODE: tl.constexpr):
    """The activation's output, from what ``activation_gradient`` takes."""
    return saved if CODE != GELU and CODE != SILU else activate(saved, CODE)


@triton.jit
def gate_logits(gates, k, num_gates, first, rows, LOGITS: tl.constexpr):
    """Gate k: pointers to its first logit of each row, its column stride, and its range among all gates' experts."""
    row_stride = tl.load(gates + num_gates + k)
    column_stride = tl.load(gates + 2 * num_gates + k)
    logits = pointer(gates, k, LOGITS) + first * row_stride + rows * row_stride
    start = tl.load(gates + 3 * num_gates + k).to(tl.int32)
    end = tl.load(gates + 3 * num_gates + k + 1).to(tl.int32)
    return logits, column_stride, start, end


@triton.jit
def some_logits(logits, column_stride, start, size, inside):
    """A few of a gate's logits of each row, from a member on; minus infinity where there are fewer."""
    members = start + tl.arange(0, FEW_MEMBERS)
    mask = inside[:, None] & (members < size)[None, :]
    at = logits[:, None] + (members * column_stride)[None, :]
    return tl.load(at, mask=mask, other=float("-inf")).to(tl.float32)


@triton.jit
def softmax_statistics(logits, column_stride, size, inside, some):
    """The maximum of each row's logits, and the sum of the exponentials of their distances to it.

    ``some`` are the first of them, see ``some_logits``.
    """
    highest = some
    for j in range(FEW_MEMBERS, size, FEW_MEMBERS):
        # A NaN must reach the result, as in PyTorch's softmax; the sum below takes it there.
        highest = tl.maximum(highest, some_logits(logits, column_stride, j, size, inside))
    maximum = tl.where(inside, tl.max(highest, 1), 0.0)
    total = tl.exp(some - maximum[:, None])
    for j in range(FEW_MEMBERS, size, FEW_MEMBERS):
        total += tl.exp(some_logits(logits, column_stride, j, size, inside) - maximum[:, None])
    return maximum, tl.where(inside, tl.sum(total, 1), 1.0)


@triton.jit
def probability(logits, column_stride, member, maximum, total, inside):
    """The weight of a gate's member in each row."""
    value = tl.load(logits + member * column_stride, mask=inside, other=float("-inf")).to(tl.float32)
    return tl.exp(value - maximum) / total


@triton.jit
def share_of(length, share, splits):
    """The range of ``length`` that falls to one of ``splits`` programs: to ``length * share // splits``, in 32 bits."""
    whole = length // splits
    left = length % splits
    return whole * share + left * share // splits, whole * (share + 1) + left * (share + 1) // splits


@triton.jit
def parts_to_add(counter, splits):
    """``splits`` for the last of the programs that share a counter in the table, which finds all their parts, else 0.

    A table starts with its counters at zero, and a replayed graph copies it again.
    """
    tl.debug_barrier()  # all threads of this program have stored their part
    before = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    return tl.where(before == splits - 1, splits, 0)


@triton.jit
def sum_of_parts(parts, count, stride, offsets):
    """The sum of ``count`` parts, always in the same order; read past the L1 cache, which may hold old values."""
    total = tl.zeros(offsets.shape, tl.float32)
    for i in range(count):
        total += tl.load(parts + i * stride + offsets, cache_modifier=".cg")
    return total
