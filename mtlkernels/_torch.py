"""The private parts of PyTorch that this package uses, each under a name of its own: nothing else may name them.

``tests/test_private_torch.py`` says which of them a version of PyTorch no longer has.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

# pyright: reportAttributeAccessIssue=false
import torch
import torch._functorch.config as functorch_config
import torch.fx.experimental.proxy_tensor
import torch.utils._device
from torch import Tensor
from torch.utils import _pytree as pytree

VERSION = tuple(map(int, torch.__version__.split(".")[:2]))
tree_flatten, tree_unflatten, tree_map = pytree.tree_flatten, pytree.tree_unflatten, pytree.tree_map
# Transforms of torch.func.
func_transforms_active = torch._C._are_functorch_transforms_active
is_func_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
unwrap_dead_wrappers = torch._functorch.utils.unwrap_dead_wrappers
# vmap of torch.autograd.grad(..., is_grads_batched=True), which is not torch.func's.
is_legacy_batched_tensor = torch._C._functorch.is_legacy_batchedtensor
remove_batch_dim = torch._remove_batch_dim
add_batch_dim = torch._add_batch_dim
_MOST_LEVELS = 64  # of vmap, in PyTorch
# Stand-ins for tensors while the compiler and torch.export trace.
TRACED = (torch._subclasses.FakeTensor, torch._subclasses.functional_tensor.FunctionalTensor)
# What torch.export hands out for modules where a model has one of them, whichever, at two places: of a subclass of the
# module's class, with the module's own __dict__. Nothing is an instance of () where PyTorch does without.
_STAND_INS: Any = getattr(torch.fx.experimental.proxy_tensor, "_AttrProxy", ())
# Who looks on while a call is made.
GLOBAL_HOOKS = (
    torch.nn.modules.module._global_forward_hooks,
    torch.nn.modules.module._global_forward_pre_hooks,
    torch.nn.modules.module._global_backward_hooks,
    torch.nn.modules.module._global_backward_pre_hooks,
)
is_jit_tracing = torch._C._is_tracing
is_fx_symbolic_tracing = torch.fx._symbolic_trace.is_fx_symbolic_tracing
function_stack_length = torch._C._len_torch_function_stack
function_mode_at = torch._C._get_function_stack_at
dispatch_mode_at = torch._C._get_dispatch_stack_at
DefaultDevice = torch.utils._device.DeviceContext
# The dispatcher.
dispatch_stack_length = torch._C._len_torch_dispatch_stack
below_autograd = torch._C._AutoDispatchBelowAutograd
_is_excluded, _AUTOGRAD = torch._C._dispatch_tls_is_dispatch_key_excluded, torch._C.DispatchKey.AutogradFunctionality
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
AFTER_AUTOGRAD_KEYS = torch._C._after_autograd_keyset


def compiling() -> bool:
    """Whether this thread compiles or exports. PyTorch's own answer is of all threads while one exports or compiles."""
    return torch.compiler.is_compiling() and (torch.compiler.is_dynamo_compiling() or dispatch_stack_length() > 0)


def exporting() -> bool:
    """Whether this thread exports.

    By the flag itself, as ``is_exporting()`` is True for the compiler of PyTorch 2.10 wherever it compiles.
    """
    return compiling() and torch.compiler._is_exporting_flag


def memory_budget(tensors: Sequence[Tensor] = ()) -> float:
    """Below 1 where a backward pass that is compiled now computes again what it has no memory for.

    In an operator only its ``tensors`` show that PyTorch 2.10 traces it.
    """
    traced = compiling() or any(isinstance(tensor, TRACED) for tensor in tensors)
    return float(functorch_config.activation_memory_budget) if traced else 1.0


def lowers_for_cpp_wrapper() -> bool:
    """Whether Inductor lowers a graph now that its ``cpp_wrapper`` calls, and not one for a package."""
    virtualized = sys.modules.get("torch._inductor.virtualized")
    graph: Any = None if virtualized is None else virtualized.V.graph
    return getattr(graph, "cpp_wrapper", False) and not graph.aot_mode


def records_gradients() -> bool:
    """Whether what is done with tensors that want gradients is recorded.

    Below autograd it is not, whether gradients are switched on or not: in the kernels of custom operators and within
    ``torch.inference_mode``. The compiler cannot ask.
    """
    return torch.is_grad_enabled() and (compiling() or not _is_excluded(_AUTOGRAD))


