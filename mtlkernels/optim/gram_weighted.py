"""Any weighting of task gradients that their Gram matrix decides, around an optimizer."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from mtlkernels import _decisions
from mtlkernels._dtensors import has_dtensor
from mtlkernels.ops.pcgrad import weighted
from mtlkernels.ops.pcgrad.checks import check_group, check_reduction
from mtlkernels.ops.pcgrad.gradients import Gradients, fail_together, gradients_of, mean_over_ranks
from mtlkernels.optim._checks import (
    check_gram_every,
    check_losses,
    check_optimizers,
    check_shared,
    check_trained,
    check_weighting,
    check_weights,
    parameters_of,
)
from mtlkernels.optim._fsdp import refuse_unreduced
from mtlkernels.optim._hidden import refuse_hidden
from mtlkernels.optim._kept import Kept, Memory, kept_of
from mtlkernels.optim._scaling import nan_where, plain, scale_facts, scaled, scales_differ
from mtlkernels.optim._task_gradients import task_gradients, weighted_gradients
from mtlkernels.optim._written import Grads, accumulate

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def _wrapped(name: str) -> Any:
    """A method that calls the wrapped optimizer's: hooks are registered with that one, and receive it."""

    @functools.wraps(getattr(Optimizer, name))
    def method(self: GramWeighted, *args: Any, **kwargs: Any) -> RemovableHandle:
        handle: RemovableHandle = getattr(self.optimizer, name)(*args, **kwargs)
        return handle

    return method


