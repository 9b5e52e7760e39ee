"""Which implementation runs, and how to insist on one."""

from __future__ import annotations

import importlib.util
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import mtlkernels as mk
from mtlkernels import _backends, _diagnosis, _extension
from mtlkernels.testing import Case, CaseFactory
from tests import requires


@pytest.fixture
def case() -> Case:
    return CaseFactory(0, torch.float32).expert_mixture(6, [4, 3], mk.Routing.mmoe(3, 2))


def test_backends_lists_every_op_by_device() -> None:
    listed = mk.backends()
    assert set(listed) >= {"gated_mixture", "expert_mixture"}
    for devices in listed.values():
        assert set(devices) == {"cpu", "cuda", "other"}
        for names in devices.values():
            assert "reference" in names
            assert set(names) <= set(_backends.BACKENDS)
        assert "cpp" not in devices["cuda"] and devices["other"] == ("reference",)


def test_the_first_one_listed_is_used(case: Case) -> None:
    first = mk.backends()["expert_mixture"]["cpu"][0]
    usual = mk.expert_mixture(**case.arguments)
    with mk.use_backend(first):
        named = mk.expert_mixture(**case.arguments)
    assert all(torch.equal(a, b) for a, b in zip(usual, named, strict=True))


def test_forcing_the_reference_runs_it(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = _backends.reference_implementation("level", "forward")
    monkeypatch.setitem(
        _backends._references, ("level", "forward"), lambda *args: calls.append("forward") or original(*args)
    )
    with mk.use_backend("reference"):
        mk.expert_mixture(**case.arguments)
    assert calls == ["forward"]


@pytest.mark.parametrize("through_backward", [True, False])
def test_the_backward_uses_the_implementation_of_its_forward(
    case: Case, through_backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    original = _backends.reference_implementation("level", "backward")
    monkeypatch.setitem(
        _backends._references, ("level", "backward"), lambda *args: calls.append("backward") or original(*args)
    )
    with mk.use_backend("reference"):
        outputs = mk.expert_mixture(**case.arguments)
    if through_backward:
        sum(y.sum() for y in outputs).backward()
    else:
        leaves = [leaf for group in case.leaves().values() for leaf in group]
        torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs])
    assert calls == ["backward"]


def test_restores_the_choice_also_on_an_error() -> None:
    assert _backends.forced() is None
    with mk.use_backend("reference"):
        with pytest.raises(ZeroDivisionError), mk.use_backend("cpp"):
            assert _backends.forced() == "cpp"
            raise ZeroDivisionError
        assert _backends.forced() == "reference"
    assert _backends.forced() is None


def test_restores_the_choice_of_the_block_around() -> None:
    with mk.use_backend("reference"), mk.use_backend("cpp"):
        with mk.use_backend("reference"):
            assert _backends.forced() == "reference"
        assert _backends.forced() == "cpp"
    assert _backends.forced() is None


@pytest.mark.parametrize("name", ["Reference", "eager", ""])
def test_unknown_names(name: str) -> None:
    with pytest.raises(ValueError, match=r"name must be one of .*'reference'.*, got "), mk.use_backend(name):
        pass


def test_names_of_another_kind() -> None:
    with pytest.raises(TypeError, match="name must be a string, got NoneType"), mk.use_backend(None):  # type: ignore[arg-type]
        pass


@pytest.mark.parametrize("wants_gradient", [True, False])
def test_a_missing_implementation_is_an_error(case: Case, wants_gradient: bool) -> None:
    missing = set(_backends.BACKENDS) - set(mk.backends()["expert_mixture"]["cpu"])
    for name in missing:
        with (
            torch.set_grad_enabled(wants_gradient),
            mk.use_backend(name),
            pytest.raises(RuntimeError, match=f"expert_mixture has no '{name}' implementation for 'cpu'.*it has "),
        ):
            mk.expert_mixture(**case.arguments)


def test_cpp_is_an_error_without_the_extension(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "_cpp", _extension._Loaded(error="not built"))
    assert "cpp" not in mk.backends()["expert_mixture"]["cpu"]
    with mk.use_backend("cpp"), pytest.raises(RuntimeError, match="has no 'cpp' implementation"):
        mk.expert_mixture(**case.arguments)


def test_holds_for_every_thread(case: Case) -> None:
    seen = []
    with mk.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(_backends.forced()))
        thread.start()
        thread.join()
    assert seen == ["reference"]


