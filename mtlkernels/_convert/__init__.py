"""Fused evaluation for models that already exist.

The package has an underscore because ``mtlkernels.convert`` is what one calls.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from mtlkernels import _decisions
from mtlkernels._convert.calls import CALLS
from mtlkernels._convert.classes import (
    CLASS_ATTRIBUTE,
    CLASSES,
    LENGTHS,
    OWN_UNDER_AUTOCAST,
    PLAN,
    SERVES_ONLY,
    SOFTMAXES,
    TRIED,
    WATCHED,
    converted_class,
    is_torchs,
    original_class,
)
from mtlkernels._convert.levels import lengths
from mtlkernels._convert.paying import FORCE, slower
from mtlkernels._convert.registration import Registration
from mtlkernels._convert.registry import find_converter, known_names
from mtlkernels._convert.report import ConversionReport, Line
from mtlkernels._convert.values import TooMuch
from mtlkernels._convert.watched import changed, watched
from mtlkernels.nn import CGC, PLE, SNR, MMoE

__all__ = ["ConversionReport", "convert", "revert"]


class Convert(Registration):
    """Replaces, in place, the parts of ``model`` that are known by fused evaluation; :func:`revert` undoes it.

    Known, wherever they are in ``model``, are ``PLE`` and ``MMOE`` of deepctr-torch 0.3.0, of torch-rechub 0.9.0 and of
    nextrec 0.6.14; by their structure ``ExtractionNet`` and ``MMoE`` of TorchEasyRec, ``CGC_Layer`` and ``MMoE_Layer``
    of FuxiCTR, ``CGC`` and ``MMoE`` of LibMTL with encoders that are an ``nn.Sequential``, ``PLEModel`` and
    ``MMoEModel`` of MTReclib; and what :meth:`register` adds. A converted
    module keeps its parameters, the same objects under the same ``state_dict`` keys, and all of its sub-modules: only
    its class changes, to a subclass whose one replaced method reads the weights where they are. So optimizers, made
    before or after, checkpoints, ``load_state_dict``, ``.to()``, ``copy.deepcopy``, ``pickle``, ``torch.save`` and
    ``torch.compile`` go on working, and results agree within rounding.

    A level is one :func:`mtlkernels.expert_mixture` where its experts are alike and each is [Linear → (BatchNorm1d or
    LayerNorm) → activation → (Dropout)] a layer, in training and in evaluation. Running statistics are kept as PyTorch
    keeps them; fused dropout draws from torch's generator, so it is reproducible, by other random numbers than the
    library's. Other levels are evaluated in parts: experts that are alike in one ``expert_mixture``, what is not known
    (an activation of your own, another norm, a layer's subclass, one that was quantized after the conversion) by the
    experts' own modules, and all mixing in one :func:`mtlkernels.gated_mixture`; the report says "mixing fused" where
    that is all. Where a level's own code is as fast it runs: on few rows with layer norm, with batch norm or dropout in
    training, with batch norm whose gradients are wanted (serve under ``torch.no_grad()``), in parts, or where experts
    stay modules; these also in ``torch.compile``. Gates that read one stream are one product where rows are many.
    deepctr-torch's last shared gate, whose output nobody reads, is not evaluated any more; statistics of its batch norm
    stay as they were.

    Batch norm in evaluation is a scale and a shift behind the product, or folded into copies of the weights, made anew
    at each call: a write to a weight or a statistic is seen at once, whoever makes it. A level with a hook is left
    alone. The experts' modules are not called where they are fused, so a hook that is put on one later makes its level
    run the original code; hooks for all modules
    (``torch.nn.modules.module.register_module_forward_hook``) do not see experts. TorchJD's autogram puts such hooks on
    all modules with parameters: its Gram matrix is right, and levels are not fused while its ``Engine`` lives;
    :class:`mtlkernels.optim.GramWeighted` makes the matrix of fused levels. Only where a module of yours has parameters
    of its own and returns a fused level's outputs as they are, that ``Engine`` (0.18) may miss that module, as any that
    returns what a custom ``autograd.Function`` gives: put these parameters into a module that it calls. What only
    unused outputs depend on keeps no gradient, as before; under ``torch.compile`` its gradient is zero.

    A class may have been edited, so each module is first tried: a copy with random weights in float64 has to do the
    same fused as by its own code. Outputs in training and evaluation, gradients, random numbers that are drawn,
    statistics, and attributes that the forward sets are compared, also with other numbers in the place of those that
    are kept as attributes (a temperature that a schedule changes); a module in which one of them differs is left alone,
    and the report says which. One that differs under autocast alone, as where its own code gives another dtype there,
    is fused elsewhere. A level that is quantized already is left alone. One whose parameters are of several dtypes runs
    its own code, which casts.

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
        _decisions.ask()
        lines: list[Line] = []
        for path, module in model.named_modules():
            if isinstance(module, (MMoE, CGC, PLE, SNR)):
                lines.append(Line("left alone", path, type(module).__name__, "fused already: mtlkernels' own"))
                continue
            original = original_class(type(module))
            forced = force
            if original is not None and PLAN not in vars(module) and CLASS_ATTRIBUTE in vars(type(module)):
                module.__class__ = original  # it was made of a converted class
            elif original is not None and _was_changed(module) and CLASS_ATTRIBUTE in vars(type(module)):
                forced = force or FORCE in vars(module)
                _unconvert(module, original)  # which is tried anew
            elif original is not None:
                if force:
                    vars(module)[FORCE] = True
                words = "already converted" + (", forced from now on" if force else "")
                lines.append(Line("left alone", path, type(module).__name__, words))
                continue
            try:
                lines += _convert(module, path, forced)
            except Exception as error:  # of code that is not ours
                reason = f"it cannot be converted: {type(error).__name__}: {error}"
                lines.append(Line("left alone", path, type(module).__name__, reason))
        if not lines:
            reason = f"nothing in it is known; known are {', '.join(known_names())}"
            lines.append(Line("left alone", "", type(model).__name__, reason))
        for line in lines:
            _decisions.report("convert", str(line))
        return ConversionReport(tuple(lines))


convert = Convert()


def _convert(module: nn.Module, path: str, force: bool) -> list[Line]:
    """What becomes of a module of PyTorch's or the user's, which is converted where it can be."""
    converter = find_converter(module)
    if converter is None:
        return []
    with _decisions.paused():
        plan, planned, own_under_autocast, tried_with = converter.plan(module, path)
    reason = None if force or plan is None else slower(module)
    if reason is not None:
        return [line if line.action == "left alone" else _left_alone(line, reason) for line in planned]
    if plan is not None:
        kind = converted_class(converter.base, type(module), converter.method, converter.source)
        kinds = (original_class(type(part)) or type(part) for part in module.modules())
        tried = tuple(dict.fromkeys(kind for kind in kinds if not is_torchs(kind)))  # a set's order is the process's
        try:
            found = watched(module, converter.method, converter.read(module), converter.writes)
        except TooMuch as error:
            return [_left_alone(line, str(error)) for line in planned]
        module.__class__ = kind
        vars(module).update({PLAN: plan, CLASSES: tried, WATCHED: found, SOFTMAXES: converter.softmaxes(module)})
        vars(module)[LENGTHS] = converter.lengths(module)
        if force:
            vars(module)[FORCE] = True
        if own_under_autocast:
            vars(module)[OWN_UNDER_AUTOCAST] = True
        if tried_with is not None:
            vars(module)[TRIED] = tried_with
    return planned


def _was_changed(module: nn.Module) -> bool:
    """Whether a converted module runs its own code by now, as something is another than when it was converted."""
    if changed(module, vars(module).get(WATCHED, ())):
        return True
    trunk, softmaxes = getattr(module, "_mtlkernels_trunk", None), vars(module).get(SOFTMAXES)
    if trunk is None or softmaxes is None:
        return False
    try:
        pairs = zip(vars(module)[PLAN], trunk.levels(module), strict=True)
        rerouted = any(routing is not None and level.routing(module) != routing for routing, level in pairs)
        if rerouted or trunk.softmaxes(module) != softmaxes:
            return True
        if vars(module).get(LENGTHS) is not None:
            vars(module)[LENGTHS] = lengths(module)
        return False
    except Exception:  # of a description that what has become of the module does not fit
        return True


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
        _unconvert(module, original)
        lines.append(Line("reverted", path, name, f"{original.__name__} again"))
    if not lines:
        lines.append(Line("left alone", "", type(model).__name__, "nothing in it is converted"))
    return ConversionReport(tuple(lines))


def _unconvert(module: nn.Module, original: type) -> None:
    for name in (PLAN, CLASSES, SOFTMAXES, LENGTHS, WATCHED, TRIED, CALLS, FORCE, OWN_UNDER_AUTOCAST, SERVES_ONLY):
        vars(module).pop(name, None)
    module.__class__ = original  # at last: until then a second call finds what an interrupt has left


def _left_alone(line: Line, reason: str) -> Line:
    return replace(line, action="left alone", detail=reason)


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
