"""Levels with one value that is no ordinary number, by PyTorch's modules and fused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import mtlkernels as mk
from tests.ops.agreement import kinds
from tests.seeding import seed

# "large" has a square that is finite; "huge" has not, so that norms and products overflow at once.
ORDINARY = ("nan", "inf", "-inf", "large", "subnormal", "-0.0")
HUGE = ("huge", "-huge")
NORMS = ("none", "batch", "running", "layer")
# The last expert is read by one gate alone.
ROUTING = mk.Routing((0, 0, 0), ((0, 1, 2), (1, 0)))
# How far finite elements may be apart, in the tensor's largest finite magnitude. This is no budget: beside a value so
# large, or so small, PyTorch's own error tells little. How exact numbers are is tested without such values.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2, torch.float64: 1e-9}


class _GELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * (0.5 * (1 + torch.erf(wide * 0.5**0.5)))).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return torch.ops.aten.gelu_backward(grad, ctx.saved_tensors[0])


class GELU(nn.GELU):
    """PyTorch's, whose float32 kernels make NaN of +Inf in a vector, though Inf of one element; or by the formula."""

    by_formula = False

    def forward(self, x: Tensor) -> Any:
        return _GELU.apply(x) if self.by_formula else super().forward(x)


class Dice(nn.Module):
    """torch-rechub's, with a slope a channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        distance = x - x.mean(1, keepdim=True)
        gate = torch.sigmoid(distance / (distance.square() + 1e-3).sum(1, keepdim=True).sqrt())
        return gate * x + (1 - gate) * self.weight * x


ACTIVATIONS: dict[str, Any] = {
    "none": nn.Identity,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "gelu": GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "prelu": nn.PReLU,
    "dice": Dice,
}


def special(name: str, dtype: torch.dtype) -> float:
    """The number of that name."""
    info = torch.finfo(dtype)
    large = 64.0 if dtype == torch.float16 else info.max**0.5 / 1024
    named = {"huge": info.max, "-huge": -info.max, "large": large, "subnormal": info.smallest_normal / 4}
    return named[name] if name in named else float(name)


@dataclass(frozen=True)
class Style:
    """What a level is made of."""

    activation: str
    norm: str = "none"
    linear_gates: bool = False
    rows: int = 7
    widths: tuple[int, ...] = (5, 6, 4)
    # Outputs that have a gradient: with the first alone, one gate mixes each expert.
    used: int = 2


class Level(nn.Module):
    """Experts as ``nn.Sequential``, gates by softmax and sum."""

    def __init__(self, style: Style, dtype: torch.dtype) -> None:
        super().__init__()
        seed(0)
        self.style = style
        self.experts = nn.ModuleList([self._expert() for _ in range(ROUTING.num_experts)])
        self.gates = nn.ModuleList([nn.Linear(style.widths[0], len(gate)) for gate in ROUTING.gate_experts])
        self.x = nn.Parameter(torch.randn(style.rows, style.widths[0]))
        self.logits = nn.ParameterList([torch.randn(style.rows, len(gate)) for gate in ROUTING.gate_experts])
        self.upstream = [torch.randn(style.rows, style.widths[-1], dtype=dtype) for _ in ROUTING.gate_experts]
        self.to(dtype)

    def _expert(self) -> nn.Sequential:
        style = self.style
        parts: list[nn.Module] = []
        for inputs, outputs in zip(style.widths, style.widths[1:], strict=False):
            parts.append(nn.Linear(inputs, outputs))
            if style.norm != "none":
                norm: Any = nn.LayerNorm(outputs) if style.norm == "layer" else nn.BatchNorm1d(outputs)
                nn.init.normal_(norm.weight)
                nn.init.normal_(norm.bias)
                if style.norm == "running":
                    norm.running_mean.normal_()
                    norm.running_var.uniform_(0.5, 2)
                    norm.eval()
                parts.append(norm)
            with_slopes = style.activation in ("prelu", "dice")
            parts.append(ACTIVATIONS[style.activation](*([outputs] if with_slopes else [])))
        return nn.Sequential(*parts)

    def places(self) -> dict[str, Tensor]:
        """What may hold the value."""
        first = self.experts[0].state_dict(keep_vars=True)
        read = {f"expert.{name}": tensor for name, tensor in first.items() if tensor.dim()}
        if self.style.norm == "batch":  # nobody reads its running statistics
            read = {name: tensor for name, tensor in read.items() if "running" not in name}
        gates: dict[str, Tensor] = {"logits": self.logits[0]}
        if self.style.linear_gates:
            gates = {"gate.weight": self.gates[0].weight, "gate.bias": self.gates[0].bias}
        return {"x": self.x, "upstream": self.upstream[0], **read, **gates}

    def leaves(self) -> dict[str, Tensor]:
        unused = "logits" if self.style.linear_gates else "gates"
        return {name: p for name, p in self.named_parameters() if not name.startswith(unused)}

    def by_modules(self) -> list[Tensor]:
        outputs = torch.stack([expert(self.x) for expert in self.experts], 1)
        logits = [gate(self.x) for gate in self.gates] if self.style.linear_gates else self.logits
        mixed = zip(ROUTING.gate_experts, logits, strict=True)
        return [(own.softmax(1).unsqueeze(2) * outputs[:, list(gate)]).sum(1) for gate, own in mixed]

    def _parts(self, kinds: Any) -> list[list[Any]]:
        """The modules of those kinds, an entry a layer."""
        found = [[part for part in expert if isinstance(part, kinds)] for expert in self.experts]  # type: ignore[attr-defined]
        return [list(layer) for layer in zip(*found, strict=True)]

    def fused(self) -> list[Tensor]:
        linears, norms = self._parts(nn.Linear), self._parts((nn.BatchNorm1d, nn.LayerNorm))
        slopes = [[part.weight for part in layer] for layer in self._parts((nn.PReLU, Dice))]
        gates: dict[str, Any] = {}
        if self.style.linear_gates:
            gates = {"gate_weights": [g.weight for g in self.gates], "gate_biases": [g.bias for g in self.gates]}
        outputs = mk.expert_mixture(
            self.x,
            [[part.weight for part in layer] for layer in linears],
            [[part.bias for part in layer] for layer in linears],
            None if gates else list(self.logits),
            ROUTING,
            activation=self.style.activation,
            norms=norms or None,
            slopes=slopes or None,
            **gates,
        )
        return list(outputs)

    def results(self, fused: bool, grad: bool) -> dict[str, Tensor]:
        """Outputs and gradients by name; leaves the level as it was."""
        before = [buffer.clone() for buffer in self.buffers()]  # a batch norm's statistics
        with torch.set_grad_enabled(grad):
            outputs = self.fused() if fused else self.by_modules()
        found = {f"output {k}": y.detach() for k, y in enumerate(outputs)}
        if grad:
            leaves = self.leaves()
            used = slice(self.style.used)
            roots, upstream = outputs[used], self.upstream[used]
            grads = torch.autograd.grad(roots, list(leaves.values()), upstream, materialize_grads=True)
            found.update((f"gradient of {name}", g) for name, g in zip(leaves, grads, strict=True))
        for buffer, value in zip(self.buffers(), before, strict=True):
            buffer.copy_(value)
        return found

    def right_results(self, grad: bool) -> dict[str, list[Tensor]]:
        """By modules; of those that PyTorch evaluates in more than one way, each."""
        each = [self.results(False, grad)]
        for part in self.modules():
            if isinstance(part, GELU):
                part.by_formula = True
        if self.style.activation == "gelu":
            each.append(self.results(False, grad))
        for part in self.modules():
            if isinstance(part, GELU):
                part.by_formula = False
        return {name: [found[name] for found in each] for name in each[0]}


def _difference(name: str, got: Tensor, expected: Tensor, style: Style, value: str) -> str | None:
    tolerance = TOLERANCE[got.dtype]
    got, expected = got.double(), expected.double()
    found, right = kinds(got), kinds(expected)
    if style.norm != "none" and "inf" in value:
        # A norm subtracts sums and means, and the order of that decides whether an infinity stays one or becomes NaN.
        found, right = found != 0, right != 0
    if not torch.equal(found, right):
        at = tuple((found != right).nonzero()[0].tolist())
        return f"{name}{list(at)} is {got[at].item()}, PyTorch has {expected[at].item()}"
    if tolerance > 1e-3:  # rounded between any two modules, and on either side of a kink
        return None
    finite = expected.isfinite()
    got, expected = got[finite], expected[finite]
    if not expected.numel():
        return None
    scale = expected.abs().max().item()
    if style.norm != "none" and value in ("large", *HUGE):  # beside which a norm loses all other values to rounding
        return None
    if style.norm == "batch" and name.endswith("bias") and max(scale, got.abs().max().item()) < 1e-5:
        return None  # rounding errors on both sides: a constant does not move what a batch norm gives
    error = (got - expected).abs().max().item()
    return None if error <= tolerance * max(scale, 1e-2) else f"{name} is off by {error}, of {scale}"


def _agree(got: dict[str, Tensor], rights: dict[str, list[Tensor]]) -> bool:
    """Whether all tensors together are what the first of PyTorch's ways has, by the least that is asked of any."""
    found = torch.cat([tensor.flatten() for tensor in got.values()]).double()
    right = torch.cat([rights[name][0].flatten() for name in got]).double()
    finite = right.isfinite()
    error = (found[finite] - right[finite]).abs()
    return torch.equal(kinds(found), kinds(right)) and bool((error <= TOLERANCE[got["output 0"].dtype] * 1e-2).all())


def differences(
    style: Style,
    dtype: torch.dtype,
    values: tuple[str, ...],
    grads: tuple[bool, ...],
    places: tuple[str, ...] | None = None,
) -> Iterator[str]:
    """What is not as in PyTorch with each of the values in one element of each place."""
    level = Level(style, dtype)
    for place, tensor in level.places().items():
        if places is not None and place not in places:
            continue
        flat = tensor.data.view(-1)
        at = min(1, flat.numel() - 1)
        kept = flat[at].item()
        for value in values:
            if (
                "inf" in value
                and style.norm in ("batch", "running")
                and place in ("expert.1.weight", "expert.4.weight")
            ):
                continue  # an infinite scale: PyTorch's own formulas for CPUs and for GPUs disagree
            flat[at] = special(value, dtype)
            for grad in grads if place != "upstream" else [True] * any(grads):
                got = level.results(True, grad)
                rights = level.right_results(grad)
                if _agree(got, rights):
                    continue
                for name, right in rights.items():
                    found = [_difference(name, got[name], expected, style, value) for expected in right]
                    if all(found):
                        yield f"{style}, {value} in {place}, grad={grad}: {found[0]}"
        flat[at] = kept