def test_other_devices_run_the_reference() -> None:
    """Meta tensors stand for a device that no implementation knows."""
    case = CaseFactory(0, torch.float32, device="meta").expert_mixture(6, [4, 3], mk.Routing.mmoe(3, 2))
    outputs = mk.expert_mixture(**case.arguments)
    assert [tuple(y.shape) for y in outputs] == [(6, 3), (6, 3)]


@pytest.fixture
def with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the CUDA C++ kernels had been loaded."""
    monkeypatch.setattr("mtlkernels._extension._cuda_error", None)


def test_a_folder_named_triton_is_not_triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of models for a server has that name, and is a package to Python."""
    (tmp_path / "triton" / "1").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    assert importlib.util.find_spec("triton") is not None
    assert not _backends._find_triton()
    monkeypatch.setitem(sys.modules, "triton", types.ModuleType("triton"))
    assert not _backends._find_triton()


@pytest.mark.parametrize(("triton", "others"), [(True, ("triton", "reference")), (False, ("reference",))])
def test_cuda_comes_first_where_it_is_loaded(
    with_cuda: None, triton: bool, others: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_backends, "has_triton", lambda: triton)
    assert mk.backends()["pcgrad"]["cuda"] == ("cuda", *others)
    assert mk.backends()["expert_mixture"]["cuda"] == others
    assert "cuda" not in mk.backends()["pcgrad"]["cpu"]


