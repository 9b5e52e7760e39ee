"""What this install is made of."""

from __future__ import annotations

import importlib.metadata
import platform
import warnings

import torch

from mtlkernels import _backends, _extension, _torch


def show_config() -> str:
    """Versions, compiled targets, CPU capability, GPU, the implementations a device, and how to get what is missing.

    Returns:
        A few lines of text, for people and for bug reports.
    """
    import mtlkernels

    lines = [
        f"mtlkernels {mtlkernels.__version__}",
        f"python     {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"torch      {_torch_version()}",
        f"triton     {_triton()}",
        f"extension  {_extension_facts()}",
        f"cuda       {_cuda()}",
        f"cpu        {_cpu()}",
        f"gpu        {_gpu()}",
    ]
    for op, devices in _backends.backends().items():
        listed = "; ".join(f"{device}: {', '.join(names)}" for device, names in devices.items())
        lines.append(f"{op}  {listed}")
    return "\n".join(lines)


def _torch_version() -> str:
    if _extension.is_supported(torch.__version__):
        return torch.__version__
    return f"{torch.__version__}, which is not supported: it is older than {_extension.LEAST_TORCH}"


def _triton() -> str:
    if not _backends.has_triton():
        from mtlkernels import _diagnosis

        return f"missing, so GPUs run the reference; {_diagnosis.TRITON}"
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # a build that was not installed by pip
        return "of unknown version"


def _extension_facts() -> str:
    if not _extension.loaded():
        error = _extension.load_error() or ""
        return f"missing ({error}), so CPUs run the reference: {_told('_C', error)}"
    if not _extension.has_module():
        slower = "without the direct way from Python, so that calls of a few rows take longer"
        return f"{slower} ({_extension.module_error()}); {_extension.operator_library()}"
    facts = ", ".join(f"{name} {value}" for name, value in _extension.build_facts().items())
    return "; ".join([facts, str(_extension.operator_library()), *_of_another_source()])


def _of_another_source() -> list[str]:
    if not _extension.of_another_source():
        return []
    from mtlkernels import _diagnosis

    return [str(_diagnosis.of_another_source())]


def warn_of_another_source() -> None:
    """Such kernels may compute what this version's Python does not expect."""
    for found in _of_another_source():
        warnings.warn(f"mtlkernels: {found}", RuntimeWarning, stacklevel=3)


def _cuda() -> str:
    if _extension.cuda_loaded():
        return "CUDA C++ kernels for PCGrad"
    reason = _extension.cuda_load_error()
    if torch.version.cuda is None:
        return f"no CUDA C++ kernels ({reason})"
    return f"no CUDA C++ kernels ({reason}), so PCGrad runs by Triton or the reference: {_told('_cuda', reason or '')}"


def _told(name: str, error: str) -> str:
    """Why an extension is missing and what to do; of a build that failed, the end of its output on lines of its own."""
    from mtlkernels import _diagnosis

    found = _diagnosis.missing(name, error)
    return "\n".join([str(found), *(f"  | {line}" for line in found.output)])


def _cpu() -> str:
    amx = _torch.has_amx()
    return f"{torch.backends.cpu.get_cpu_capability()}{' with AMX' if amx else ''}, {torch.get_num_threads()} threads"


def _gpu() -> str:
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        return "none" if built else "none (this torch is built without GPU support)"
    names = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        names.append(f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})")
    return ", ".join(names)
