"""PCGrad around an optimizer."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from mtlkernels.ops.pcgrad import draw_order, projected
from mtlkernels.ops.pcgrad.checks import check_generator, check_group, check_options
from mtlkernels.ops.pcgrad.gradients import Gradients, fail_together, gradients_of, has_dtensor, mean_over_ranks
from mtlkernels.optim._checks import check_losses, check_optimizers, check_shared, check_trained, parameters_of
from mtlkernels.optim._task_gradients import Grads, task_gradients

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def _wrapped(name: str) -> Any:
    """A method that calls the wrapped optimizer's: hooks are registered with that one, and receive it."""

    @functools.wraps(getattr(Optimizer, name))
    def method(self: PCGrad, *args: Any, **kwargs: Any) -> RemovableHandle:
        handle: RemovableHandle = getattr(self.optimizer, name)(*args, **kwargs)
        return handle

    return method


class PCGrad(Optimizer):
    """Gradient surgery (PCGrad; Yu et al., NeurIPS 2020) for whatever optimizer it wraps.

    :meth:`pc_backward` takes the place of ``loss.backward()``: it projects the tasks' gradients of the shared
    parameters as :func:`mtlkernels.pcgrad` does, and fills ``.grad``. All else is the wrapped optimizer's::

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

    ``.grad`` is added to, as in ``backward``: several calls before ``step`` accumulate gradients. A parameter that no
    loss reaches keeps ``grad=None``. Sparse gradients, as those of ``nn.Embedding(sparse=True)``, stay sparse.
    Gradients come from ``torch.autograd.grad``: hooks of parameters that run after accumulation, those of
    DistributedDataParallel included, do not run.

    On several machines there are two ways; see :func:`mtlkernels.pcgrad`.

    - Data parallelism: give the ``group``, as in ``group=torch.distributed.group.WORLD``. The ranks' gradients are
      averaged, those of the parameters that are not shared included. Parameters must start equal on all ranks.
      DistributedDataParallel may be left around the model to see to that; its reducer does not run, and with
      ``static_graph`` it does not work.
    - FSDP2: wrap an optimizer of the parameters that ``fully_shard`` leaves, and give no ``group``. FSDP reduces
      gradients in ``loss.backward()`` alone, so that this is what runs, once a loss: hooks of parameters run too, and
      leaves that are not the optimizer's accumulate gradients. Parameters that are plain tensors are nobody's to
      reduce. ``batched``, and ``set_requires_gradient_sync(False)``, are not possible.

    Args:
        optimizer: the optimizer to wrap; it stays reachable as ``.optimizer``.
        shared: the parameters whose task gradients are projected, such as ``model.trunk.parameters()``. The others, the
            tasks' own heads, get the sum or mean of their gradients. None: all parameters are shared.
        reduction: "mean" over tasks or "sum", of shared and other parameters alike.
        generator: draws the order of projections; torch's default generator of the device without one.
        include_self, max_norm, normalize, project, eps: as for :func:`mtlkernels.pcgrad`.
        batched: None: a backward pass a loss, in which the levels of :mod:`mtlkernels.nn` and of converted models run
            once for all losses, so that what does not depend on the loss is computed once. False: passes that have
            nothing in common; so it is too where a level's inputs also reach the losses past the level, in compiled
            models, and with FSDP. True: one batched pass for the whole model. Often faster for small models; it takes T
            times the memory of a pass, and operators that can be batched: dense gradients, no compiled model.
        beside: other optimizers of the same model, such as SparseAdam for its embeddings beside Adam. Their parameters
            take part in :meth:`pc_backward`; their ``step``, ``zero_grad`` and checkpoints stay the caller's.
        group: the process group of data-parallel ranks, all of which call :meth:`pc_backward`.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: a value is out of range, or a tensor in ``shared`` is not a parameter of the optimizer.
    """

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
        # Not Optimizer.__init__: groups, state and hooks are the wrapped optimizer's.
        self._optimizers = check_optimizers(optimizer, beside)
        if isinstance(optimizer, PCGrad):
            raise TypeError("optimizer must be one that is not wrapped yet, got PCGrad")
        check_group(group)
        check_generator(generator)
        if batched is not None and not isinstance(batched, bool):
            raise TypeError(f"batched must be True, False or None, got {type(batched).__name__}")
        self.optimizer = optimizer
        self.generator = generator
        self.group = group
        self._shared = None if shared is None else check_shared(shared, self._optimizers)
        self._options = check_options(include_self, max_norm, normalize, project, eps, reduction)
        self._batched = batched

    def pc_backward(
        self, losses: Sequence[Tensor] | Tensor, *, scaler: torch.amp.grad_scaler.GradScaler | None = None
    ) -> Tensor:
        """Adds to ``.grad`` what PCGrad makes of the losses' gradients.

        The last backward pass frees the graph that it runs through. What another loss alone has, such as a head, lives
        as long as that loss does; with ``batched`` all is freed.

        Args:
            losses: T scalars, one a task, or a vector of them.
            scaler: scales the losses, so that ``.grad`` is scaled as after ``scaler.scale(loss).backward()``.
                ``max_norm``, ``eps`` and the result are those of the unscaled gradients.

        Returns:
            The Gram matrix [T, T], in float64, of the tasks' gradients of the shared parameters before the projection.
            Tasks i and j conflict where its entry is negative. Nothing has waited for it on a GPU.

        Raises:
            TypeError: an argument, or a shared parameter's dtype, is of the wrong kind.
            ValueError: a loss is not a scalar or does not require gradients, or shared parameters' devices differ.
            RuntimeError: ``batched`` was asked for, and the backward pass cannot be batched; another rank of the group
                has failed in this call; or FSDP has not reduced the gradients.
        """
        parameters, gradients, totals, unit = fail_together(self.group, lambda: self._differentiate(losses, scaler))
        with torch.no_grad():
            others = {"the number of parameters that are not shared": len(totals)}
            gradients = mean_over_ranks(self.group, gradients, self._options, **others)
            project = self._options.project
            order = draw_order(None, self.generator, gradients.num_tasks, gradients.device, project)
            results, gram = projected(gradients, order, self._options, unit)
            if self.group is not None and totals:
                local = fail_together(self.group, lambda: gradients_of(totals, 1, self.group))
                mean = mean_over_ranks(self.group, local)
                totals = mean.combine(torch.ones(1, dtype=torch.float64, device=mean.device))
            _accumulate(parameters, [*results, *totals])
        return gram

    def _differentiate(self, losses: Any, scaler: Any) -> tuple[list[Tensor], Gradients, Grads, Tensor | None]:
        """What a rank does alone, with all of the checks.

        Returns:
            The parameters, shared ones first; the tasks' gradients of these; the gradients of the others; what
            the losses were scaled by.
        """
        checked = check_losses(losses)
        if scaler is not None and not isinstance(scaler, torch.amp.grad_scaler.GradScaler):
            raise TypeError(f"scaler must be a torch.amp.GradScaler or None, got {type(scaler).__name__}")
        shared, others = self._trained()
        check_trained(shared, others)
        unit = None
        if scaler is not None:
            with torch.enable_grad():
                checked = [scaler.scale(loss) for loss in checked]
            unit = scaler.scale(torch.ones((), device=checked[0].device))
        fsdp = has_dtensor((*shared, *others))
        if fsdp and self.group is not None:
            raise ValueError("group must be None where parameters are DTensors, which know their ranks, got a group")
        if fsdp and self._batched:
            raise ValueError("batched must be False where parameters are DTensors, got True")
        how = "batched" if self._batched else "backward" if fsdp else "levels" if self._batched is None else "grad"
        mean = self._options.reduction == "mean"
        grads, totals = task_gradients(checked, shared, others, mean=mean, how=how)
        return [*shared, *others], gradients_of(grads, len(checked), self.group), totals, unit

    def _trained(self) -> tuple[list[Tensor], list[Tensor]]:
        """The parameters that require gradients: the shared ones, and the others."""
        trained = [parameter for parameter in parameters_of(self._optimizers) if parameter.requires_grad]
        if self._shared is None:
            return trained, []
        shared = {id(parameter) for parameter in self._shared}
        return (
            [parameter for parameter in trained if id(parameter) in shared],
            [parameter for parameter in trained if id(parameter) not in shared],
        )

    # What follows is the wrapped optimizer's.

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The wrapped optimizer's parameter groups."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The wrapped optimizer's state."""
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The wrapped optimizer's defaults."""
        return self.optimizer.defaults

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """A step of the wrapped optimizer; a closure calls :meth:`zero_grad` and :meth:`pc_backward`."""
        return self.optimizer.step() if closure is None else self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients of all parameters."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's, so that checkpoints with and without the wrapper are the same."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what :meth:`state_dict`, or that of the wrapped optimizer, has returned."""
        self.optimizer.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group: shared where all parameters are, or where ``shared`` held its parameters while frozen."""
        self.optimizer.add_param_group(param_group)

    register_step_pre_hook = _wrapped("register_step_pre_hook")
    register_step_post_hook = _wrapped("register_step_post_hook")
    register_state_dict_pre_hook = _wrapped("register_state_dict_pre_hook")
    register_state_dict_post_hook = _wrapped("register_state_dict_post_hook")
    register_load_state_dict_pre_hook = _wrapped("register_load_state_dict_pre_hook")
    register_load_state_dict_post_hook = _wrapped("register_load_state_dict_post_hook")

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        state.pop("step", None)  # a scheduler's, which counts steps in a function that cannot be pickled
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __deepcopy__(self, memo: dict[int, Any]) -> PCGrad:
        memo[id(self.group)] = self.group  # processes cannot be copied
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.optimizer!r})"


def _accumulate(parameters: Sequence[Tensor], grads: Grads) -> None:
    """Adds to ``.grad``; gradients that are the first become ``.grad`` as they are."""
    totals: dict[type, list[Tensor]] = {}
    addends: dict[type, list[Tensor]] = {}
    for parameter, grad in zip(parameters, grads, strict=True):
        if grad is None:
            continue
        if parameter.grad is None:
            parameter.grad = grad
        elif parameter.grad.is_sparse and not grad.is_sparse:
            parameter.grad = grad.add_(parameter.grad)
        elif parameter.grad.is_sparse or grad.is_sparse:
            parameter.grad.add_(grad)
        else:
            kind = type(grad)  # one call takes DTensors alone or none
            totals.setdefault(kind, []).append(parameter.grad)
            addends.setdefault(kind, []).append(grad)
    for kind, total in totals.items():
        torch._foreach_add_(total, addends[kind])