def test_what_a_cuda_call_of_pcgrad_runs(with_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from mtlkernels.ops.pcgrad import cuda

    monkeypatch.setattr(_backends, "triton_implementation", lambda op, direction: f"triton {direction}")
    monkeypatch.setattr(cuda, "has_triton", lambda: True)
    monkeypatch.setattr(cuda, "has_fast_float64", lambda device: True)
    grads = [torch.ones(2)] * 65
    gram = torch.eye(3, dtype=torch.float64)
    assert _backends.cuda_implementation("pcgrad", "gram", (grads[:3], 3)) is cuda.gram
    assert _backends.cuda_implementation("pcgrad", "weights", (gram, None)) is cuda.weights
    with mk.use_backend("triton"):
        assert _backends.cuda_implementation("pcgrad", "combine", (grads[:3], 3, gram[0])) == "triton combine"
    many = torch.eye(65, dtype=torch.float64)
    for direction, args in (("gram", (grads, 65)), ("weights", (many, None)), ("combine", (grads, 65, many[0]))):
        monkeypatch.setattr(_backends, "has_triton", lambda: True)
        assert _backends.cuda_implementation("pcgrad", direction, args) == f"triton {direction}"
        monkeypatch.setattr(_backends, "has_triton", lambda: False)
        expected = _backends.reference_implementation("pcgrad", direction)
        assert _backends.cuda_implementation("pcgrad", direction, args) is expected
        with mk.use_backend("cuda"):  # which refuses that many
            assert _backends.cuda_implementation("pcgrad", direction, args) is getattr(cuda, direction)


def test_triton_multiplies_where_float64_is_slow(with_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from mtlkernels.ops.pcgrad import cuda

    grads, gram = [torch.ones(2)] * 3, torch.eye(3, dtype=torch.float64)
    monkeypatch.setattr(_backends, "triton_implementation", lambda op, direction: f"triton {direction}")
    monkeypatch.setattr(cuda, "has_fast_float64", lambda device: False)
    for triton, expected in ((True, "triton gram"), (False, cuda.gram)):
        monkeypatch.setattr(cuda, "has_triton", lambda found=triton: found)
        assert _backends.cuda_implementation("pcgrad", "gram", (grads, 3)) == expected
    assert _backends.cuda_implementation("pcgrad", "combine", (grads, 3, gram[0])) is cuda.combine
    with mk.use_backend("cuda"):
        assert _backends.cuda_implementation("pcgrad", "gram", (grads, 3)) is cuda.gram
    assert _backends.cuda_implementation("pcgrad", "weights", (gram, None)) is cuda.weights


def test_cuda_is_an_error_on_a_cpu(with_cuda: None) -> None:
    with mk.use_backend("cuda"), pytest.raises(RuntimeError, match="pcgrad has no 'cuda' implementation for 'cpu'"):
        mk.gram([[torch.ones(2)]])


def test_loading_the_cuda_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert _extension._load_cuda(tmp_path) == "this torch is built without CUDA"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert _extension._load_cuda(tmp_path) == "not built"
    (tmp_path / "_cuda.so").write_bytes(b"not a shared object")
    assert "_cuda.so" in (_extension._load_cuda(tmp_path) or "")


@requires.cpp_kernels
def test_kept_memory_is_released() -> None:
    release = _extension.function("release_memory")
    release()
    x, logits = torch.randn(4096, 8, 8), torch.randn(4096, 16)
    mk.gated_mixture(x, logits, mk.Routing.mmoe(8, 2))
    trunk, rows = mk.nn.MMoE(64, 2, (64, 64), num_experts=4), torch.randn(512, 64)
    with torch.no_grad():
        before = [trunk(rows)[0].clone() for _ in range(3)]  # the pool has blocks from the second call on
        assert release() > 0 and release() == 0
        assert all(torch.equal(y, trunk(rows)[0]) for y in before)


@requires.cpp_kernels
def test_the_choice_of_an_instruction_set_ends_with_the_block() -> None:
    best = _extension.instruction_sets()[-1]
    with _extension.instruction_set("baseline"):
        assert _extension.build_facts()["runs as"] == "baseline"
    assert _extension.build_facts()["runs as"] == best


@requires.cpp_kernels
def test_an_unknown_instruction_set() -> None:
    with pytest.raises(ValueError, match="name must be one of .* got 'mmx'"), _extension.instruction_set("mmx"):
        pass


@pytest.fixture
def asked_again() -> Iterator[None]:
    """What GPUs are is forgotten, before and after."""
    _backends._is_old_once.cache_clear()
    yield
    _backends._is_old_once.cache_clear()


@pytest.mark.parametrize(
    ("major", "hip", "old"), [(7, None, True), (8, None, False), (12, None, False), (9, "6.2", True)]
)
def test_old_gpus_run_the_reference(
    with_cuda: None,
    asked_again: None,
    major: int,
    hip: str | None,
    old: bool,
    case: Case,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They have no machine code of the CUDA kernels, and Triton's would spill on them; nor do AMD's have any."""
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda gpu: types.SimpleNamespace(major=major))
    monkeypatch.setattr(_backends, "has_triton", lambda: True)
    monkeypatch.setattr(_backends, "triton_implementation", lambda op, direction: f"triton {direction}")
    grads = [torch.ones(2)] * 3
    reference = _backends.reference_implementation
    found = _backends.cuda_implementation("pcgrad", "combine", (grads, 3, torch.ones(3, dtype=torch.float64)))
    assert (found is reference("pcgrad", "combine")) == old
    level = _backends.cuda_implementation("level", "forward", ([torch.ones(2, 2)],))
    assert level is reference("level", "forward") if old else level == "triton forward"
    assert mk.backends()["expert_mixture"]["cuda"] == (("reference",) if old else ("triton", "reference"))
    assert mk.backends()["pcgrad"]["cuda"] == (("reference",) if old else ("cuda", "triton", "reference"))
    assert _backends.fast("level", "cuda", torch.float32) != old
    if old:
        assert "compute capability 8.0" in _diagnosis.no_kernels("cuda", torch.float32)


def test_a_gpu_that_cannot_be_asked_is_not_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch raises in a child of a fork; what runs on the CPU there goes on."""

    def refuse(gpu: object) -> None:
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", refuse)
    assert not _backends.is_old()
    assert mk.backends()["expert_mixture"]["other"] == ("reference",)


def test_blocks_of_two_threads_that_overlap() -> None:
    """The last to enter has chosen; when both have ended, nobody has."""
    entered, go_on = threading.Event(), threading.Event()

    def first() -> None:
        with mk.use_backend("reference"):
            entered.set()
            go_on.wait(60)

    thread = threading.Thread(target=first)
    thread.start()
    assert entered.wait(60)
    with mk.use_backend("cpp"):
        go_on.set()
        thread.join()
        assert _backends.forced() == "cpp"
    assert _backends.forced() is None


def test_an_interrupt_at_the_beginning_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves no choice behind that nobody could take back."""

    class Lock:
        interrupts = 1

        def __enter__(self) -> None:
            pass

        def __exit__(self, *_: object) -> None:
            if self.interrupts:
                self.interrupts -= 1
                raise KeyboardInterrupt

    monkeypatch.setattr(_backends, "_choosing", Lock())
    with pytest.raises(KeyboardInterrupt), mk.use_backend("reference"):
        pytest.fail("the block must not run")
    assert _backends.forced() is None


def test_blocks_of_one_name_within_each_other() -> None:
    with mk.use_backend("reference"):
        with mk.use_backend("reference"):
            pass
        assert _backends.forced() == "reference"
    assert _backends.forced() is None
