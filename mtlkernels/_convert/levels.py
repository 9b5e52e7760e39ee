"""Where a class keeps what a level is made of, and what a call reads there."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence, Sized
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mtlkernels import _decisions, _torch
from mtlkernels._backends import autocast_enabled
from mtlkernels._convert.calls import Readings
from mtlkernels._convert.chains import Chain
from mtlkernels._convert.classes import CLASSES, LENGTHS, OWN_UNDER_AUTOCAST, is_torchs, original_class
from mtlkernels._convert.evaluation import Parts, any_drops, any_of_inference, held_by, read_experts, several_dtypes
from mtlkernels._convert.gates import has_equal_shares, has_softmax, read_gate, size_of
from mtlkernels._convert.paying import Size, pays, size_of_call
from mtlkernels.ops._fusing import has_gradient_hooks, has_hooks
from mtlkernels.routing import Routing

_LISTS, _DEEPEST = (nn.ModuleList, nn.ModuleDict), 4
TOO_FEW_ROWS = "its experts cannot be fused now, or that is no faster on so few rows"


def children(*modules: Any) -> list[Any]:
    """All their sub-modules."""
    return [child for module in modules for child in module._modules.values()]


def cgc(specific: Iterable[Sized], shared: Sized, **options: bool) -> Routing:
    """The routing of CGC with these lists of experts, one a task."""
    counts = [len(experts) for experts in specific]
    return Routing.cgc(len(counts), counts, len(shared), **options)


def lengths(module: Any) -> tuple[int, ...]:
    """How many modules there are in each list or dictionary of a module and its parts, as routings are counted by.

    Lists within lists are looked at where the first entry is one, and not what experts in a list are made of.
    """
    found: list[int] = []
    _add_lengths(module, found)
    return tuple(found)


def _add_lengths(module: Any, found: list[int], depth: int = 0) -> None:
    listed = isinstance(module, _LISTS)
    for inner in module._modules.values():
        if isinstance(inner, _LISTS):
            found.append(len(inner._modules))
        elif listed:
            return
        elif inner is None or not inner._modules or is_torchs(type(inner)):
            continue
        if depth < _DEEPEST:  # a part may hold itself
            _add_lengths(inner, found, depth + 1)


class _Call(NamedTuple):
    """What a call has to do with what is read for it."""

    size: Size
    dtype: torch.dtype | None
    differentiated: bool
    autocast: bool
    softmaxes: Sequence[bool] | None  # which gates had one of their own when it was converted; None where none tells


@dataclass(frozen=True)
class LevelDescription:
    """Where a class keeps what a level is made of.

    Args:
        experts: from an instance, its experts' chains, in the order of the routing.
        gates: from an instance, the chains that give each gate's logits, perhaps with a softmax and a dropout behind;
            None for equal shares.
        routing: from an instance, who reads what; asked for once, and again where the lists of an instance have other
            lengths than then.
        parts: from an instance, the modules that are not called any more, on which a hook may be.
        num_streams: from an instance, how many streams it takes; None for as many as experts and gates read.
        gate_inputs: from an instance, the number of the stream that each gate reads; None: gate k reads stream k.
        level_outputs: from an instance, the K mixtures and the streams that the level read, the streams behind it;
            None: the mixtures.
    """

    experts: Callable[[Any], Iterable[Chain]]
    gates: Callable[[Any], Sequence[Chain]]
    routing: Callable[[Any], Routing]
    parts: Callable[[Any], Iterable[Any]] = children
    num_streams: Callable[[Any], int] | None = None
    gate_inputs: Callable[[Any], Sequence[int]] | None = None
    level_outputs: Callable[[Any, Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]] | None = None

    def read_gates(self, module: Any) -> list[Any]:
        """For each gate what :func:`read_gate` says."""
        return [read_gate(chain) for chain in self.gates(module)]

    def read_gate_inputs(self, module: Any, gates: Sequence[Any], routing: Routing) -> Sequence[int] | None:
        """The stream of each gate; gates of equal shares read none, and have any."""
        if self.gate_inputs is not None:
            return tuple(self.gate_inputs(module))
        if routing.num_inputs > 1 and any(map(has_equal_shares, gates)):
            return [0 if has_equal_shares(gate) else k for k, gate in enumerate(gates)]
        return None

    def roots(self, module: Any, routing: Routing) -> Any:
        """All that a call depends on beside its inputs; None where :meth:`prepare` says that it cannot be read.

        Which stream a gate reads is not among it: calls are kept where gates read one stream, or each its own.
        """
        try:
            gates: Any = self.gates(module)
            chains = list(self.experts(module)), gates if isinstance(gates, Tensor) else list(gates)
            return *chains, list(self.parts(module)), routing.expert_inputs, routing.gate_experts
        except Exception:  # of a description that what has become of the module does not fit
            return None

    def prepare(
        self,
        module: Any,
        routing: Routing,
        x: Tensor | None,
        dtype: torch.dtype | None = None,
        readings: Readings | None = None,
        softmaxes: Sequence[bool] | None = None,
    ) -> Parts | str:
        """The parts of a level as :func:`evaluate` takes them, or why the module's own code has to run.

        ``x`` is any tensor with as many rows as the input, which may not be there yet; None where none tells. ``dtype``
        is that of the input, None where it is not there yet. ``readings`` may have the parts from another call.
        ``softmaxes`` says which gates had one of their own when it was converted.
        """
        found = self._parts_or_reason(module, routing, x, dtype, readings, softmaxes)
        if isinstance(found, str):
            _decisions.note(type(module).__name__, "its own code", found, x)
        return found

    def _parts_or_reason(
        self,
        module: Any,
        routing: Routing,
        x: Tensor | None,
        dtype: torch.dtype | None,
        readings: Readings | None,
        softmaxes: Sequence[bool] | None,
    ) -> Parts | str:
        if not pays(module, x):
            return "there are no kernels for its device and dtype"
        call = _Call(
            size_of_call(x, module.training, dtype is not None),
            dtype,
            torch.is_grad_enabled(),
            autocast_enabled("cpu" if x is None else x.device.type),
            softmaxes,
        )
        if readings is None:
            return self._read(module, routing, call)
        streams = None if self.gate_inputs is None else tuple(self.gate_inputs(module))
        key = call, streams, module.training, vars(module).get(CLASSES), OWN_UNDER_AUTOCAST in vars(module)
        return readings.find(
            key, lambda: self.roots(module, routing), lambda: self._read(module, routing, call), held_by
        )

    def _read(self, module: Any, routing: Routing, call: _Call) -> Parts | str:
        try:
            chains, gate_chains, parts = list(self.experts(module)), list(self.gates(module)), list(self.parts(module))
        except Exception as error:  # of a description that what has become of the module does not fit
            return f"its description does not fit any more: {type(error).__name__}: {error}"
        size, dtype, differentiated, autocast, softmaxes = call
        if differentiated and size.rows.constant and not size.rows.fold_small and any_wants_gradient(parts):
            size = size._replace(rows=size.rows._replace(constant=False))
        experts = read_experts(chains, size)
        if experts is None:
            return TOO_FEW_ROWS
        gates: list[Any] = list(map(read_gate, gate_chains))
        if (len(chains), len(gates)) != (routing.num_experts, routing.num_gates):
            return "it has other numbers of experts and gates than when it was converted"
        then = vars(module).get(LENGTHS)
        if then is not None and lengths(module) != then and not self._routes_as(module, routing):
            return "its experts read other streams, or its gates mix others, than when it was converted"
        if softmaxes is not None and list(map(has_softmax, gates)) != list(softmaxes):
            return "a gate ends with a softmax, or with none, unlike when it was converted"
        if autocast and OWN_UNDER_AUTOCAST in vars(module):
            return "under autocast its outputs would be other ones, as a trial told when it was converted"
        if autocast and any(
            layer.activation == "dice" for layers in experts[0] if not isinstance(layers, str) for layer in layers
        ):
            return "torch-rechub's Dice makes float32 of what autocast makes narrower, and the fused operator does not"
        pairs = zip(gates, routing.gate_experts, strict=True)
        if any(not isinstance(gate, str) and size_of(gate) not in (None, len(mixed)) for gate, mixed in pairs):
            return "its gates mix other numbers of experts than when it was converted"
        tried = vars(module).get(CLASSES)
        if any(isinstance(gate, str) for gate in gates) or any_hooks(parts, differentiated, tried):
            return (
                "a gate was exchanged, or a part that would not be called has a hook, or one of its parameters, or is"
                " of a class that there was none of when it was converted"
            )
        if not size.parts and any_drops(gates):
            return TOO_FEW_ROWS
        if differentiated and any_of_inference(experts[0], gates):
            return "a parameter was made in inference mode, which the level would have to save for its backward pass"
        if several_dtypes(experts[0], gates, dtype) and not autocast:
            return "it has parameters of several dtypes, or of another than its input"
        return Parts(chains, *experts, gates, routing, size.rows, self.read_gate_inputs(module, gates, routing))

    def _routes_as(self, module: Any, routing: Routing) -> bool:
        """Whether its routing is still that; no compiler is to trace how one is made."""
        try:
            return not _torch.compiling() and self.routing(module) == routing
        except Exception:  # of a description that what has become of the module does not fit
            return False


def any_wants_gradient(modules: Iterable[Any]) -> bool:
    """Whether a parameter of one of the modules does."""
    return any(p.requires_grad for module in modules if module is not None for p in module.parameters())


def any_hooks(modules: Iterable[Any], differentiated: bool, tried: Container[type] | None) -> bool:
    """Whether one of the modules, or one below, has a hook; if ``differentiated`` also one on a parameter.

    Or whether its class is neither PyTorch's nor among those that were ``tried``, where these are known.
    """
    for module in modules:
        if module is None:
            continue
        if has_hooks(module) or (differentiated and has_gradient_hooks(module)):
            return True
        if tried is not None and type(module) not in tried and _is_new(module, tried):
            return True
        if module._modules and any_hooks(module._modules.values(), differentiated, tried):
            return True
    return False


def _is_new(module: Any, tried: Container[type]) -> bool:
    """A part may have been converted itself."""
    if is_torchs(type(module)):
        return False
    kind = _torch.class_of(module)
    return (original_class(kind) or kind) not in tried
