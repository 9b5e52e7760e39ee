"""Fused evaluation for models that already exist.

The package has an underscore because ``mtlkernels.convert`` is what one calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from mtlkernels._convert.classes import CLASS_ATTRIBUTE, PLAN, converted_class, original_class
from mtlkernels._convert.kernels import FORCE, slower
from mtlkernels._convert.level import Level
from mtlkernels._convert.registry import find_converter, known_names, register_level
from mtlkernels._convert.report import ConversionReport, Line
from mtlkernels.nn import CGC, PLE, SNR, MMoE
from mtlkernels.routing import Routing

__all__ = ["ConversionReport", "convert", "revert"]


class Convert:
    """Replaces, in place, the parts of ``model`` that are known by fused evaluation; :func:`revert` undoes it.

    Known, wherever they are in ``model``, are ``PLE`` and ``MMOE`` of deepctr-torch 0.3.0 and of torch-rechub 0.9.0; by
    their structure ``ExtractionNet`` and ``MMoE`` of TorchEasyRec, ``CGC_Layer`` and ``MMoE_Layer`` of FuxiCTR, ``CGC``
    and ``MMoE`` of LibMTL with encoders that are an ``nn.Sequential``, ``PLEModel`` and ``MMoEModel`` of MTReclib; and
    what :meth:`register` adds. A converted
    module keeps its parameters, the same objects under the same ``state_dict`` keys, and all of its sub-modules: only
    its class changes, to a subclass whose one replaced method reads the weights where they are. So optimizers, made
    before or after, checkpoints, ``load_state_dict``, ``.to()``, ``copy.deepcopy``, ``pickle``, ``torch.save`` and
    ``torch.compile`` go on working, and results agree within rounding.

    A level is one :func:`mtlkernels.expert_mixture` where its experts are alike and each is [Linear → (BatchNorm1d or
    LayerNorm) → activation → (Dropout)] a layer, in training and in evaluation. Running statistics are kept as
    PyTorch keeps them; fused dropout draws from torch's generator, so it is reproducible, by other random numbers than
    the library's. Other levels are evaluated in parts: experts that are alike in one ``expert_mixture``, what is not
    known (an activation of your own, another norm, a layer's subclass, a quantized weight) by the experts' own modules,
    and all mixing in one :func:`mtlkernels.gated_mixture`; the report says "mixing fused" where that is all. Where a
    level's own code is as fast it runs: on few rows with norms or dropout in training, or with batch norm whose
    gradients are wanted (serve under ``torch.no_grad()``), or where experts stay modules; these also in
    ``torch.compile``. Gates that read one stream are one product where rows are many.
    deepctr-torch's last shared gate, whose output nobody reads, is not evaluated any more; statistics of its batch norm
    stay as they were.

    Batch norm in evaluation is a scale and a shift behind the product, or folded into copies of the weights, made anew
    at each call: a write to a weight or a statistic is seen at once, whoever makes it. A level with a hook is left
    alone. The experts' modules are not called where they are fused, so a hook that is put on one later makes its level
    run the original code; hooks for all modules
    (``torch.nn.modules.module.register_module_forward_hook``) do not see experts. What only unused outputs depend on
    keeps no gradient, as before; under ``torch.compile`` its gradient is zero.

    A class may have been edited, so each module is first tried: a copy with random weights in float64 has to do the
    same fused as by its own code. Outputs in training and evaluation, gradients, random numbers that are drawn,
    statistics, and attributes that the forward sets are compared; a module in which one of them differs is left alone,
    and the report says which.

    Where no kernels serve the device and dtype of a module's parameters (a CPU without the C++ extension, an NVIDIA
    GPU without Triton or in float64, any other device), fused evaluation would be slower than the module's own code. It
    is left alone then, and the report says how to get the kernels; on "meta", from where it is going to be moved, only
    if this install has kernels for no device at all. A converted module that is moved to such a device, or loaded in
    an install without kernels, runs its own code there. ``force=True``, which copies and pickles keep, and
    :func:`mtlkernels.use_backend` around ``convert`` or around a call choose fused evaluation all the same.

    Args:
        model: any module; those in it that are not known are not touched.
        force: whether to convert, and to evaluate fused, also where that is slower for want of kernels.

    Returns:
        The report: ``print(report)`` says, a line each, what was replaced, of what only the mixing is fused,
        and what was left alone and why.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``, or ``force`` is not a bool.
    """

    def __call__(self, model: nn.Module, *, force: bool = False) -> ConversionReport:
        """See :class:`Convert`."""
        _check_module(model)
        if not isinstance(force, bool):
            raise TypeError(f"force must be a bool, got {type(force).__name__}")
        lines: list[Line] = []
        for path, module in model.named_modules():
            if isinstance(module, (MMoE, CGC, PLE, SNR)):
                lines.append(Line("left alone", path, type(module).__name__, "fused already: mtlkernels' own"))
                continue
            if original_class(type(module)) is not None:
                if force:
                    setattr(module, FORCE, True)
                words = "already converted" + (", forced from now on" if force else "")
                lines.append(Line("left alone", path, type(module).__name__, words))
                continue
            converter = find_converter(module)
            if converter is None:
                continue
            plan, found = converter.plan(module, path)
            reason = None if force or plan is None else slower(module)
            if reason is not None:
                lines += [line if line.action == "left alone" else _left_alone(line, reason) for line in found]
                continue
            lines += found
            if plan is not None:
                setattr(module, PLAN, plan)
                if force:
                    setattr(module, FORCE, True)
                module.__class__ = converted_class(converter.mixin, type(module))
        if not lines:
            reason = f"nothing in it is known; known are {', '.join(known_names())}"
            lines.append(Line("left alone", "", type(model).__name__, reason))
        return ConversionReport(tuple(lines))

    def register(
        self,
        kind: type[nn.Module],
        *,
        experts: Callable[[Any], Sequence[Any]],
        gates: Callable[[Any], Sequence[Any]],
        routing: Callable[[Any], Routing],
        inputs: Callable[..., Sequence[Tensor] | None] | None = None,
        arguments: Callable[[Any, Sequence[Tensor]], tuple[Any, ...]] | None = None,
        outputs: Callable[[Any, Sequence[Tensor]], Any] | None = None,
    ) -> None:
        """Teaches :func:`convert` a class of your own whose ``forward`` is one level of experts, gates and mixing.

        An expert is given as its modules in the order in which they are applied, [Linear → (BatchNorm1d) →
        (activation) → (Dropout)] a layer: one module, an ``nn.Sequential``, or a sequence of these. A gate likewise,
        up to its logits; an ``nn.Softmax`` and a dropout may follow. A whole example::

            class MyMMoE(nn.Module):
                def __init__(self, width, hidden, num_experts, num_tasks):
                    super().__init__()
                    self.experts = nn.ModuleList(
                        nn.Sequential(nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(0.1))
                        for _ in range(num_experts)
                    )
                    self.gates = nn.ModuleList(nn.Linear(width, num_experts) for _ in range(num_tasks))

                def forward(self, x):
                    hidden = torch.stack([expert(x) for expert in self.experts], dim=1)
                    return [(gate(x).softmax(1).unsqueeze(2) * hidden).sum(1) for gate in self.gates]

            mk.convert.register(
                MyMMoE,
                experts=lambda level: level.experts,
                gates=lambda level: level.gates,
                routing=lambda level: mk.Routing.mmoe(len(level.experts), len(level.gates)),
            )
            print(mk.convert(model))  # any model with a MyMMoE in it

        Subclasses are converted too unless they have a ``forward`` of their own. A class that is registered again gets
        the new description, also where it is converted already. To use a pickled converted model fused, register its
        class in that process too.

        Args:
            kind: the class.
            experts: from an instance, its experts in the order of the routing; asked at every call.
            gates: from an instance, its gates in the order of the routing; asked at every call.
            routing: from an instance, its :class:`mtlkernels.Routing`; asked once, by ``convert``.
            inputs: from an instance and the arguments of ``forward``, the G input streams [B, D]; None leaves that call
                to the original code. By default ``forward`` takes one tensor, or a sequence of G.
            arguments: the inverse, with which the class is tried: from an instance and G streams, the arguments of
                ``forward``, a tuple. Needed beside ``inputs``.
            outputs: from an instance and the K mixtures [B, H], what ``forward`` returns. By default a list of them.

        Raises:
            TypeError: ``kind`` is not a subclass of ``torch.nn.Module``, or another argument is not callable.
            ValueError: one of ``inputs`` and ``arguments`` is given without the other.
        """
        _check_kind(kind)
        needed = {"experts": experts, "gates": gates, "routing": routing}
        optional = {"inputs": inputs, "arguments": arguments, "outputs": outputs}
        given: dict[str, Any] = {**needed, **{name: f for name, f in optional.items() if f is not None}}
        for name, function in given.items():
            if not callable(function):
                raise TypeError(f"{name} must be callable, got {type(function).__name__}")
        if (inputs is None) != (arguments is None):
            missing, other = ("inputs", "arguments") if inputs is None else ("arguments", "inputs")
            raise ValueError(f"{missing} must be given beside {other}, of which it is the inverse, got None")
        register_level(kind, Level(**given))


convert = Convert()


def revert(model: nn.Module) -> ConversionReport:
    """Gives every module in ``model`` that :func:`convert` changed its own class back.

    Returns:
        The report, a line for each module that was reverted or that could not be.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``.
    """
    _check_module(model)
    lines: list[Line] = []
    for path, module in model.named_modules():
        original = original_class(type(module))
        if original is None:
            continue
        name = type(module).__name__
        if CLASS_ATTRIBUTE not in vars(type(module)):
            lines.append(Line("left alone", path, name, "its class was changed again after its conversion"))
            continue
        module.__class__ = original
        delattr(module, PLAN)
        vars(module).pop(FORCE, None)
        lines.append(Line("reverted", path, name, f"{original.__name__} again"))
    if not lines:
        lines.append(Line("left alone", "", type(model).__name__, "nothing in it is converted"))
    return ConversionReport(tuple(lines))


def _left_alone(line: Line, reason: str) -> Line:
    return replace(line, action="left alone", detail=reason)


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _check_kind(kind: object) -> None:
    if not isinstance(kind, type) or not issubclass(kind, nn.Module):
        found = kind.__name__ if isinstance(kind, type) else f"an instance of {type(kind).__name__}"
        raise TypeError(f"kind must be a subclass of torch.nn.Module, got {found}")
