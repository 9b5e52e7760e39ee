"""Calls of a level that serves on a CPU: what was read of its modules is kept from one call to the next.

Reading a dozen experts' parameters and laying out tables for the kernels takes longer than a small level. It is done
once, and each call compares what the modules hold then with what they held, see ``csrc/snapshot.cpp``: the same modules
and settings, the same tensors where they were, with the same shapes and strides. So a parameter that was replaced or
moved is never met by what was read before; what was written to one is seen, as values are read where they are.

Nothing is kept of the first call in a row, which may be the only one; and where modules keep changing, as under
``torch.func.functional_call``, less and less often.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtlkernels import _backends, _decisions, _dumps, _extension, _torch
from mtlkernels.ops._call import direct_to_cpp
from mtlkernels.ops.level.call import spec_of
from mtlkernels.ops.level.direct import named, note_direct, parts_of_norms
from mtlkernels.routing import Routing

_MOST_CALLS_TO_WAIT = 1024


class Patience:
    """How many calls go by before one is kept: the fewer, the longer the last one that was had ``served``."""

    def __init__(self) -> None:
        self._wait = 1
        self.waited = self.served = 0

    def is_over(self) -> bool:
        """Whether enough have gone by."""
        return self.waited > self._wait

    def tried(self, is_kept: bool) -> None:
        """One was to be kept."""
        self.waited = 0
        if not is_kept:
            self._longer()

    def changed(self) -> None:
        """What was kept is none any more."""
        if self.served > 8 * self._wait:
            self._wait = 1
        else:
            self._longer()
        self.served = self.waited = 0

    def _longer(self) -> None:
        self._wait = min(2 * self._wait, _MOST_CALLS_TO_WAIT)


class KeptCalls:
    """Those of one level of a model."""

    def __init__(self) -> None:
        self._kept: Any = None  # and what it looks at, which has to live as long
        self._trunk: Any = None
        self.single = True  # for whoever makes the calls: that what is kept has one input
        self._patience = Patience()

    def __reduce__(self) -> Any:
        """A copy of a level keeps nothing of it."""
        return KeptCalls, ()

    @property
    def empty(self) -> bool:
        """Whether nothing is kept."""
        return self._kept is None and self._trunk is None

    @staticmethod
    def may_serve(x: Any) -> bool:
        """Whether a call with this tensor may be one of them: nothing looks on, no gradient is wanted."""
        return not torch.is_grad_enabled() and direct_to_cpp(x)

    def still(self, roots: Any) -> bool:
        """Whether a call is like that which is kept, whose ``roots`` were the same.

        These hold, in lists and tuples, all that the call depends on beside its inputs.
        """
        kept = self._kept
        if kept is None:
            self._patience.waited += 1
            return False
        found: bool = kept[0].still(roots)
        if not found:
            self._changed()
        return found

    def serve(self, roots: Any, inputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...] | None:
        """The outputs for inputs as ``expert_mixture`` takes them; None: that call goes the usual way."""
        kept = self._kept
        if kept is None:
            self._patience.waited += 1
            return None
        return self._outputs(kept[0].serve(roots, inputs), inputs)

    def serve_trunk(self, level: nn.Module, inputs: Any, uncalled: bool = False) -> tuple[Tensor, ...] | None:
        """The outputs of a trunk's level, all in C++; None: that call goes another way.

        ``uncalled``: the level was not called as a module is, so that one with hooks goes another way.
        """
        trunk = self._trunk
        return None if trunk is None else self._outputs(trunk.serve(level, inputs, uncalled), inputs)

    def _outputs(self, found: Any, inputs: Any) -> tuple[Tensor, ...] | None:
        if type(found) is tuple:
            self._patience.served += 1
            if _decisions.on:
                note_direct(inputs)
            return found
        if found is False:
            self._changed()
        return None

    def _changed(self) -> None:
        """What is kept is gone."""
        self._patience.changed()
        self._kept = self._trunk = None

    def keep_trunk(
        self,
        level: nn.Module,
        expert: type,
        activation: str,
        inputs: Any,
        weights: Any,
        biases: Any,
        routing: Routing,
        gates: Any,
    ) -> None:
        """Keeps a call of a trunk's level without norms and dropout, whose experts are of one class."""
        spec = _spec_ints(activation, len(weights), inputs, routing)
        if spec is not None:
            surroundings = vars(_backends), vars(_dumps), _torch.GLOBAL_HOOKS
            of_modules = level, *surroundings, expert, nn.Linear, nn.Parameter, nn.Dropout
            self._trunk = _extension.function("keep_trunk")(*of_modules, weights, biases, gates, spec)
        self._patience.tried(self._trunk is not None)

    def wants(self) -> bool:
        """Whether a call that goes the usual way is to be kept."""
        return self._patience.is_over() and self.empty

    def keep(
        self,
        roots: Any,
        inputs: Tensor | Sequence[Tensor],
        weights: Any,
        biases: Any,
        routing: Routing,
        gates: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> None:
        """Keeps a call of ``expert_mixture``, if it is one of those that can be.

        ``gates`` are the arguments of linear gates, ``options`` all others.
        """
        self._kept = _kept(roots, inputs, weights, biases, routing, gates, options)
        self._patience.tried(self._kept is not None)


def _kept(
    roots: Any, inputs: Any, weights: Any, biases: Any, routing: Routing, gates: Mapping[str, Any], options: Any
) -> Any:
    """Nothing but a level without slopes, whose norms take running statistics and whose gates are linear layers."""
    spec = _spec_ints(options["activation"], len(weights), inputs, routing)
    first = inputs[0] if isinstance(inputs, (list, tuple)) else inputs
    norms, gate_norms = parts_of_norms(options.get("norms"), gates.get("gate_norms"), routing, first.dtype)
    if spec is None or options.get("dropout") or norms is NotImplemented or gate_norms is NotImplemented:
        return None
    of_gates = gates["gate_weights"], gates.get("gate_biases")
    return _extension.function("keep_call")(roots, nn.Module, weights, biases, *of_gates, norms, gate_norms, spec)


def _spec_ints(activation: Any, layers: int, inputs: Any, routing: Routing) -> Any:
    found = named(activation, layers)
    if not _extension.has_module() or found is None or found[1] or routing.wiring.idle:
        return None
    count = len(inputs) if isinstance(inputs, (list, tuple)) else 1
    return spec_of(routing.wiring, count, found[0], True).encoded[0]
