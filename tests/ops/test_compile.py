"""torch.compile and torch.export of what calls the ops."""

from __future__ import annotations

import copy
import itertools
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtlkernels as mk
from mtlkernels import _torch
from mtlkernels.testing import CaseFactory, evaluate
from tests import requires
from tests.ops.agreement import assert_as_exact

pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    # torch._dynamo makes an instance of each autograd.Function that it traces, and torch warns of that.
    pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning"),
    # torch.export copies its tree specs by a class that torch deprecates.
    pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning"),
    # torch._inductor imports modules that still use TorchScript.
    pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning"),
]

ROUTING = mk.Routing.cgc(2, 1, 1, shared_gate=True)


class Level(nn.Module):
    """Two experts a task, one of them shared, each with parameters of its own, and gates of one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.ModuleList([nn.Linear(6, 8), nn.Linear(8, 5)]) for _ in range(3))
        self.gate = nn.Linear(6, 7)

    def forward(self, x: Tensor) -> Tensor:
        weights = [[expert[layer].weight for expert in self.experts] for layer in range(2)]
        biases = [[expert[layer].bias for expert in self.experts] for layer in range(2)]
        outputs = mk.expert_mixture([x, x, x], weights, biases, self.gate(x), ROUTING, activation=["silu", "none"])
        mixed = mk.gated_mixture(torch.stack(outputs, 1), [self.gate(x)[:, :3]], mk.Routing.mmoe(3, 1))
        return torch.cat([*outputs, *mixed], 1)


def gradients(module: nn.Module, function: Any, x: Tensor) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    y = function(leaf)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return [y, *torch.autograd.grad(y.square().sum(), [leaf, *trained])]


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_forward_and_backward_without_a_graph_break(compiler: str) -> None:
    module = Level()
    x = torch.randn(9, 6)
    compiled = torch.compile(module, fullgraph=True, backend=compiler)
    torch.testing.assert_close(gradients(module, compiled, x), gradients(module, module, x))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.parametrize("wants_gradient", [True, False])
def test_a_dynamic_batch_is_compiled_once(wants_gradient: bool) -> None:
    module = Level().requires_grad_(wants_gradient)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    compiled(torch.randn(9, 6))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (2, 33, 260):
            x = torch.randn(rows, 6)
            torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.parametrize("op, make", [(mk.gated_mixture, "gated_mixture"), (mk.expert_mixture, "expert_mixture")])
def test_the_functions_themselves(op: Any, make: str) -> None:
    """Every leaf a gradient, an expert without a gate, a stream that nobody reads."""
    routing = mk.Routing((0, 2, 0), ((2, 0), (0,)))
    factory = CaseFactory(0, torch.float32)
    size = 4 if make == "gated_mixture" else [4, 3]
    case = getattr(factory, make)(7, size, routing)
    got = evaluate(torch.compile(op, fullgraph=True, backend="aot_eager"), case)
    torch.testing.assert_close(got, evaluate(op, case))


def test_mistakes_are_found_while_compiling() -> None:
    compiled = torch.compile(mk.gated_mixture, backend="aot_eager")
    with pytest.raises(Exception, match=r"experts .*\[B, 3, H\].*, got \[4, 2, 5\]"):
        compiled(torch.randn(4, 2, 5), torch.randn(4, 3), mk.Routing.mmoe(3, 1))


def test_func_transforms_inside_compile() -> None:
    routing = mk.Routing.mmoe(2, 2)
    x, w, logits = torch.randn(5, 4), torch.randn(2, 3, 4), torch.randn(5, 4)

    def loss(w: Tensor, x: Tensor, logits: Tensor) -> Tensor:
        return sum(y.square().sum() for y in mk.expert_mixture(x, [w], None, logits, routing, activation="tanh"))

    def batched(x: Tensor, logits: Tensor) -> Tensor:
        return torch.func.vmap(lambda x, logits: loss(w, x[None], logits[None]))(x, logits)

    for function, arguments in ((torch.func.grad(loss), (w, x, logits)), (batched, (x, logits))):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*arguments), function(*arguments))


def _mixture(w: Tensor, x: Tensor, logits: Tensor) -> Any:
    return mk.expert_mixture(x, [w], None, logits, mk.Routing.mmoe(2, 2), activation="tanh")


def _gates(experts: Tensor, first: Tensor, second: Tensor) -> Any:
    return mk.gated_mixture(experts, [first, second], mk.Routing.mmoe(3, 2))


def _trans(u: Tensor, weight: Tensor, z: Tensor) -> Any:
    return mk.snr_trans(u, weight, z)


def _aver(u: Tensor, z: Tensor) -> Any:
    return mk.snr_aver(u, z)


def _surgery(grads: Tensor) -> Any:
    return [mk.pcgrad(grads, order=torch.tensor([[1, 2], [2, 0], [0, 1]]))]


INSIDE = [
    (_mixture, ((2, 3, 4), (5, 4), (5, 4))),
    (_gates, ((5, 3, 4), (5, 3), (5, 3))),
    (_trans, ((2, 5, 4), (3, 2, 6, 4), (3, 2))),
    (_aver, ((2, 5, 4), (3, 2))),
    (_surgery, ((3, 10),)),
]


# Every function under "grad", and under one of the others, which the compiler sees through alike.
@pytest.mark.parametrize(
    "function, shapes, transform",
    [
        *((*each, "grad") for each in INSIDE),
        *((*each, other) for each, other in zip(INSIDE, itertools.cycle(["vmap of grad", "jacrev", "vmap"]))),  # noqa: B905
    ],
)
def test_torch_func_inside_compile(function: Any, shapes: Any, transform: str) -> None:
    """Gradients of each argument alone, and of all; tensors do not say there whether a gradient is wanted.

    Other transforms than that are tried of the first argument, and of all.
    """

    def loss(*args: Tensor) -> Tensor:
        return sum(y.square().sum() for y in function(*args))

    args = tuple(torch.randn(shape) for shape in shapes)
    alone = len(args) if transform == "grad" else 1
    for argnums in (*range(alone), tuple(range(len(args)))):
        if transform == "grad":
            transformed: Any = torch.func.grad(loss, argnums)
        elif transform == "jacrev":
            transformed = torch.func.jacrev(lambda *a: function(*a)[0], argnums)
        else:
            inner = torch.func.grad(loss, argnums) if "grad" in transform else loss
            batched = {argnums} if isinstance(argnums, int) else set(argnums)
            transformed = torch.func.vmap(inner, tuple(0 if i in batched else None for i in range(len(args))))
            args = tuple(torch.randn((2, *shape) if i in batched else shape) for i, shape in enumerate(shapes))
        compiled = torch.compile(transformed, fullgraph=True, backend="aot_eager")
        exact = transformed(*(a.double() for a in args))
        assert_as_exact(compiled(*args), exact, transformed(*args))
        torch.compiler.reset()


@requires.cpp_kernels
def test_torch_func_inside_compile_substitutes_nothing_silently() -> None:
    with mk.use_backend("cpp"), pytest.raises(Exception, match="only the reference for torch.func transforms"):
        torch.compile(torch.func.grad(lambda *a: _gates(*a)[0].sum()), fullgraph=True, backend="aot_eager")(
            torch.randn(5, 3, 4), torch.randn(5, 3), torch.randn(5, 3)
        )


def test_autocast_inside_compile() -> None:
    module = Level()
    x = torch.randn(9, 6)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return module(x)

    def eager(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return module(x)

    got, expected = gradients(module, compiled, x), gradients(module, eager, x)
    assert [t.dtype for t in got] == [t.dtype for t in expected] == [torch.bfloat16] + [torch.float32] * 15
    wide = copy.deepcopy(module).double()
    assert_as_exact(got, gradients(wide, wide, x.double()), expected)


def test_use_backend_is_guarded() -> None:
    """Compiled code does not go on with the implementation that it was compiled for."""
    x, logits, routing = torch.randn(4, 2, 5), torch.randn(4, 2), mk.Routing.mmoe(2, 1)
    compiled = torch.compile(mk.gated_mixture, backend="aot_eager")
    with torch.no_grad():
        with mk.use_backend("reference"):
            first = compiled(x, logits, routing)
        second = compiled(x, logits, routing)
    torch.testing.assert_close(first, second)
    missing = "triton" if "triton" not in mk.backends()["gated_mixture"]["cpu"] else "cpp"
    with mk.use_backend(missing), pytest.raises(Exception, match=f"no '{missing}' implementation"):
        compiled(x, logits, routing)


@pytest.mark.parametrize("training", [True, False])
def test_export_with_a_dynamic_batch(training: bool) -> None:
    module = Level().train(training)
    x = torch.randn(9, 6)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("rows", min=2, max=4096)},))
    names = {str(node.target) for node in program.graph.nodes}
    assert "mtlkernels.level_forward.default" in names
    for rows in (2, 9, 300):
        x = torch.randn(rows, 6)
        torch.testing.assert_close(program.module()(x), module(x))


@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")  # inside torch.export.load of 2.12
def test_exported_program_decomposes_saves_and_loads(tmp_path: Any) -> None:
    module = Level().eval()
    x = torch.randn(9, 6)
    program = torch.export.export(module, (x,)).run_decompositions()
    torch.export.save(program, tmp_path / "level.pt2")
    loaded = torch.export.load(tmp_path / "level.pt2")
    torch.testing.assert_close(loaded.module()(x), module(x))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("budget", [0.5, 1.0])
def test_dropout_under_a_memory_budget(budget: float, compiler: str) -> None:
    """Linear but for dropout: the gradient of each weight and the weight have the output as their product."""
    model = mk.nn.MMoE(6, 1, (8, 5), num_experts=1, activation="none", dropout=0.5)
    for linear in model.level.experts[0].linears:
        nn.init.zeros_(linear.bias)
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    x = torch.randn(40, 6)

    def products() -> Tensor:
        loss = compiled(x)[0].square().sum()
        weights = [linear.weight for linear in model.level.experts[0].linears]
        grads = torch.autograd.grad(loss, weights)
        return torch.stack([(weight * grad).sum() / (2 * loss) for weight, grad in zip(weights, grads, strict=True)])

    with torch._functorch.config.patch(activation_memory_budget=budget):
        if budget < 1:
            with pytest.raises(Exception, match="dropout: expected an activation_memory_budget of 1"):
                products()
            with torch.no_grad():
                compiled(x)
            compiled.eval()
        torch.testing.assert_close(products(), torch.ones(2))


@pytest.mark.parametrize("compiler", ["aot_eager_decomp_partition", "inductor"])
@pytest.mark.parametrize("budget", [0.5, 1.0])
def test_noise_under_a_memory_budget(budget: float, compiler: str) -> None:
    """What the backward pass computes again is not drawn again: gradients are those of the coding that was used."""
    model: Any = mk.nn.SNR(6, 1, [5], [1])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()
    x = torch.rand(40, 6)
    compiled = torch.compile(model, backend=compiler)
    weight = model.joints[0].weight
    with torch._functorch.config.patch(activation_memory_budget=budget):
        for _ in range(5):
            loss = compiled(x)[0].square().sum()
            (grad,) = torch.autograd.grad(loss, [weight])
            torch.testing.assert_close((weight * grad).sum(), 2 * loss)


class Everything(nn.Module):
    """Every kind of op in one model; of SNR what it computes without noise, so that two runs agree."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher, self.levels = (mk.nn.MMoE(6, 3, (5,), num_experts=2) for _ in range(2))
        self.teacher.requires_grad_(False)
        self.gates = nn.Linear(6, 6)
        self.norms = mk.nn.MMoE(10, 2, (5,), num_experts=2, batch_norm=True)
        self.routes = nn.ModuleList(mk.nn.SNR(10, 2, [5], [2], mode=mode).eval() for mode in ("trans", "aver"))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            taught = self.teacher(x)
        experts = torch.stack(self.levels(x), 1)
        mixed = mk.gated_mixture(experts, self.gates(x), mk.Routing.mmoe(3, 2))
        normal = torch.cat(self.norms(torch.cat(mixed, 1)), 1)
        return torch.cat([*taught, *(y for routes in self.routes for y in routes(normal))], 1)


def test_calls_from_cpp() -> None:
    """Inductor's C++ wrapper calls operators that return one list, and none that return several."""
    module, x = Everything(), torch.randn(40, 6)
    compiled = torch.compile(module, fullgraph=True)
    with torch._inductor.config.patch(cpp_wrapper=True):
        torch.testing.assert_close(gradients(module, compiled, x), gradients(module, module, x))


def test_one_tensor_from_cpp() -> None:
    """In a list, which PyTorch before 2.14 takes for the tensor, so that the process would end."""
    compiled = torch.compile(lambda u, z: mk.snr_aver(u, z)[0], fullgraph=True)
    u, z = torch.randn(2, 5, 4), torch.rand(1, 2)
    refusal = pytest.raises(Exception, match="snr_aver_forward: expected to return more than one tensor")
    with refusal if _torch.VERSION < (2, 14) else nullcontext(), torch._inductor.config.patch(cpp_wrapper=True):
        torch.testing.assert_close(compiled(u, z), mk.snr_aver(u, z)[0])
