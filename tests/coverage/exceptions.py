"""Branches that this machine's tests need not take: by file, the code of their line or a part of it, and why.

A line's branches are excepted wherever the code stands in the file.
"""

from __future__ import annotations

OTHER_PROCESSOR = "the other side is another processor's; tests/csrc/test_processors.py runs the choice in an emulator"
FAILED_ALLOCATION = "the other side is a static object, or a table of forks, for which there was no memory"
CHECKED_BEFORE = "what reads the call has refused it; kept for calls from C++"
NO_OTHER_VALUE = "the other side is a value that the enumeration does not have, or that has been refused"
CHECKED_BY_SCHEMA = "PyTorch's schema has refused what is no tensor; kept for calls from C++"
WITHOUT_PYTHON = "in a process without Python, as of tests/examples and tests/csrc, which gcov does not count"
INTERNED = "the other side is a string for which there was no memory, or a static object that another thread makes"
LIBRARY = "branches of pybind11's macros, and of strings, lists and tensors that are copied and destroyed"
BY_CONSTRUCTION = "its callers never bring the other side; kept so that the function is right by itself"
OTHER_SYSTEM = "the other side is a system's whose files of /proc or /sys, or whose OpenMP, are others, or a fork's"
ADDRESS_OF_ANOTHER = "the other side is a tensor at the address of another, of before, which no test can ask for"
CONSTANT = "the other side is another instruction set's, or folded away in these instances"

