"""PCGrad around an optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim import Optimizer

from mtlkernels.ops.pcgrad import draw_order, solve
from mtlkernels.ops.pcgrad.checks import Options, check_generator, check_options
from mtlkernels.ops.pcgrad.gradients import Gradients
from mtlkernels.optim.gram_weighted import GramWeighted

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Projections:
    """PCGrad's weighting: from a Gram matrix [T, T], the weights [T] of the projected gradients' sum or mean.

    Args:
        options: as for :func:`mtlkernels.pcgrad`.
        generator: draws the order of projections; torch's default generator of the device without one.
    """

    def __init__(self, options: Options, generator: torch.Generator | None) -> None:
        self.options, self.generator = options, generator

    def __call__(self, gram: Tensor) -> Tensor:
        order = draw_order(None, self.generator, len(gram), gram.device, self.options.project)
        return solve(gram, order, self.options)[1]


class PCGrad(GramWeighted):
    """Gradient surgery (PCGrad; Yu et al., NeurIPS 2020) for whatever optimizer it wraps.

    :meth:`pc_backward` takes the place of ``loss.backward()``: it projects the tasks' gradients of the shared
    parameters as :func:`mtlkernels.pcgrad` does, and fills ``.grad``. All else is the wrapped optimizer's, including
    public methods and attributes that it alone has, such as ``train`` of a schedule-free one::

        model = mk.nn.PLE(64, num_tasks=2, num_specific=2, num_shared=2)
        towers = torch.nn.ModuleList(torch.nn.Linear(128, 1) for _ in range(2))
        adam = torch.optim.Adam([*model.parameters(), *towers.parameters()], lr=1e-3)
        optimizer = mk.optim.PCGrad(adam, shared=model.parameters())
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)  # or StepLR(optimizer.optimizer, 10)
        for x, targets in batches:
            optimizer.zero_grad()
            outputs = [tower(h) for tower, h in zip(towers, model(x))]
            losses = [torch.nn.functional.mse_loss(y, target) for y, target in zip(outputs, targets)]
            optimizer.pc_backward(losses)
            optimizer.step()

    With a :class:`torch.amp.GradScaler` write ``optimizer.pc_backward(losses, scaler=scaler)``,
    ``scaler.step(optimizer)``, ``scaler.update()``. Losses that are scaled already do as well, but ``max_norm`` and
    ``eps`` then see scaled gradients. ``scaler.unscale_`` wants the object that ``scaler.step`` gets: the wrapper for
    both, or the wrapped optimizer for both.

    A model that Inductor compiles needs two settings by then: functorch's ``donated_buffer = False``, and
    ``torch.compile(model, options={"fx_graph_cache": False})``, or ``TORCHINDUCTOR_FX_GRAPH_CACHE=0`` in the
    environment; the site's page on PCGrad has both as code. Code that was made for an ordinary backward pass, in this
    process or, by Inductor's cache on disk, an earlier one, may write over its buffers, which are donated to it, and
    cannot be walked again for the next loss. PyTorch then raises an error, which names the first setting in full. With
    that alone the cache may still hand out such code, without the error: gradients of all losses but the first are then
    wrong.

    ``.grad`` is added to, as in ``backward``, where usual implementations overwrite it: several calls before ``step``
    accumulate gradients, and so does a loop that never calls ``zero_grad``. A parameter that no loss reaches keeps
    ``grad=None``. Sparse gradients, as those of ``nn.Embedding(sparse=True)``, stay sparse.
    Gradients come from ``torch.autograd.grad``: hooks of parameters that run after accumulation, those of
    DistributedDataParallel included, do not run.

    On several machines there are two ways; see :func:`mtlkernels.pcgrad`.

    - Data parallelism: give the ``group``, as in ``group=torch.distributed.group.WORLD``. The ranks' gradients are
      averaged, those of the parameters that are not shared included. Parameters must start equal on all ranks.
      DistributedDataParallel may be left around the model to see to that; its reducer does not run. With
      ``static_graph`` the first backward pass after that must be a ``loss.backward()``, or :meth:`pc_backward` is an
      error. Its ``join()`` does not help where ranks call :meth:`pc_backward` unequally often.
    - FSDP2: wrap an optimizer of the parameters that ``fully_shard`` leaves, and give no ``group``. FSDP reduces
      gradients in ``loss.backward()`` alone, so that this is what runs, once a loss: hooks of parameters run too, and
      leaves that are not the optimizer's accumulate gradients. Parameters that are plain tensors are nobody's to
      reduce. ``batched``, and ``set_requires_gradient_sync(False)``, are not possible. Tensor-parallel parameters are
      trained in the same way; where DistributedDataParallel has turned them into plain tensors, their ranks need
      generators with one seed.

    Args:
        optimizer: the optimizer to wrap; it stays reachable as ``.optimizer``.
        shared: the parameters whose task gradients are projected, such as ``model.trunk.parameters()``. The others, the
            tasks' own heads, get the mean or sum over tasks of their gradients. None: all parameters are shared.
        reduction: "mean" over tasks or "sum", of shared and other parameters alike: by "mean" a head that one loss
            alone reaches gets 1/T of its gradient, where usual implementations sum what not every loss reaches.
        generator: draws the order of projections; torch's default generator of the device without one.
        include_self, max_norm, normalize, project, eps: as for :func:`mtlkernels.pcgrad`.
        batched: None: a backward pass a loss, in which the levels of :mod:`mtlkernels.nn` and of converted models run
            once for all losses, so that what does not depend on the loss is computed once. False: passes that have
            nothing in common; so it is too where a level's inputs also reach the losses past the level, in compiled
            models, with FSDP, and on CPUs for small levels or few rows, where that is faster. True: one batched pass
            for the whole model. Often faster for small models; it takes T times the memory of a pass, and operators
            that can be batched: dense gradients, no compiled model. Where one loss's gradients are not finite the
            others' may become NaN, as that pass adds them to these, times 0.
        beside: other optimizers of the same model, such as SparseAdam for its embeddings beside Adam. Their parameters
            take part in :meth:`pc_backward`; their ``step``, ``zero_grad`` and checkpoints stay the caller's.
        group: the process group of data-parallel ranks, all of which call :meth:`pc_backward`.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: a value is out of range, or a tensor in ``shared`` is not a parameter of the optimizer.
    """

    weighting: Projections

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        shared: Iterable[Tensor] | None = None,
        reduction: str = "mean",
        generator: torch.Generator | None = None,
        include_self: bool = False,
        max_norm: float | None = None,
        normalize: bool = False,
        project: bool = True,
        eps: float = 0.0,
        batched: bool | None = None,
        beside: Sequence[Optimizer] = (),
        group: ProcessGroup | None = None,
    ) -> None:
        options = check_options(include_self, max_norm, normalize, project, eps, reduction)
        check_generator(generator)
        super().__init__(
            optimizer,
            Projections(options, generator),
            shared=shared,
            reduction=reduction,
            batched=batched,
            beside=beside,
            group=group,
        )
        self._alike = options._asdict()

    @property
    def generator(self) -> torch.Generator | None:
        """What draws the order of projections."""
        return self.weighting.generator

    @generator.setter
    def generator(self, generator: torch.Generator | None) -> None:
        check_generator(generator)
        self.weighting.generator = generator

    def pc_backward(
        self, losses: Sequence[Tensor] | Tensor, *, scaler: torch.amp.grad_scaler.GradScaler | None = None
    ) -> Tensor:
        """Adds to ``.grad`` what PCGrad makes of the losses' gradients.

        The last backward pass frees the graph that it runs through. What another loss alone has, such as a head, lives
        as long as that loss does; with ``batched`` all is freed.

        Args:
            losses: T scalars, one a task, or a vector of them.
            scaler: scales the losses, so that ``.grad`` is scaled as after ``scaler.scale(loss).backward()``.
                ``max_norm``, ``eps`` and the result are those of the unscaled gradients. All ranks of a group need the
                same scale: another one is an error on a CPU, and on a GPU, where nothing waits for it, makes the matrix
                and the gradients of all ranks NaN.

        Returns:
            The Gram matrix [T, T], in float64, of the tasks' gradients of the shared parameters before the projection.
            Tasks i and j conflict where its entry is negative. Nothing has waited for it on a GPU.

        Raises:
            TypeError: an argument, or a shared parameter's dtype, is of the wrong kind.
            ValueError: a loss is not a scalar or does not require gradients, shared parameters' devices differ, or
                ranks of the group have other settings or scales.
            RuntimeError: ``batched`` was asked for, and the backward pass cannot be batched; another rank of the group
                has failed in this call; FSDP has not reduced the gradients; checkpoints with ``use_reentrant=True``
                or ``FullyShardedDataParallel`` hide parameters from :func:`torch.autograd.grad`; or
                DistributedDataParallel with ``static_graph`` waits for its first ``loss.backward()``.
        """
        return self.backward(losses, scaler=scaler)

    def _weights(self, gradients: Gradients, gram: Tensor) -> Tensor:
        """Those of projections, which cannot fail and wait for nothing; of what is not finite they make NaN."""
        return self.weighting(gram)
