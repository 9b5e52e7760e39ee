"""Fused evaluation for models that already exist.

The package has an underscore because ``mtlkernels.convert`` is the function.
"""

from __future__ import annotations

from torch import nn

from mtlkernels._convert.classes import CLASS_ATTRIBUTE, PLAN, converted_class, original_class
from mtlkernels._convert.registry import find_converter, known_names
from mtlkernels._convert.report import ConversionReport, Line

__all__ = ["ConversionReport", "convert", "revert"]


def convert(model: nn.Module) -> ConversionReport:
    """Replaces, in place, the parts of ``model`` that are known by fused evaluation; :func:`revert` undoes it.

    Known are the trunks of ``PLE`` and ``MMOE`` of deepctr-torch 0.3.0, wherever they are in ``model``. A converted
    module keeps its parameters, the same objects under the same ``state_dict`` keys, and all of its sub-modules: only
    its class changes, to a subclass whose one replaced method reads the weights where they are. So optimizers, made
    before or after, checkpoints, ``load_state_dict``, ``.to()``, ``copy.deepcopy``, ``pickle``, ``torch.save`` and
    ``torch.compile`` go on working, and results agree within rounding.

    A level of experts is left alone where it has batch norm, an activation that is not known, a hook, a parametrized
    or exchanged layer, or experts of unequal shape. Dropout is evaluated by the original code in training, and fused in
    evaluation. The experts' modules are no longer called, so a hook that is put on one later makes its level run the
    original code; hooks for all modules (``torch.nn.modules.module.register_module_forward_hook``) do not see experts.
    Where a user's own ``forward`` leaves a task's output unused, gradients of that task's experts are zero instead of
    None.

    Args:
        model: any module; those in it that are not known are not touched.

    Returns:
        The report: ``print(report)`` says, a line each, what was replaced and what was left alone and why.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``.
    """
    _check_module(model)
    lines: list[Line] = []
    for path, module in model.named_modules():
        if original_class(type(module)) is not None:
            lines.append(Line("left alone", path, type(module).__name__, "already converted"))
            continue
        converter = find_converter(type(module))
        if converter is None:
            continue
        plan, found = converter.plan(module, path)
        lines += found
        if plan is not None:
            setattr(module, PLAN, plan)
            module.__class__ = converted_class(converter.mixin, type(module))
    if not lines:
        reason = f"nothing in it is known; known are {', '.join(known_names())}"
        lines.append(Line("left alone", "", type(model).__name__, reason))
    return ConversionReport(tuple(lines))


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
        lines.append(Line("reverted", path, name, f"{original.__name__} again"))
    if not lines:
        lines.append(Line("left alone", "", type(model).__name__, "nothing in it is converted"))
    return ConversionReport(tuple(lines))


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