EXCEPTIONS: dict[str, dict[str, str]] = {
    "csrc/below_autograd.cpp": {
        "return tensor.defined() && ((records": BY_CONSTRUCTION,
        "new torch::Library(torch::Library::IMPL,": FAILED_ALLOCATION,
    },
    "csrc/cpu/cast/cast.cpp": {
        "return (dtype == at::kFloat || dtype == at::kBFloat16": CHECKED_BEFORE,
        "tensor.layout() == at::kStrided && !tensor.is_neg()": CHECKED_BEFORE,
    },
    "csrc/cpu/gemm/kept_weights.cpp": {
        "static auto* kept = new KeptWeights;": FAILED_ALLOCATION,
        "TORCH_CHECK(!weight.is_inference() &&": BY_CONSTRUCTION,
        "Entry{WeakTensor(weight.getIntrusivePtr())": LIBRARY,
        "weight.sizes().vec(), weight.strides().vec()": LIBRARY,
        "return at == entries_.end() ||": ADDRESS_OF_ANOTHER,
    },
    "csrc/cpu/gemm/pair_factor.h": {
        "const __m512 leading = _mm512_loadu_ps(": CONSTANT,
        "return rest ? _mm512_add_ps(": CONSTANT,
        "if (add || (!rest && lead == out)) continue;": CONSTANT,
    },
    "csrc/cpu/gemm/pair_engine.h": {"_mm512_storeu_si512(place + p * kBlock, in_pairs(planes[p]));": CONSTANT},
    "csrc/cpu/gemm/weight_forms.h": {"return engine.form == WeightForm::kPrepared &&": OTHER_PROCESSOR},
    "csrc/cpu/level/affine.h": {"switch (part.dtype) {": NO_OTHER_VALUE},
    "csrc/cpu/level/chain_backward_kernels.h": {"if (use == end) std::memset(s_.whole": BY_CONSTRUCTION},
    "csrc/cpu/level/chain_forward_kernels.h": {
        "switch (uses(e)) {": NO_OTHER_VALUE,
        "add_signs<C>(o, n, s_.signs": CONSTANT,
    },
    "csrc/cpu/level/folded_norms.cpp": {
        "MTLK_CHECK_VALUE(norms.size() == widths.size()": CHECKED_BEFORE,
        "MTLK_CHECK_VALUE(norm.variance.values != nullptr": CHECKED_BEFORE,
        "MTLK_CHECK_VALUE(tensor.is_cpu() &&": CHECKED_BEFORE,
    },
    "csrc/cpu/level/forward_weights.h": {"bool operator==(const WeightTile&) const = default;": BY_CONSTRUCTION},
    "csrc/cpu/level/gates.h": {"switch (gates.dtype) {": NO_OTHER_VALUE},
    "csrc/cpu/level/level_gradients.cpp": {"result.push_back((whole ? grad : grad.sum().view(1))": LIBRARY},
    "csrc/cpu/level/level_tables.cpp": {
        "MTLK_CHECK_VALUE(weights.size() == count,": CHECKED_BEFORE,
        "MTLK_CHECK_VALUE(tensors_.biases.size() == count,": CHECKED_BEFORE,
        "dtype_(tensors.inputs.empty() ?": CHECKED_BEFORE,
        "MTLK_CHECK_VALUE(!spec_.gate_inputs.empty() ||": CHECKED_BEFORE,
    },
    "csrc/cpu/level/norm_tables.cpp": {
        "compute_(dtype_ == at::kDouble ?": CONSTANT,
        "MTLK_CHECK_VALUE(statistics.size() == 2 * numbers.size()": CHECKED_BEFORE,
        "MTLK_CHECK_VALUE(given.empty() || given.size() == count, name": CHECKED_BEFORE,
    },
    "csrc/cpu/level/spec.cpp": {"return std::all_of(values.begin(), values.end(), [&](int64_t value)": CHECKED_BEFORE},
    "csrc/cpu/runtime/caches.cpp": {
        "const bool known = file >> kib >> unit": OTHER_SYSTEM,
        "static const int64_t bytes = share_of_last_level();": FAILED_ALLOCATION,
    },
    "csrc/cpu/runtime/forks.cpp": {
        "if (!file) return false;": OTHER_SYSTEM,
        "const char* const name_end = read ?": OTHER_SYSTEM,
        "if (!name_end || std::sscanf(name_end": OTHER_SYSTEM,
        "void let_threads_go()": OTHER_SYSTEM,
        "if (!omp_pause_resource_all || is_fork()) return;": OTHER_SYSTEM,
        "if (pthread_atfork(let_threads_go,": FAILED_ALLOCATION,
    },
    "csrc/cpu/runtime/forks.h": {"if (pthread_atfork(lock, unlock, unlock) != 0)": FAILED_ALLOCATION},
    "csrc/cpu/runtime/instruction_sets.cpp": {
        '__builtin_cpu_supports("avx2")': OTHER_PROCESSOR,
        "if (!has_avx512())": OTHER_PROCESSOR,
        "if (!has_avx512bf16())": OTHER_PROCESSOR,
        "__get_cpuid_count(7, 0,": OTHER_PROCESSOR,
        "__get_cpuid_count(7, 1,": OTHER_PROCESSOR,
        "if ((d & kAmxBf16) == 0": OTHER_PROCESSOR,
        "if (has_amx()) add(": OTHER_PROCESSOR,
        '__builtin_cpu_supports("avx512': OTHER_PROCESSOR,
        "static const std::vector<std::string> names = fill_tables();": FAILED_ALLOCATION,
        "static const int isa = static_cast<int>(instruction_sets().size()) - 1;": FAILED_ALLOCATION,
    },
    "csrc/cpu/runtime/memory.cpp": {
        "static auto* pool = new MemoryPool;": FAILED_ALLOCATION,
        "const auto give_back = [](void* context)": LIBRARY,
    },
    "csrc/cpu/runtime/tensors.cpp": {
        "MTLK_CHECK_TYPE(x.defined()": CHECKED_BY_SCHEMA,
        "MTLK_CHECK_TYPE(!tensor.unsafeGetTensorImpl()->is_python_dispatch() &&": CHECKED_BEFORE,
    },
    "csrc/cpu/simd/simd.h": {"return kVectorBytes > 16 &&": CONSTANT},
    "csrc/cpu/snr/snr_aver_kernels.h": {"if (p < 0) continue;": BY_CONSTRUCTION},
    "csrc/cpu/snr/snr.cpp": {"RECORD_FUNCTION(": LIBRARY},
    "csrc/cpu/snr/snr_call.cpp": {"MTLK_CHECK_VALUE(!tensors.empty(), name,": CHECKED_BEFORE},
    "csrc/cpu/level/kept_level.cpp": {
        "MTLK_CHECK_VALUE(tensor.is_cpu() &&": CHECKED_BEFORE,
        "MTLK_CHECK_VALUE(!spec.stores_inputs() &&": CHECKED_BEFORE,
        "MTLK_CHECK_VALUE(first.defined() &&": CHECKED_BEFORE,
        'RECORD_FUNCTION("mtlkernels::level_serve"': LIBRARY,
    },
    "csrc/direct.cpp": {"} catch (const Refused&) {": LIBRARY},
    "csrc/graph.cpp": {"const bool is_level = is_of_python(*node) ?": LIBRARY},
    "csrc/gradient_lists.cpp": {
        "py::capsule capsule(lists.get()": LIBRARY,
        "RECORD_FUNCTION(": LIBRARY,
    },
    "csrc/kept_level.cpp": {
        "if (!stored || !all_parameters(stored->call, held)) return py::none();": BY_CONSTRUCTION,
        "if (!spec || !read_level(*spec, no_inputs.ptr()": CHECKED_BEFORE,
        "} catch (const Refused&) {": LIBRARY,
        "if (!read_streams(inputs.ptr(), streams) || streams.empty())": CHECKED_BEFORE,
        "const bool by_cpp = backend == Py_None ||": BY_CONSTRUCTION,
        "(backend && PyUnicode_Check(backend) &&": BY_CONSTRUCTION,
        "return is_of(first, reinterpret_cast<PyObject*>(THPVariableClass)) &&": CHECKED_BEFORE,
        'interned("': INTERNED,
    },
    "csrc/kept_level.h": {
        "if (tensor.defined() && !holds(tensor)) return false;": BY_CONSTRUCTION,
        "if (part->defined() && !holds(*part)) return false;": BY_CONSTRUCTION,
    },
    "csrc/kept_lists.cpp": {
        "if (!stored || !stored->call.tensors.linear_gates)": CHECKED_BEFORE,
        "if (!key) return;": CHECKED_BEFORE,
    },
    "csrc/kept_trunk.cpp": {
        'interned("': INTERNED,
        "if (!stored || !all_parameters(stored->call, [&]": BY_CONSTRUCTION,
        "return is_tensor(object) && visit": BY_CONSTRUCTION,
    },
    "csrc/linears.cpp": {"biases.append(biases_[i] ? py::object(": LIBRARY},
    "csrc/level_node.cpp": {"auto* const own = dynamic_cast<LevelNode*>(function);": LIBRARY},
    "csrc/module.cpp": {"PYBIND11_MODULE(_C, module) {": LIBRARY},
    "csrc/modules.h": {
        "if (!own) return PyErr_Clear(), nullptr;": BY_CONSTRUCTION,
        "return own ? entry(own, name) : nullptr;": BY_CONSTRUCTION,
        "if (own) weight = entry(own, of_weight);": BY_CONSTRUCTION,
        "if (!PyDict_CheckExact(experts)) return false;": CHECKED_BEFORE,
        'interned("': INTERNED,
    },
    "csrc/nodes.h": {"} catch (pybind11::error_already_set& error) {": LIBRARY},
    "csrc/norm_modules.cpp": {
        'interned("': INTERNED,
        "if (tensors.inputs.empty()) return false;": CHECKED_BEFORE,
        "if (layer == spec.layers()) return false;": CHECKED_BEFORE,
        "return fit && layer == spec.layers();": CHECKED_BEFORE,
    },
    "csrc/snr_node.cpp": {"} catch (const Refused&) {": LIBRARY},
    "csrc/operators.cpp": {
        "if (!c10::Dispatcher::singleton().findSchema": WITHOUT_PYTHON,
        'const std::string name = "mtlkernels::" +': LIBRARY,
    },
    "csrc/recording.cpp": {
        "if (!object) throw py::error_already_set();": FAILED_ALLOCATION,
        "if (parts.size() == 1) return at::empty(": LIBRARY,
    },
    "csrc/watch.cpp": {
        "switch (seen.kind) {": NO_OTHER_VALUE,
        'interned("__getattribute__")': INTERNED,
        "PyObject* now = own ? entry(own, name) : nullptr;": BY_CONSTRUCTION,
        "PyObject* const part = own ? mtlk::entry(own, name) : nullptr;": BY_CONSTRUCTION,
    },
    "csrc/snapshot.cpp": {
        'interned("': INTERNED,
        "return found ? py::make_tuple(": LIBRARY,
        "if (!own) return false;": BY_CONSTRUCTION,
        "return own && same_entries(": BY_CONSTRUCTION,
        "switch (entry.kind) {": NO_OTHER_VALUE,
    },
}
