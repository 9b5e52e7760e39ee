"""Sub-network routing: the routes between two levels, with a growing share of them open.

Workloads (``open`` routes to each of the outputs, ``B`` rows):

- **D** SNR-Trans, 8 sub-networks below and 8 above, D=256, B=4096; 1, 2, 4 and 8 of the 8 routes to an output open.
- **D-aver** SNR-Aver of the same sizes.

z is a clamped parameter, as hard concrete makes it: the gradient of a closed route's is zero. Forward is under
``torch.inference_mode()``; training is forward and backward with the gradients of u, the weights and the parameter of
z. Arithmetic and traffic that a row needs are those of its open routes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import mtlkernels as mk
from benchmarks.harness.case import BASELINE, FORWARD, OURS, TRAINING, Bench, Case, Contender, Curve, Step, Suite
from benchmarks.harness.work import Work, by_row
from benchmarks.peers.routes import Routes, along, folded, fused, loops, of_open

OPEN = (1, 2, 4, 8)
# Contenders that leave closed routes out, as we do; the others multiply along all of them.
OPEN_ALONE, OPEN_ALONE_COMPILED = "folded-open", "folded-open-compile"
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class RouteShape:
    """Sizes of two levels and the routes between them."""

    rows: int = 4096
    below: int = 8
    above: int = 8
    width: int = 256
    trans: bool = True

    def work(self, open_routes: int, itemsize: int, training: bool) -> Work:
        """A multiply-add for each weight (or feature) of an open route; u, outputs and open weights have to move."""
        products = self.above * open_routes * self.width * (self.width if self.trans else 1)
        features = (self.below + self.above) * self.width
        return by_row(self.rows, products, products if self.trans else 0, features, itemsize, training)


# The gradient of SNR-Aver's z is a sum of a million products, which a GEMM adds nearly one after another.
AVER_SLACK = 4.0


class RouteStep:
    """Forward, or forward and backward when there are cotangents."""

    def __init__(
        self,
        routes: Routes,
        u: Sequence[Tensor],
        weight: Tensor | None,
        raw: Tensor,
        cotangents: Sequence[Tensor] | None,
    ) -> None:
        def leaf(tensor: Tensor) -> Tensor:
            return tensor.detach().clone().requires_grad_(cotangents is not None)

        self.routes = routes
        self.u = [leaf(x) for x in u]
        self.weight = None if weight is None else leaf(weight)
        self.raw = leaf(raw)
        self.cotangents = cotangents
        self.outputs: tuple[Tensor, ...] = ()

    def forget(self) -> None:
        self.outputs = ()
        for tensor in (*self.u, self.weight, self.raw):
            if self.cotangents is not None and tensor is not None:
                tensor.grad = None

    def __call__(self) -> None:
        self.forget()
        if self.cotangents is None:
            with torch.inference_mode():
                self.outputs = self.routes(self.u, self.weight, self.raw.clamp(0, 1))
            return
        outputs = self.routes(self.u, self.weight, self.raw.clamp(0, 1))
        torch.autograd.backward(outputs, list(self.cotangents))
        self.outputs = tuple(v.detach() for v in outputs)

    def results(self) -> Mapping[str, Tensor]:
        found = {f"outputs: {i}": v for i, v in enumerate(self.outputs)}
        if self.cotangents is not None:
            # Whoever leaves closed routes out gives none to an input that has no other; that stands for zeros.
            found["gradients: u"] = torch.stack([torch.zeros_like(x) if x.grad is None else x.grad for x in self.u])
            found["gradients: z"] = _grad(self.raw)
            if self.weight is not None:
                found["gradients: weight"] = _grad(self.weight)
        return found


def _grad(tensor: Tensor) -> Tensor:
    if tensor.grad is None:
        raise ValueError(f"a tensor of shape {list(tensor.shape)} got no gradient")
    return tensor.grad


def build(shape: RouteShape, open_routes: int, dtype: torch.dtype, training: bool, device: torch.device) -> Bench:
    """Parameters, inputs and cotangents from a fixed seed, and everybody who evaluates them."""
    torch.manual_seed(0)
    u = [torch.randn(shape.rows, shape.width).to(dtype).to(device) for _ in range(shape.below)]
    weight = None
    if shape.trans:
        scale = (shape.below * shape.width) ** -0.5
        weight = (scale * torch.randn(shape.above, shape.below, shape.width, shape.width)).to(dtype).to(device)
    raw = torch.full((shape.above, shape.below), -0.25)
    for row in raw:
        chosen = torch.randperm(shape.below)[:open_routes]
        row[chosen] = torch.rand(len(chosen)) * 0.75 + 0.125
    raw = raw.to(dtype).to(device)
    cotangents = None
    if training:
        cotangents = [torch.randn(shape.rows, shape.width).to(dtype).to(device) for _ in range(shape.above)]

    def contender(name: str, label: str, routes: Callable[[], Routes]) -> Contender:
        def step() -> Step:
            return RouteStep(routes(), u, weight, raw, cotangents)

        return Contender(name, label, step)

    def expected() -> Mapping[str, Tensor]:
        wide = None if cotangents is None else [c.double() for c in cotangents]
        step = RouteStep(
            loops, [x.double() for x in u], None if weight is None else weight.double(), raw.double(), wide
        )
        step()
        return step.results()

    backend = mk.backends()["snr_trans" if shape.trans else "snr_aver"][device.type][0]
    return Bench(
        [
            contender(BASELINE, "a product a route, eager", lambda: loops),
            contender("compile", "a product a route, torch.compile", lambda: torch.compile(loops, dynamic=False)),
            contender("folded", "z folded, one product an output", lambda: folded),
            contender(OPEN_ALONE, "z folded, open routes alone", lambda: of_open(along)),
            contender(
                OPEN_ALONE_COMPILED,
                "z folded, open routes alone, torch.compile",
                lambda: of_open(torch.compile(along, dynamic=False)),
            ),
            contender(OURS, f"mtlkernels ({backend})", lambda: fused),
        ],
        expected,
        slack=1.0 if shape.trans else AVER_SLACK,
    )


def case(
    workload: str, shape: RouteShape, open_routes: int, dtype: torch.dtype, training: bool, *, quick: bool
) -> Case:
    """A row of the table."""
    needed = shape.work(open_routes, dtype.itemsize, training)
    return Case(
        workload=workload,
        work=TRAINING if training else FORWARD,
        dtype=dtype,
        size={"B": shape.rows, "open": open_routes},
        flop=needed.flop,
        traffic=needed.traffic,
        build=lambda device: build(shape, open_routes, dtype, training, device),
        quick=quick,
    )


def cases(device_type: str) -> Iterator[Case]:
    """Every row, the same ones on every device."""
    for workload, shape in (("D", RouteShape()), ("D-aver", RouteShape(trans=False))):
        for training in (False, True):
            for dtype in DTYPES:
                for open_routes in OPEN:
                    quick = open_routes == 4 and dtype == torch.float32 and not training
                    yield case(workload, shape, open_routes, dtype, training, quick=quick)


SUITE = Suite(
    name="snr",
    title="Sub-network routing",
    cases=cases,
    curves=(
        Curve("open", "SNR-Trans (workload D), forward", "open", ("D",), FORWARD),
        Curve("open-training", "SNR-Trans (workload D), forward and backward", "open", ("D",), TRAINING),
    ),
)