def unproxied(module: Any) -> Any:
    """The module for which ``torch.export`` has handed out a stand-in, anything else as it is.

    It is for reading. To be called take the stand-in, which knows by which path it was found: programs keep that path.
    """
    return module.get_base() if isinstance(module, _STAND_INS) else module


def all_unproxied(modules: list[Any]) -> list[Any]:
    """:func:`unproxied` of each, at once where nothing is exported."""
    return [unproxied(module) for module in modules] if compiling() else modules


def class_of(module: Any) -> Any:
    """The class of a module, or of that for which ``torch.export`` has handed out a stand-in."""
    return type(unproxied(module))


def class_teller() -> Callable[[Any], Any]:
    """:func:`class_of`, or what does the same faster where nothing is exported."""
    return class_of if compiling() else type


_find_schema = torch._C._dispatch_find_schema_or_throw
_forward_ad = torch.autograd.forward_ad


def has_schema(operator: str) -> bool:
    """Whether somebody has defined an operator, which may have kernels before it is."""
    try:
        _find_schema(operator, "")
    except RuntimeError:
        return False
    return True


def in_dual_level() -> bool:
    """Whether tensors may carry tangents: within ``torch.autograd.forward_ad.dual_level``, and forward transforms."""
    return _forward_ad._current_level >= 0


def legacy_vmap_level(tensors: Sequence[Tensor]) -> int:
    """The number of the innermost level of ``is_grads_batched`` that batches any of some tensors; one of them does.

    PyTorch counts levels by thread, and runs the backward passes of GPUs in threads of their own, which know of none.
    """
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    levels = range(level or _MOST_LEVELS, 0, -1)
    return next(level for level in levels if any(has_legacy_level(tensor, level) for tensor in tensors))


def has_legacy_level(tensor: Tensor, level: int) -> bool:
    """Whether that level of ``is_grads_batched`` batches a tensor: for another one an empty dimension is put in."""
    return is_legacy_batched_tensor(tensor) and remove_batch_dim(tensor, level, 0, 0).shape[0] > 0