class GramWeighted(Optimizer):
    """Weights tasks' gradients by a function of their Gram matrix, for whatever optimizer it wraps.

    :meth:`backward` takes the place of ``loss.backward()``. It makes one gradient a task of the shared parameters, asks
    ``weighting`` for weights w [T] from the matrix G [T, T] of their inner products, and writes ``sum_t w_t g_t`` into
    ``.grad`` in one pass over the parameters, without a Jacobian [T, P]. All else is the wrapped optimizer's, including
    public methods and attributes that it alone has, such as ``train`` of a schedule-free one. Weightings that need
    nothing but G plug in, those of TorchJD, say::

        from torchjd.aggregation import UPGradWeighting

        adam = torch.optim.Adam([*trunk.parameters(), *towers.parameters()])
        optimizer = mk.optim.GramWeighted(adam, UPGradWeighting(), shared=trunk.parameters())
        optimizer.zero_grad()
        optimizer.backward(losses)
        optimizer.step()

    and a function of your own, as ``lambda gram: gram.diagonal().rsqrt()``, by which all tasks' gradients get one norm.
    Tested with TorchJD 0.18's weightings of PCGrad (Yu et al., NeurIPS 2020; :class:`PCGrad` itself waits for
    nothing), UPGrad (Quinton and Rey, "Jacobian descent for multi-objective optimization", 2024), MGDA (Désidéri,
    Comptes Rendus Mathématique 2012), CAGrad (Liu et al., NeurIPS 2021), GradVac (Wang et al., ICLR 2021), DualProj
    (Lopez-Paz and Ranzato, NeurIPS 2017) and Aligned-MTL (Senushkin et al., CVPR 2023). A method that looks at single
    gradients' entries, as GradDrop does, is none of these.

    TorchJD's ``autogram`` makes such a matrix too, by hooks on the modules that have parameters. Levels of ``mk.nn``
    and of converted models see these hooks, and call all of their modules, so that its matrix is right; but they are
    not fused then, as they are here. It may miss a module of yours that has parameters of its own and returns a fused
    level's outputs, or those of another operator of this package, as they are: see :func:`mtlkernels.convert`.

    With a :class:`torch.amp.GradScaler` write ``optimizer.backward(losses, scaler=scaler)``,
    ``scaler.step(optimizer)``, ``scaler.update()``; ``weighting`` then sees the matrix of the unscaled gradients.
    Accumulation, sparse gradients, hooks, several machines (``group``, or FSDP2's DTensors): as :class:`PCGrad`.

    ``weighting`` is called once in a :meth:`backward`, under ``torch.no_grad``, with a copy of the matrix; it may keep
    state. On several machines every rank calls its own, with the same matrix, and the weights of the group's, or the
    mesh's, first rank are everybody's; ranks tell each other if one failed. :meth:`state_dict` is the wrapped
    optimizer's: save the state of a weighting, an ``nn.Module`` say, beside it. Copies and pickles of the wrapper take
    the weighting along. A wrapper with a ``group`` can be copied, but not pickled.

    Whether its numbers are finite is looked at, which on a GPU waits for the matrix and for the weights, as most
    weightings do anyway. A matrix that is not finite is not given to ``weighting``: the update becomes NaN, by which a
    scaler that is on skips the step. Weights that are not finite, though the matrix is, are an error.

    Args:
        optimizer: the optimizer to wrap; it stays reachable as ``.optimizer``.
        weighting: from the Gram matrix [T, T], in float64 on the device of the gradients, to weights [T], a tensor of
            real numbers, on any device. The matrix may be singular; a task whose loss reaches no shared parameter has
            zeros in it. An ``nn.Module`` will do. Stays reachable as ``.weighting``.
        shared: the parameters whose task gradients are weighted, such as ``model.trunk.parameters()``. The others, the
            tasks' own heads, get the sum or mean of their gradients. None: all parameters are shared.
        reduction: "mean" over tasks or "sum", of the parameters that are not shared; of the others ``weighting`` alone
            decides.
        batched: how the backward passes of several losses share their work; see :class:`PCGrad`.
        beside: other optimizers of the same model, such as SparseAdam for its embeddings beside Adam. Their parameters
            take part in :meth:`backward`; their ``step``, ``zero_grad`` and checkpoints stay the caller's.
        group: the process group of data-parallel ranks, all of which call :meth:`backward`.
        gram_every: with 1 every call of :meth:`backward` is exact. k > 1 trades exactness for time: only one call of k
            makes the tasks' gradients, their matrix and the weights. The next k - 1 calls, whether a ``step`` follows
            or not, go by these weights, which are those of an earlier batch: one backward pass makes the weighted sum
            of the shared parameters' gradients. The others' sum or mean stays exact, by a pass that goes no further
            down than they are: cheap for towers, as dear as the first one for an embedding. A call is exact again after
            :meth:`load_state_dict`, where the number of losses has changed, and where the last weights or their matrix
            were not finite, or that was all zeros, which on a GPU is waited for. Copies and pickles of the wrapper go
            on as the original would. Not possible with DTensors. What it does depends on how fast weights change: on
            2013's flights an update by old weights of Aligned-MTL is 8 degrees from the exact one, where the plain sum
            of gradients is 16 degrees from it; of PCGrad's 2 degrees, and the plain sum no more than that.

    Raises:
        TypeError: an argument is of the wrong kind; an aggregator of TorchJD, which takes a Jacobian, among them.
        ValueError: a value is out of range, or a tensor in ``shared`` is not a parameter of the optimizer.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        weighting: Callable[[Tensor], Tensor],
        *,
        shared: Iterable[Tensor] | None = None,
        reduction: str = "mean",
        batched: bool | None = None,
        beside: Sequence[Optimizer] = (),
        group: ProcessGroup | None = None,
        gram_every: int = 1,
    ) -> None:
        # Not Optimizer.__init__: groups, state and hooks are the wrapped optimizer's.
        self._optimizers = check_optimizers(optimizer, beside)
        if isinstance(optimizer, GramWeighted):
            raise TypeError(
                f"optimizer must be one that is not wrapped yet, got {type(optimizer).__name__}: pass its .optimizer"
            )
        check_weighting(weighting)
        check_group(group)
        check_reduction(reduction)
        if batched is not None and not isinstance(batched, bool):
            raise TypeError(f"batched must be True, False or None, got {type(batched).__name__}")
        self._gram_every = check_gram_every(gram_every)
        self._memory = Memory()
        self.optimizer = optimizer
        self.weighting = weighting
        self.group = group
        self._shared = None if shared is None else check_shared(shared, self._optimizers)
        self._alike: dict[str, Any] = {"reduction": reduction}  # on all ranks
        self._batched = batched

    def backward(
        self, losses: Sequence[Tensor] | Tensor, *, scaler: torch.amp.grad_scaler.GradScaler | None = None
    ) -> Tensor:
        """Adds to ``.grad`` the weighted sum of the losses' gradients.

        The last backward pass frees the graph that it runs through. What another loss alone has, such as a head, lives
        as long as that loss does; with ``batched`` all is freed.

        Args:
            losses: T scalars, one a task, or a vector of them.
            scaler: scales the losses, so that ``.grad`` is scaled as after ``scaler.scale(loss).backward()``. The Gram
                matrix is that of the unscaled gradients. All ranks of a group need the same scale; see
                :meth:`PCGrad.pc_backward`.

        Returns:
            The Gram matrix [T, T], in float64, of the tasks' gradients of the shared parameters.
            Tasks i and j conflict where its entry is negative. With ``gram_every`` the last one that was made.

        Raises:
            TypeError: an argument, what ``weighting`` returns, or a shared parameter's dtype is of the wrong kind.
            ValueError: a loss is not a scalar or does not require gradients, shared parameters' devices differ, ranks
                of the group have other settings or scales, or weights are not finite or not T. In this case, and where
                ``weighting`` raises, ``.grad`` stays as it is.
            RuntimeError: ``batched`` was asked for, and the backward pass cannot be batched; another rank of the group
                has failed in this call; FSDP has not reduced the gradients; checkpoints with ``use_reentrant=True``
                or ``FullyShardedDataParallel`` hide parameters from :func:`torch.autograd.grad`; or
                DistributedDataParallel with ``static_graph`` waits for its first ``loss.backward()``.
        """
        enabled = torch.is_grad_enabled()
        try:
            return self._backward(losses, scaler)
        except BaseException:
            torch.set_grad_enabled(enabled)  # which a signal's handler that raises in no_grad() itself leaves off
            raise

    def _backward(self, losses: Any, scaler: Any) -> Tensor:
        """:meth:`backward`, with all of the checks."""
        run = fail_together(self.group, lambda: self._differentiate(losses, scaler))
        parameters, gradients, totals, unit, kept = run
        with torch.no_grad():
            alike = {
                "gram_every": self._gram_every,
                "the number of calls since the last Gram matrix, of gram_every,": 0 if kept is None else kept.calls,
                "the number of parameters that are not shared": len(totals),
                **scale_facts(unit),
            }
            gradients = mean_over_ranks(self.group, gradients, **self._alike, **alike)
            differ = scales_differ(self.group, unit)
            if kept is None:
                unit = None if unit is None else nan_where(differ, unit)
                weights_of = functools.partial(self._weights, gradients)
                results, gram, weights = weighted(gradients, lambda gram: nan_where(differ, weights_of(gram)), unit)
                kept = kept_of(weights, gram) if self._gram_every > 1 else None
            else:
                results = gradients.combine(plain(differ, gradients.device) * kept.scale)
                gram, kept = kept.gram.clone(), kept._replace(calls=kept.calls + 1)
            if self.group is not None and totals:
                local = fail_together(self.group, lambda: gradients_of(totals, 1, self.group))
                mean = mean_over_ranks(self.group, local)
                totals = mean.combine(plain(differ, mean.device))
            accumulate(parameters, [*results, *totals])
        self._memory.kept = kept
        return gram

    def _weights(self, gradients: Gradients, gram: Tensor) -> Tensor:
        """The weights [T] of the gradients with this Gram matrix, in float64 beside it, in memory of their own."""

        def weights() -> Tensor:  # some ranks may see numbers that are not finite: those that follow wait for all ranks
            if not bool(gram.isfinite().all()):
                return torch.full_like(gram[0], torch.nan)
            return check_weights(self.weighting(gram.clone()), gram)

        return gradients.succeed_together(weights)

    def _differentiate(
        self, losses: Any, scaler: Any
    ) -> tuple[list[Tensor], Gradients, Grads, Tensor | None, Kept | None]:
        """What a rank does alone, with all of the checks.

        Returns:
            The parameters, shared ones first; the tasks' gradients of these, or their sum by weights that were kept,
            divided by their scale; the gradients of the others; what the losses were scaled by; what was kept, None
            where the call is exact.
        """
        checked = check_losses(losses)
        shared, others = self._trained()
        check_trained(shared, others)
        checked, unit = scaled(checked, scaler)
        fsdp = has_dtensor((*shared, *others))
        if fsdp and self.group is not None:
            raise ValueError("group must be None where parameters are DTensors, which know their ranks, got a group")
        if fsdp and self._batched:
            raise ValueError("batched must be False where parameters are DTensors, got True")
        if fsdp and self._gram_every > 1:
            raise ValueError(f"gram_every must be 1 where parameters are DTensors, got {self._gram_every}")
        how = "batched" if self._batched else "backward" if fsdp else "levels" if self._batched is None else "grad"
        if how == "backward":
            refuse_unreduced([*shared, *others])
        else:
            refuse_hidden(checked)
        mean = self._alike["reduction"] == "mean"
        count, kept = len(checked), self._memory.kept
        if kept is None or kept.calls == self._gram_every or len(kept.weights) != count:
            kept = None
            grads, totals, done = task_gradients(checked, shared, others, mean=mean, how=how)
            reason = f"batched is {self._batched}" + ("" if done == how else ", and losses share no level")
            _decisions.note(type(self).__name__, f"backward passes by {done!r}", reason)
        else:
            levels, count = self._batched is None, 1
            weights = [weight / kept.scale for weight in kept.weights]
            grads, totals = weighted_gradients(checked, weights, shared, others, mean=mean, levels=levels)
        parameters = [*shared, *others]
        return parameters, gradients_of(grads, count, self.group, beside=parameters), totals, unit, kept

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
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's parameter groups."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self.optimizer.param_groups = value

    @property
    def state(self) -> Any:
        """The wrapped optimizer's state."""
        return self.optimizer.state

    @state.setter
    def state(self, value: Any) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self.optimizer.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The wrapped optimizer's defaults."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.optimizer.defaults = value

    def step(self, closure: Callable[[], Any] | None = None, **options: Any) -> Any:
        """The wrapped optimizer's step, by its own options; a closure calls :meth:`zero_grad` and :meth:`backward`."""
        return self.optimizer.step(**options) if closure is None else self.optimizer.step(closure, **options)

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Clears the gradients of all parameters; None: as the wrapped optimizer does it by itself."""
        if set_to_none is None:
            self.optimizer.zero_grad()
        else:
            self.optimizer.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's, so that checkpoints with and without the wrapper are the same."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what :meth:`state_dict`, or that of the wrapped optimizer, has returned."""
        self.optimizer.load_state_dict(state_dict)
        self._memory.kept = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group: shared where all parameters are, or where ``shared`` held its parameters while frozen."""
        self.optimizer.add_param_group(param_group)

    register_step_pre_hook = _wrapped("register_step_pre_hook")
    register_step_post_hook = _wrapped("register_step_post_hook")
    register_state_dict_pre_hook = _wrapped("register_state_dict_pre_hook")
    register_state_dict_post_hook = _wrapped("register_state_dict_post_hook")
    register_load_state_dict_pre_hook = _wrapped("register_load_state_dict_pre_hook")
    register_load_state_dict_post_hook = _wrapped("register_load_state_dict_post_hook")

    def __getattr__(self, name: str) -> Any:
        """What the wrapped optimizer alone has; not its private names, some of which tell PyTorch how to call it."""
        missing = f"{type(self).__name__} has no attribute {name!r}"
        wrapped = self.__dict__.get("optimizer")  # which a copy that is being made has not yet
        if wrapped is None or name.startswith("_"):
            raise AttributeError(missing)
        try:
            return getattr(wrapped, name)
        except AttributeError as error:
            raise AttributeError(f"{missing}, and neither has the {type(wrapped).__name__} that it wraps") from error

    def _state(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        state.pop("step", None)  # a scheduler's, which counts steps in a function that cannot be pickled
        return state

    def __getstate__(self) -> dict[str, Any]:
        if self.group is not None:
            raise TypeError(
                f"group must be None where a wrapper is pickled, got a {type(self.group).__name__}, which other"
                " processes do not have: save its state_dict(), or set .group to None and give the loaded one its own"
            )
        return self._state()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __copy__(self) -> GramWeighted:
        copied = type(self).__new__(type(self))
        state = self._state()
        if "_memory" in state:  # not in a proxy's that has copied nothing
            state["_memory"] = copy.copy(state["_memory"])
        copied.__setstate__(state)
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> GramWeighted:
        memo[id(self.group)] = self.group  # processes cannot be copied
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__setstate__(copy.deepcopy(self._state(), memo))
        return copied

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.optimizer!r})"
