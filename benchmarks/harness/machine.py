"""Which machine and which versions a result belongs to."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
import time
from pathlib import Path

import torch

from mtlkernels import _extension

ROOT = Path(__file__).resolve().parents[2]
RECORD = "_build.json"  # of what became of the extensions, see setup.py


def cpu_model() -> str:
    """The processor's name as the operating system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if found:
            return found.group(1).strip()
    return platform.processor() or platform.machine()


# Of a vendor's families and models: the first and the last model, and the design.
_DESIGNS = {
    ("AuthenticAMD", 25): ((0x10, 0x1F, "Zen 4"), (0x60, 0x7F, "Zen 4"), (0xA0, 0xAF, "Zen 4"), (0x00, 0x5F, "Zen 3")),
    ("AuthenticAMD", 26): ((0x00, 0xFF, "Zen 5"),),
    ("GenuineIntel", 6): (
        (85, 85, "Skylake"),
        (106, 108, "Ice Lake"),
        (143, 143, "Sapphire Rapids"),
        (173, 174, "Granite Rapids"),
        (207, 207, "Emerald Rapids"),
    ),
}


def cpu_design() -> str:
    """The design behind the name, which does not tell it in a virtual machine; "" where it is not known."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    found = [re.search(rf"^{name}\s*:\s*(\w+)$", text, re.MULTILINE) for name in ("vendor_id", "cpu family", "model")]
    if not all(found):
        return ""
    vendor, family, model = (match.group(1) for match in found if match)
    of_family = _DESIGNS.get((vendor, int(family)), ())
    return next((name for first, last, name in of_family if first <= int(model) <= last), "")


def _isa() -> list[str]:
    """The instruction sets that torch finds and that matter to a GEMM."""
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    wanted = re.compile(r"avx2$|fma3$|avx512_(f|bf16|fp16|vnni)$|amx_|neon|asimd|sve|bf16$|i8mm$")
    return sorted(name for name, there in found.items() if there is True and wanted.match(name))


def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for products of bfloat16, without which PyTorch's are slow."""
    return any("bf16" in name for name in _isa())


def describe(device: torch.device) -> dict[str, object]:
    """The machine, in JSON's types."""
    machine: dict[str, object] = {
        "cpu": f"{cpu_model()} {cpu_design()}".strip(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "isa": _isa(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine["gpu"] = properties.name
        machine["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        machine["gpu_capability"] = f"sm_{properties.major}{properties.minor}"
        machine["allow_tf32"] = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return machine


@functools.cache  # the results that a run writes are no change of what it measures
def _commit() -> str:
    """Of the clone that this is; with a mark and what they are where files differ from it, or where it is no clone."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--match="]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        found = "unknown"
    return found if found.isalnum() and found != "unknown" else f"{found}, files {sources()}"


def sources() -> str:
    """What tells one state of the checkout from another, with the build in it, also where it is no clone."""
    found = hashlib.sha256()
    kinds = {".py", ".cpp", ".h", ".cu", ".cuh", ".txt", ".toml"}
    folders = [ROOT / name for name in ("mtlkernels", "csrc", "benchmarks", "tests")]
    files = [file for folder in folders for file in folder.rglob("*") if file.suffix in kinds or file.name == RECORD]
    for file in sorted([*files, ROOT / "setup.py", ROOT / "CMakeLists.txt", ROOT / "pyproject.toml"]):
        found.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return found.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Of everything that the figures depend on; "absent" where it is not installed."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "mtlkernels", "pytorch-optimizer", "torchjd"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "source tree" if package == "mtlkernels" else "absent"
    found["commit"] = _commit()
    found["compiler"] = _extension.build_facts().get("compiler", "absent")
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def slug(machine: dict[str, object]) -> str:
    """A short name for files: the GPU, or the processor with its number of cores and its widest instruction set."""
    if "gpu" in machine:
        name = str(machine["gpu"])
    else:
        isa = machine["isa"]
        tiles = "-amx" if isinstance(isa, list) and "amx_tile" in isa else ""
        name = f"{machine['cpu']} {machine['cores']}c {machine['cpu_capability']}{tiles}"
    name = re.sub(r"\((r|tm|c)\)|\bcpu\b|\bprocessor\b|@.*?ghz", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def today() -> str:
    """The date in UTC."""
    return time.strftime("%Y-%m-%d", time.gmtime())
