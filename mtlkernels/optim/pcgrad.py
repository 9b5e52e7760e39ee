"""PCGrad around an optimizer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from mtlkernels.ops.pcgrad import draw_order, options_of, solve
from mtlkernels.ops.pcgrad.checks import check_group, check_options, check_reduction
from mtlkernels.ops.pcgrad.parameters import Gradients, collect, dtensor_class, over, together
from mtlkernels.optim._checks import check_losses, check_optimizers, check_shared, check_trained, parameters_of
from mtlkernels.optim._task_gradients import Row, task_gradients

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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
        batched: one batched backward pass for all losses instead of one pass a loss. Often faster for small models; it
            takes T times the memory of a pass, and operators that can be batched: dense gradients, no compiled model.
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
        batched: bool = False,
        beside: Sequence[Optimizer] = (),
        group: ProcessGroup | None = None,
    ) -> None:
        # Not Optimizer.__init__: groups, state and hooks are the wrapped optimizer's.
        self._optimizers = check_optimizers(optimizer, beside)
        if isinstance(optimizer, PCGrad):
            raise TypeError("optimizer must be one that is not wrapped yet, got PCGrad")
        check_reduction(reduction)
        check_group(group)
        check_options(include_self, max_norm, normalize, project, eps)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")
        if not isinstance(batched, bool):
            raise TypeError(f"batched must be True or False, got {type(batched).__name__}")
        self.optimizer = optimizer
        self.generator = generator
        self.group = group
        self._reduction = reduction
        self._shared = None if shared is None else check_shared(shared, self._optimizers)
        self._options = (include_self, max_norm, normalize, project, eps)
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
        parameters, found, totals, unit = together(self.group, self._differentiate, losses, scaler)
        with torch.no_grad():
            results, gram = self._project(found, len(totals), unit)
            if self.group is not None and totals:
                mean = over(self.group, together(self.group, collect, [totals], self.group), {})
                totals = mean.combine(torch.ones(1, dtype=torch.float64, device=mean.device))
            _accumulate(parameters, [*results, *totals])
        return gram

    def _differentiate(self, losses: Any, scaler: Any) -> tuple[list[Tensor], Gradients, Row, Tensor | None]:
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
        dtensor = dtensor_class()
        fsdp = dtensor is not None and any(isinstance(parameter, dtensor) for parameter in (*shared, *others))
        if fsdp and self.group is not None:
            raise ValueError("group must be None where parameters are DTensors, which know their ranks, got a group")
        if fsdp and self._batched:
            raise ValueError("batched must be False where parameters are DTensors, got True")
        how = "batched" if self._batched else "backward" if fsdp else "grad"
        rows, totals = task_gradients(checked, shared, others, mean=self._reduction == "mean", how=how)
        return [*shared, *others], collect(rows, self.group), totals, unit

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

    def _project(self, found: Gradients, num_others: int, unit: Tensor | None) -> tuple[Row, Tensor]:
        """The projected gradients of the shared parameters, and the Gram matrix of their gradients over ``unit``."""
        options = options_of(self._reduction, self._options)
        options["the number of parameters that are not shared"] = num_others
        found = over(self.group, found, options)
        gram = found.gram()
        if unit is not None:
            gram = gram / unit.to(gram).square()
        order = draw_order(None, self.generator, found.num_tasks, gram.device, project=self._options[3])
        _, coefficients = solve(gram, order, *self._options, self._reduction == "mean")
        return found.combine(found.agreed(coefficients)), gram

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

    def register_step_pre_hook(self, hook: Any) -> RemovableHandle:
        """Hooks, of every kind, are registered with the wrapped optimizer, and receive it."""
        return self.optimizer.register_step_pre_hook(hook)

    def register_step_post_hook(self, hook: Any) -> RemovableHandle:
        """See :meth:`register_step_pre_hook`."""
        return self.optimizer.register_step_post_hook(hook)

    def register_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> RemovableHandle:
        """See :meth:`register_step_pre_hook`."""
        return self.optimizer.register_state_dict_pre_hook(hook, prepend=prepend)

    def register_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> RemovableHandle:
        """See :meth:`register_step_pre_hook`."""
        return self.optimizer.register_state_dict_post_hook(hook, prepend=prepend)

    def register_load_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> RemovableHandle:
        """See :meth:`register_step_pre_hook`."""
        return self.optimizer.register_load_state_dict_pre_hook(hook, prepend=prepend)

    def register_load_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> RemovableHandle:
        """See :meth:`register_step_pre_hook`."""
        return self.optimizer.register_load_state_dict_post_hook(hook, prepend=prepend)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        state.pop("step", None)  # a scheduler's, which counts steps in a function that cannot be pickled
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __deepcopy__(self, memo: dict[int, Any]) -> PCGrad:
        memo[id(self.group)] = self.group  # which is not this object's own
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.optimizer!r})"


def _accumulate(parameters: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
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
