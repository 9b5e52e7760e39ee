"""Branches that this machine's tests need not take: by file, the code of their line or a part of it, and why.

A line's branches are excepted wherever the code stands in the file.
"""

from __future__ import annotations

OTHER_PROCESSOR = "the other side is another processor's; tests/csrc/test_processors.py runs the choice in an emulator"
FAILED_ALLOCATION = "the other side is a static object, or a table of forks, for which there was no memory"
CHECKED_BEFORE = "what decodes the spec has refused it; kept for calls from C++"
PYBIND11 = "branches of pybind11's macros and strings"

EXCEPTIONS: dict[str, dict[str, str]] = {
    "csrc/cpu/runtime/instruction_sets.cpp": {
        '__builtin_cpu_supports("avx2")': OTHER_PROCESSOR,
        "if (!has_avx512())": OTHER_PROCESSOR,
        "if (!has_avx512bf16())": OTHER_PROCESSOR,
        "__get_cpuid_count(7, 1,": OTHER_PROCESSOR,
        '__builtin_cpu_supports("avx512': OTHER_PROCESSOR,
        "static const std::vector<std::string> names = fill_tables();": FAILED_ALLOCATION,
        "static int isa = static_cast<int>(instruction_sets().size()) - 1;": FAILED_ALLOCATION,
    },
    "csrc/cpu/runtime/forks.h": {"if (pthread_atfork(lock, unlock, unlock) != 0)": FAILED_ALLOCATION},
    "csrc/cpu/runtime/memory.cpp": {"static auto* pool = new MemoryPool;": FAILED_ALLOCATION},
    "csrc/cpu/gemm/kept_weights.cpp": {"static auto* kept = new KeptWeights;": FAILED_ALLOCATION},
    "csrc/cpu/level/folded_norms.cpp": {
        "MTLK_CHECK_VALUE(norms.size() == widths.size()": CHECKED_BEFORE,
        "MTLK_CHECK_VALUE(norm.variance.values != nullptr": CHECKED_BEFORE,
    },
    "csrc/module.cpp": {"PYBIND11_MODULE(_C, module) {": PYBIND11},
    "csrc/recording.cpp": {"if (!object) throw py::error_already_set();": FAILED_ALLOCATION},
}
