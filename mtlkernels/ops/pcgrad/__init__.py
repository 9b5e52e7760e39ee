"""PCGrad: conflicting task gradients projected onto each other's normal planes, in two passes over the parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypedDict, overload

import torch
from torch import Tensor

from mtlkernels import _backends
from mtlkernels.ops._call import needs_plain, needs_reference, traced_under_func
from mtlkernels.ops._table import moved
from mtlkernels.ops.pcgrad import autograd, reference  # noqa: F401  (autograd registers the operators' rules)
from mtlkernels.ops.pcgrad.checks import Options, check_generator, check_gram, check_group, check_options, check_order
from mtlkernels.ops.pcgrad.gradients import Gradients, fail_together, flattened, gradients_of, mean_over_ranks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

Grads = Tensor | Sequence[Sequence[Tensor | None]]


def gram(grads: Grads, *, group: ProcessGroup | None = None) -> Tensor:
    """The Gram matrix of the tasks' gradients: ``G_ij = <g_i, g_j>`` over all parameters.

    One pass over lists of tensors, none of which is copied or concatenated. Sums are in float64, in an order that
    depends on shapes and strides alone: on one machine the same gradients, laid out alike, give the same bits, but
    others where a derivative is wanted, as the reference runs then. Of narrower dtypes up to 16 products are added up
    in float32 first, where no square leaves its range, so that an entry is within 1e-6 of ``|g_i| |g_j|``, and mostly
    within 1e-7. Differentiable in dense gradients.

    Args:
        grads: a sequence over T tasks of sequences over parameters of tensors or None, which counts as zero; or one
            tensor [T, P]. float32, bfloat16, float16 or float64, one dtype a parameter; dense or sparse_coo; or
            DTensors.
        group: the matrix is that of the gradients' means over the ranks of this process group; see
            :func:`mtlkernels.pcgrad`.

    Returns:
        [T, T] in float64 on the device of the gradients, over all of their shards where they are DTensors.

    Raises:
        TypeError: an argument is of the wrong kind, dtype or layout.
        ValueError: numbers of parameters, shapes or devices do not agree, on this rank or between ranks.
        RuntimeError: another rank of the group has failed; or :func:`mtlkernels.use_backend` asks for an implementation
            that does not serve the call, as none but the reference does where a derivative is wanted.
    """
    check_group(group)
    gradients = fail_together(group, lambda: gradients_of(*flattened(grads), group))
    return mean_over_ranks(group, gradients).gram()


def pcgrad_weights(
    gram: Tensor,
    order: Tensor | Sequence[Sequence[int]] | None = None,
    *,
    generator: torch.Generator | None = None,
    include_self: bool = False,
    max_norm: float | None = None,
    normalize: bool = False,
    project: bool = True,
    eps: float = 0.0,
) -> Tensor:
    """What PCGrad makes of tasks' gradients, as coefficients: ``g_i' = sum_j W_ij g_j``, from their Gram matrix alone.

    Runs where ``gram`` is, without reading anything back. Differentiable in ``gram``.

    Args:
        gram: [T, T] in float64, see :func:`mtlkernels.gram`.
        order, generator, include_self, max_norm, normalize, project, eps: as for :func:`mtlkernels.pcgrad`.

    Returns:
        W [T, T] in float64.

    Raises:
        TypeError: an argument is of the wrong kind or dtype.
        ValueError: a shape or a value is wrong.
        RuntimeError: :func:`mtlkernels.use_backend` asks for an implementation that does not serve the call, as none
            but the reference does where a derivative is wanted.
    """
    check_gram(gram)
    options = check_options(include_self, max_norm, normalize, project, eps)
    return solve(gram, draw_order(order, generator, gram.shape[0], gram.device, project), options)[0]


class _Options(TypedDict, total=False):
    """The keyword arguments of :func:`pcgrad`."""

    order: Tensor | Sequence[Sequence[int]] | None
    generator: torch.Generator | None
    reduction: str
    include_self: bool
    max_norm: float | None
    normalize: bool
    project: bool
    eps: float
    group: ProcessGroup | None


@overload
def pcgrad(grads: Tensor, **options: Unpack[_Options]) -> Tensor: ...


@overload
def pcgrad(grads: Sequence[Sequence[Tensor | None]], **options: Unpack[_Options]) -> list[Tensor | None]: ...


def pcgrad(
    grads: Grads,
    *,
    order: Tensor | Sequence[Sequence[int]] | None = None,
    generator: torch.Generator | None = None,
    reduction: str = "sum",
    include_self: bool = False,
    max_norm: float | None = None,
    normalize: bool = False,
    project: bool = True,
    eps: float = 0.0,
    group: ProcessGroup | None = None,
) -> Any:
    """Gradient surgery (PCGrad; Yu et al., NeurIPS 2020, algorithm 1): one update from T conflicting gradients.

    For each task i, and each other task j in the order given, ``d = <g_i', g_j>`` with g_i' the gradient projected so
    far and g_j the original one; where d < 0, ``g_i' -= d / (|g_j|^2 + eps) * g_j``. The result is the sum of the g_i',
    or their mean. The projections run on the T x T Gram matrix in float64, so that the parameters are read twice and
    written once, whatever T is, and nothing is read back from a GPU. Deterministic for a given order. Differentiable in
    dense gradients.

    Sparse gradients, as those of ``nn.Embedding(sparse=True)``, need not be coalesced, and are never made dense: memory
    is proportional to what they hold. On a GPU they wait for it as ``Tensor.coalesce`` does. They have no derivatives.

    On several machines, in one of two ways, neither of which has derivatives; all ranks must make the call.

    - Data parallelism: every rank has gradients of its part of the batch, and gives the ``group``. The result, the same
      bits on every rank, is that of the gradients' means over the ranks: what one process makes of the whole batch
      where losses are means over it and parts are of one size, for each rank counts the same, as in
      DistributedDataParallel. Gradients are reduced and scattered, their shards projected, and the results gathered:
      (T + 1) / 2T of the traffic of T all-reduces, and T / ranks of a parameter's memory. Before, ranks compare what
      they were given, which waits for a GPU: where it differs, or where one of them fails here, all raise. A gradient
      may be None on some ranks. What a sparse gradient holds is gathered by every rank.
    - Sharded gradients, as FSDP2 makes them: DTensors, whose local parts stay where they are. Inner products are summed
      over the mesh dimensions that a parameter is sharded over; that T x T matrix and T coefficients are all that
      travels. Results are placed as the gradients. Plain tensors may stand beside DTensors, the same on every rank.

    Whichever order the ranks give or draw, that of the group's, or the mesh's, first rank is used. A rank that dies
    raises an error on the others when the process group's timeout is over, or before.

    Args:
        grads: a sequence over T tasks of sequences over parameters of tensors or None, which counts as zero; or one
            tensor [T, P]. float32, bfloat16, float16 or float64, one dtype a parameter; dense or sparse_coo; or
            DTensors, sharded or replicated.
        order: [T, T - 1] or [T, T] integers: row i the tasks that g_i is projected against, one after another; i itself
            is skipped unless ``include_self``. On a GPU its entries are not checked, as that would wait for it; one out
            of range makes the result NaN; under torch.compile a tensor's are not checked on a CPU either, where a task
            that stands in a row twice gives a result, too. None draws a random permutation a task.
        generator: draws the permutations; torch's default generator of the device without one.
        reduction: "sum", as in the paper, or "mean" over tasks.
        include_self: projects g_i' against g_i as well where its turn comes, as some implementations do.
        max_norm: each task's gradient is first clipped to this norm.
        normalize: each task's gradient is then scaled to the mean norm of the tasks.
        project: False leaves the projection out, so that clipping and scaling can be measured on their own.
        eps: added to ``|g_j|^2``.
        group: the process group of data-parallel ranks, such as ``torch.distributed.group.WORLD``.

    Returns:
        A list over parameters of tensors, None where every task has None; for a tensor [T, P], one tensor [P]. Dtypes
        and layouts are those of the gradients. A parameter that has sparse gradients alone gets a sparse result.
        Gradients that are not finite make the result not finite.

    Raises:
        TypeError: an argument is of the wrong kind, dtype or layout.
        ValueError: numbers of parameters, shapes, devices or values do not agree, on this rank or between ranks, or are
            out of range.
        RuntimeError: another rank of the group has failed; or :func:`mtlkernels.use_backend` asks for an implementation
            that does not serve the call, as none but the reference does where a derivative is wanted.
    """
    check_group(group)

    def prepared() -> tuple[Options, Gradients, Tensor | None]:
        """What this rank can do and check alone."""
        options = check_options(include_self, max_norm, normalize, project, eps, reduction)
        gradients = gradients_of(*flattened(grads), group)
        return options, gradients, draw_order(order, generator, gradients.num_tasks, gradients.device, project)

    options, gradients, drawn = fail_together(group, prepared)
    if group is not None:
        gradients = mean_over_ranks(group, gradients, **options._asdict())
    results, _ = projected(gradients, drawn, options)
    return results[0] if isinstance(grads, Tensor) else results


def draw_order(
    order: Any, generator: torch.Generator | None, num_tasks: int, device: torch.device, project: bool
) -> Tensor | None:
    """The order of projections on ``device``, drawn where it is not given."""
    check_generator(generator)
    if order is not None:
        if generator is not None:
            raise ValueError("generator must be None where order is given, got both")
        return moved(check_order(order, num_tasks, device).to(torch.int64), device)
    if not project:
        return None
    where = device if generator is None else generator.device
    keys = torch.rand(num_tasks, num_tasks, generator=generator, device=where, dtype=torch.float64)
    return moved(keys.argsort(dim=1), device)


def projected(gradients: Gradients, order: Tensor | None, options: Options) -> tuple[list[Tensor | None], Tensor]:
    """What PCGrad makes of gradients, and their Gram matrix."""

    def coefficients(gram: Tensor) -> Tensor:
        # The order is elsewhere only where this rank of a group has no gradient.
        return solve(gram, None if order is None else order.to(gram.device), options)[1]

    return weighted(gradients, coefficients)[:2]


def weighted(
    gradients: Gradients, coefficients: Callable[[Tensor], Tensor], unit: Tensor | None = None
) -> tuple[list[Tensor | None], Tensor, Tensor]:
    """The sum of gradients by coefficients [T] that are made of their Gram matrix [T, T], that matrix, and these.

    ``unit`` is what a scaler has multiplied the gradients by; the matrix is that of the unscaled ones.
    """
    gram = gradients.gram()
    if unit is not None:
        gram = gram / unit.to(gram).square()
    agreed = gradients.agreed(coefficients(gram))
    return gradients.combine(agreed), gram, agreed


def solve(gram: Tensor, order: Tensor | None, options: Options) -> tuple[Tensor, Tensor]:
    """The projected gradients' coefficients [T, T], and the result's [T]."""
    args = (*options[:-1], options.reduction == "mean")
    if traced_under_func("pcgrad") or needs_plain("pcgrad") or needs_reference("pcgrad", (gram,)):
        return reference.weights(gram, order, *args)
    run = _backends.implementation("pcgrad", "weights", _backends.forced(), gram)
    rows, coefficients = run(gram, order, *args)
    return rows, coefficients