def is_vmapped(tensor: Tensor) -> bool:
    """Whether torch.func.vmap batches a tensor, on whatever level of its transforms; the compiler cannot ask."""
    if compiling() or not func_transforms_active():
        return False
    while is_func_wrapped(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            return True
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return False


def innermost(value: Any) -> Any:
    """What transforms of torch.func have wrapped, of a tensor; anything else as it is."""
    while isinstance(value, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value):
        value = torch._C._functorch.get_unwrapped(value)
    return value


def uncounted_writes(tensors: Sequence[Tensor]) -> AbstractContextManager[None]:
    """Within it writes to these tensors leave their versions, by which autograd tells that a saved tensor changed.

    Tensors that were made in inference mode have none.
    """
    kept = tuple(tensor for tensor in tensors if not tensor.is_inference())
    return torch.autograd.grad_mode._unsafe_preserve_version_counter(kept)


def in_compiled_autograd() -> bool:
    """Whether ``torch._dynamo.compiled_autograd`` takes down what backward passes do instead of doing it."""
    module = sys.modules.get("torch._dynamo.compiled_autograd")
    return module is not None and bool(module.compiled_autograd_enabled)


def sequence_number(node: Any) -> int:
    """Of a node of autograd's graph: the later in a thread's forward pass, the larger."""
    return int(node._sequence_nr())


def shape_of_gradient(node: Any, number: int) -> tuple[Sequence[int], Any]:
    """Shape and device of the gradient that comes to a node of autograd's graph for its output of that number."""
    metadata = node._input_metadata[number]
    return metadata.shape, metadata.device


def will_execute(node: Any) -> bool:
    """Whether the backward pass that this thread is in comes to a node."""
    return bool(torch._C._will_engine_execute_node(node))


def is_node_of(node: Any, function: Any) -> bool:
    """Whether a node of autograd's graph is that of an autograd Function."""
    return getattr(type(node), "_forward_cls", None) is function


def is_of_python(node: Any) -> bool:
    """Whether a node of autograd's graph is one that a Function in Python has made."""
    return isinstance(node, torch._C._FunctionBase)


def is_leaf_node(node: Any) -> bool:
    """Whether a node of autograd's graph is where the gradient of a leaf arrives."""
    return bool(node.name() == "torch::autograd::AccumulateGrad")


def checkpoints_around() -> list[Any]:
    """What ``torch.utils.checkpoint`` without reentrance keeps of the calls that go on in it, the innermost first.

    None in the place of what else looks at saved tensors.
    """
    with without_hooks_on_saved() as hooks:
        return [_checkpoint_of(pack) for pack, _ in hooks]


@contextmanager
def without_hooks_on_saved() -> Iterator[list[Any]]:
    """Within it nothing looks at tensors that are saved for backward passes; gives what does, the innermost first."""
    hooks: list[Any] = []
    try:
        while saves_through_hooks():
            hooks.append(torch._C._autograd._top_saved_tensors_default_hooks(True))
            torch._C._autograd._pop_saved_tensors_default_hooks()
        yield hooks
    finally:
        for own in reversed(hooks):
            torch._C._autograd._push_saved_tensors_default_hooks(*own)


def saves_through_hooks() -> bool:
    """Whether anything looks at tensors that are saved for backward passes."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _checkpoint_of(pack: Any) -> Any:
    if getattr(pack, "__qualname__", "") != "_checkpoint_hook.__init__.<locals>.pack_hook":
        return None
    names = pack.__code__.co_freevars
    return pack.__closure__[names.index("frame")].cell_contents if "frame" in names else None


def is_reentrant_checkpoint(node: Any) -> bool:
    """Whether a node is that of ``torch.utils.checkpoint`` with ``use_reentrant=True``, or of a Function like it."""
    return "CheckpointFunction" in node.name()


def waits_for_backward(node: Any) -> bool:
    """Whether a node is that by which DistributedDataParallel notices the first backward pass of a static graph."""
    if type(node).__name__ != "_DDPSinkBackward":
        return False
    wrapper = getattr(node, "ddp_weakref", lambda: None)()
    static = getattr(wrapper, "static_graph", False)
    return bool(static and not getattr(wrapper, "_static_graph_delay_allreduce_enqueued", True))


IS_FLAT = "_is_flat_param"


def is_flat_parameter(tensor: Tensor) -> bool:
    """Whether ``FullyShardedDataParallel`` keeps several parameters in it."""
    return getattr(tensor, IS_FLAT, False) is True


class FsdpUnit(NamedTuple):
    """Parameters whose gradients ``torch.distributed.fsdp.fully_shard`` reduces together.

    Attributes:
        parameters: as an optimizer has them.
        reduces: whether a backward pass leaves their reduced gradients in ``.grad``.
        holds: whether there are gradients of earlier passes that it has not reduced yet.
    """

    parameters: list[Tensor]
    reduces: bool
    holds: bool


def fsdp_units() -> Iterator[FsdpUnit]:
    """Those of all modules of this process; a version of PyTorch that keeps them otherwise seems to have none."""
    registry = sys.modules.get("torch.distributed._composable_state")
    references = list(getattr(registry, "_module_state_mapping", {}).values())
    for state in {id(state): state for state in (reference() for reference in references)}.values():
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:  # torch 2.10 has one at most for a module
            groups = [getattr(state, "_fsdp_param_group", None)]
        for group in groups:
            if group is not None:
                yield _fsdp_unit(group)


def _fsdp_unit(group: Any) -> FsdpUnit:
    units = getattr(group, "fsdp_params", ())
    parameters = [unit.sharded_param for unit in units]
    # Without replicas there is nothing to all-reduce, whatever the setting says.
    replicas = any(placement.is_replicate() for parameter in parameters for placement in parameter.placements)
    held = [getattr(group, "_partial_reduce_output", None)]
    for unit in units:
        held += [getattr(unit, "unsharded_accumulated_grad", None)]
        held += [getattr(getattr(unit, "_unsharded_param", None), "grad", None)]
    reduces = getattr(group, "reduce_grads", True) and (not replicas or getattr(group, "all_reduce_grads", True))
    return FsdpUnit(parameters, reduces, any(grad is not None for grad in held))


def is_module_hook(node: Any) -> bool:
    """Whether a node of autograd's graph is that of hooks on a module's backward pass."""
    return type(node).__name__ == "BackwardHookFunctionBackward"


def cast_gradients(leaves: Sequence[Tensor]) -> dict[int, torch.dtype]:
    """The dtypes that leaves want for their gradients, by their places, if not their own; autograd's engine casts."""
    wanted = ((i, getattr(leaf, "grad_dtype", None), leaf.dtype) for i, leaf in enumerate(leaves))
    return {i: dtype for i, dtype, own in wanted if dtype is not None and dtype != own}


def has_amx() -> bool:
    """Whether the processor has AMX's tiles."""
    return bool(torch.cpu._is_amx_tile_supported())
