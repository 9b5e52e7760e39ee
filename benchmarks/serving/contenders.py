"""Who serves: each makes of modules in evaluation a function of an input.

Every load has batches of one number of rows, and whoever gains by knowing it does: torch.compile and the runtimes are
made for each number anew (a runtime's file is exported once, for any number, and then given its static shape). Results
of before that have the runtimes with dynamic shapes; rows that say ``STATIC`` under ``runtimes`` are told apart.
"""

from __future__ import annotations

import functools
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import mtlkernels as mk
from benchmarks.serving.models import MODELS, Model

# Rows in, outputs; what is timed.
Serve = Callable[[Tensor], Any]
# The dimension's name in exported models.
ROWS = "rows"
# What a row of results says of its runtimes.
STATIC = "static shapes"


@dataclass(frozen=True)
class Load:
    """Requests at a time, and the threads that each may take."""

    threads: int
    clients: int = 1


@dataclass(frozen=True)
class Contender:
    """``make(model, source, x, load)``, for inputs like ``x``.

    ``compiles``: anew for each number of rows, which takes so long that only latency on all threads is measured.
    ``static``: is made for each number of rows too, but in little time.
    """

    label: str
    make: Callable[[Model, nn.Module, Tensor, Load], Serve]
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    models: tuple[str, ...] = tuple(MODELS)
    compiles: bool = False
    static: bool = False

    @property
    def anew(self) -> bool:
        """Whether what was made serves no other number of rows."""
        return self.compiles or self.static


def _inference(module: Any) -> Serve:
    def serve(x: Tensor) -> Any:
        with torch.inference_mode():
            return module(x)

    return serve


def _eager(model: Model, source: nn.Module, x: Tensor, load: Load) -> Serve:
    return _inference(source)


def _compiled(model: Model, source: nn.Module, x: Tensor, load: Load) -> Serve:
    return _inference(torch.compile(source, dynamic=False))


def _frozen(model: Model, source: nn.Module, x: Tensor, load: Load) -> Serve:
    from torch._inductor import config

    config.freezing = True
    run = torch.compile(source, dynamic=False, mode="max-autotune")

    def serve(x: Tensor) -> Any:
        with torch.no_grad():
            return run(x)

    return serve


def _onnxruntime(model: Model, source: nn.Module, x: Tensor, load: Load) -> Serve:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = load.threads, 1
    options.add_free_dimension_override_by_name(ROWS, len(x))
    file = _onnx(model, next(source.parameters()).dtype)
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x.numpy()})


@functools.cache
def _onnx(model: Model, dtype: torch.dtype) -> bytes:
    """A file for any number of rows, in float32 with weights of ``dtype``; kept, as an export takes many seconds."""
    source = model.modules().to(dtype).float()
    rows = torch.export.Dim(ROWS, min=2, max=1 << 20)
    program = torch.onnx.export(source, (model.rows(2),), dynamo=True, dynamic_shapes=({0: rows},), verbose=False)
    assert program is not None
    file: bytes = program.model_proto.SerializeToString()
    return file


def _openvino(model: Model, source: nn.Module, x: Tensor, load: Load) -> Serve:
    import openvino

    dtype = next(source.parameters()).dtype
    core = openvino.Core()
    network = core.read_model(_onnx(model, dtype))
    network.reshape(list(x.shape))
    hints = {
        "INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32",
        "INFERENCE_NUM_THREADS": load.threads * load.clients,
        "NUM_STREAMS": load.clients,
    }
    compiled = core.compile_model(network, "CPU", hints)
    local = threading.local()  # a request serves one thread at a time

    def serve(x: Tensor) -> Sequence[Any]:
        request = getattr(local, "request", None)
        if request is None:
            request = local.request = compiled.create_infer_request()
        found = request.infer([x.numpy()], share_inputs=True, share_outputs=True)
        return [found[port] for port in compiled.outputs]

    return serve


def _packaged(model: Model, source: nn.Module, x: Tensor, load: Load) -> Serve:
    """By AOTInductor, once for any number of rows; what is made of weights alone is made when it is loaded."""
    rows = torch.export.Dim(ROWS, min=1)
    example = x if len(x) > 1 else torch.cat([x, x])  # torch.export takes a size of one for a constant
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        program = torch.export.export(source, (example,), dynamic_shapes=({0: rows},))
        once = {"aot_inductor.use_runtime_constant_folding": True}
        path = f"{folder}/model.pt2"
        torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=once)
        serve: Serve = torch._inductor.package.load_package(path, num_runners=load.clients)
    return serve


def _ours(model: Model, source: nn.Module, x: Tensor, load: Load) -> Serve:
    return _inference(model.fused(source))


def _ours_compiled(model: Model, source: nn.Module, x: Tensor, load: Load) -> Serve:
    return _inference(torch.compile(model.fused(source), dynamic=False))


def _ours_packaged(model: Model, source: nn.Module, x: Tensor, load: Load) -> Serve:
    return _packaged(model, model.fused(source), x, load)


def _prepared(model: Model, source: nn.Module, x: Tensor, load: Load) -> Serve:
    return _inference(mk.prepare(model.fused(source)))


OURS, PREPARED, PACKAGED, BASELINE = "ours", "prepared", "ours-packaged", "eager"
# What is held against the runtimes: the model as it is, and packaged. A prepared or compiled one is shown beside them.
OWN = (OURS, PACKAGED)
CONTENDERS: Mapping[str, Contender] = {
    BASELINE: Contender("modules, eager", _eager),
    "compile": Contender("modules, torch.compile", _compiled, compiles=True),
    "frozen": Contender("modules, torch.compile, frozen, max-autotune", _frozen, compiles=True),
    "packaged": Contender("modules, packaged by AOTInductor", _packaged, models=("rechub",)),
    "onnxruntime": Contender("ONNX Runtime", _onnxruntime, dtypes=("float32",), static=True),
    "openvino": Contender("OpenVINO", _openvino, static=True),
    OURS: Contender("mtlkernels", _ours),
    PREPARED: Contender("mtlkernels, a copy by mk.prepare", _prepared),
    "ours-compiled": Contender(
        "mtlkernels, torch.compile around it", _ours_compiled, models=("rechub",), compiles=True
    ),
    PACKAGED: Contender("mtlkernels, packaged by AOTInductor", _ours_packaged, models=("rechub",)),
}
# Their functions take float32 whatever the model multiplies in.
RUNTIMES = ("onnxruntime", "openvino")


def versions() -> dict[str, str]:
    """Of the runtimes; "absent" where one is not installed."""
    import importlib.metadata

    found = {}
    for name in RUNTIMES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found
