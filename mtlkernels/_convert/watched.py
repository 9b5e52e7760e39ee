"""What the code of a converted module reads beside tensors and parts, so that another value brings its own code back.

A trial shows what a forward pass does with what a module has now. A temperature, a flag, a mask that is None so far or
a function that is put in another's place may become another one later, as schedules have it.

Each call compares all that is watched, with what is kept of it as ``values.py`` says.
"""

from __future__ import annotations

import operator
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtlkernels import _torch
from mtlkernels._convert.arguments import Absent
from mtlkernels._convert.chains import Product
from mtlkernels._convert.classes import is_torchs, original_class
from mtlkernels._convert.objects import INTERNAL, has_torchs_forward, is_owner
from mtlkernels._convert.reader import Entry, Reader
from mtlkernels._convert.reading import Code, Path, Scope, Scopes, Surroundings, is_own, methods_of
from mtlkernels._convert.shared_state import MOST_NUMBERS
from mtlkernels._convert.values import SCALARS, Numbers, What, is_data, is_odd, is_same, kind_of, names_of

# By which names a part is found, or where variables are, and the entries.
Watched = tuple[tuple[Any, tuple[Entry, ...]], ...]
_PARTS, _PARAMETERS, _BUFFERS = "_modules", "_parameters", "_buffers"


def changed(module: Any, watched: Watched) -> str | None:
    """The name of something that is no longer what it was."""
    try:
        for path, entries in watched:
            owner = module
            if type(path) is tuple:
                for name in path:
                    owner = owner._modules[name]
            else:
                owner = path
            for names, value in entries:
                now = _found(owner, names, value is Absent)
                if now is not value and not is_same(now, value):
                    return names_of(names)
    except Exception:  # of code that is not ours, or of parts that are gone
        return "something"
    return None


def _of_instance(owner: Any, name: Any) -> Any:
    """What an instance itself has under a name.

    While Dynamo traces, by an attribute: of what is looked up in the dictionary, the guards of PyTorch 2.15 on
    Python 3.13 missed that it had changed, though the same guards, when they were asked what had failed, named it.
    """
    if not torch.compiler.is_dynamo_compiling():
        return owner.__dict__.get(name, Absent)
    return getattr(owner, name, Absent) if name in owner.__dict__ else Absent


def _found(owner: Any, names: Sequence[Any], missed: bool) -> Any:
    """What an instance, or its class, or a scope has under a name, and that under the next one.

    Of a name that was ``missed``, a class has methods and the like, which count for nothing.
    """
    now: Any
    if type(owner) is Scope:
        now = owner.get(names[0], _torch.compiling())
    else:
        now = _of_instance(owner, names[0])
        if now is Absent:
            now = getattr(type(owner), names[0], Absent)
            if missed and len(names) == 1 and not isinstance(now, SCALARS):
                return Absent
    for name in names[1:]:
        now = dict.get(now, name, Absent) if isinstance(now, dict) else getattr(now, name, Absent)
    return now


def _is_watched(value: Any) -> bool:
    """Whether an attribute of a class, or a variable, is data, or may have some."""
    return is_data(value) or is_owner(value)


def _has_beside(value: Any) -> bool:
    """Whether a variable is a method of an object, or a function of the user's that has variables of its own."""
    if isinstance(value, types.FunctionType):
        return bool(value.__closure__ or vars(value)) and is_own(value)
    return isinstance(value, types.MethodType)


def watched(module: nn.Module, method: str, read: Iterable[Any], writes: Iterable[str] = ()) -> Watched:
    """What ``method`` of a module, and the forward methods of the parts that it names, read that no call reads anew.

    ``read`` are the modules, and the products of tensors, that each call reads, ``writes`` the module's attributes that
    each call writes.

    Raises:
        TooMuch: the code reads more than a call should compare.
    """
    read = list(read)
    is_known = _known(module, read)
    anew = {id(tensor) for step in read if isinstance(step, Product) for tensor in step.parameters()}
    found: list[tuple[Any, tuple[Entry, ...]]] = []
    waiting: list[tuple[tuple[str, ...], Any]] = [((), module)]
    seen: set[int] = set()
    around = Surroundings(Scopes(), set())
    while waiting:
        path, part = waiting.pop()
        if part is None or id(part) in seen:
            continue
        seen.add(id(part))
        kind = original_class(type(part)) or type(part)
        names = set(part._modules)
        if not is_torchs(kind):
            methods = {method} if part is module else {"forward", *methods_of(kind, around.words)}
            code = Code(kind, methods, around.scopes)
            around.packages |= code.packages
            reader = Reader(code.paths, code.words, Surroundings(around.scopes, code.packages), is_known)
            own = code.names | _put_together(part, code.words)
            own -= INTERNAL | (set(writes) if part is module else set())
            names &= code.names
            entries = reader.settled(_of_part, part, own, code.methods, anew)
            around.words |= reader.words
        else:
            reader = Reader(set(), around.words, around, is_known)
            entries = reader.settled(_of_torchs, part)
        found += [(path, entries)] if entries else []
        waiting += [((*path, name), part._modules[name]) for name in part._modules if name in names]
    found += _of_others_code(module, Reader(set(), around.words, around, is_known), dict(found))
    found += _of_scopes(around, is_known)
    return (*found, *(_flags(module) if "requires_grad" in around.words else ()))


def _known(module: nn.Module, read: Sequence[Any]) -> Callable[[Any], bool]:
    """Tells the parameters and buffers of a module, and what each call reads: modules, and tensors by other views."""
    products = [step for step in read if isinstance(step, Product)]
    tensors = [*module.parameters(), *module.buffers(), *(t for step in products for t in step.parameters())]
    known = {id(one) for one in (*tensors, *read)} | {address for t in tensors if (address := _address(t)) is not None}
    return lambda one: id(one) in known or (isinstance(one, Tensor) and _address(one) in known)


def _address(tensor: Tensor) -> tuple[str, int] | None:
    """Where a tensor's memory begins, None where that cannot be told."""
    try:
        return str(tensor.device), tensor.untyped_storage().data_ptr()
    except Exception:  # of tensors without memory
        return None


def _of_part(reader: Reader, part: Any, names: set[str], methods: set[str], anew: set[int]) -> Iterator[Entry]:
    """Of those names that code reads of a part, some of which may be those of its ``methods``.

    Of tensors that are buffers those are watched that hold no floating-point numbers, of which a trial has other ones,
    and that no call reads ``anew``: flags, masks and counts, but for those of batches that norms make.
    """
    own = vars(part)
    for name in sorted(names):
        if name in own:
            yield from reader.read((name,), own[name])
        elif name in part._modules:
            yield from _of_inner(reader, name, part._modules[name])
        elif name in part._parameters or name in part._buffers:
            kind = _PARAMETERS if name in part._parameters else _BUFFERS
            value = getattr(part, kind)[name]
            if value is None:  # which a tensor may take the place of
                yield (kind, name), None
            elif name != "num_batches_tracked" and _decides(value) and id(value) not in anew:
                yield (kind, name), Numbers(value)
        else:
            value = getattr(type(part), name, Absent)
            if _is_watched(value):
                yield from reader.read((name,), value)
            elif name not in methods:
                yield (name,), Absent  # nothing of the instance's own, in the place of its class's method, or at all
                if value is Absent:
                    yield from (((kind, name), Absent) for kind in (_PARTS, _PARAMETERS, _BUFFERS))


def _decides(buffer: Tensor) -> bool:
    """Whether its numbers are such that code may branch on, and few enough to compare."""
    return not (buffer.is_floating_point() or is_odd(buffer) or buffer.numel() > MOST_NUMBERS)


def _of_torchs(reader: Reader, part: Any) -> Iterator[Entry]:
    """Of the parts in a list or a dictionary of PyTorch's, whose own code calls none."""
    if isinstance(part, (nn.ModuleList, nn.ModuleDict)):
        for name, inner in part._modules.items():
            yield from _of_inner(reader, name, inner)


def _of_inner(reader: Reader, name: str, inner: Any) -> Iterator[Entry]:
    """Of a part without parameters, unless each call reads it; what code of the user's reads of it, it has itself."""
    if inner is None or not (reader.is_known(inner) or next(inner.parameters(), None) is not None):
        read = inner is None or has_torchs_forward(type(inner))
        yield (_PARTS, name), reader.kept((_PARTS, name), inner) if read else kind_of(inner)


def _put_together(part: Any, words: set[Any]) -> set[str]:
    """Attributes whose names code may put together, as by ``f"mask_{task}"``: it has a piece of them."""
    if "getattr" not in words:
        return set()
    starts = tuple(word for word in words if isinstance(word, str) and word[-1:] == "_" != word[:1])
    ends = tuple(word for word in words if isinstance(word, str) and word[:1] == "_" != word[1:2])
    data = {name for kind in type(part).__mro__ for name, value in vars(kind).items() if is_data(value)}
    return {name for name in {*vars(part), *data} if name.startswith(starts) or name.endswith(ends)}


def _of_others_code(
    module: nn.Module, reader: Reader, known: dict[Any, Any]
) -> Iterator[tuple[Any, tuple[Entry, ...]]]:
    """Of attributes of parts what the code of others asks for by their names, but of PyTorch's own settings."""
    for name, part in module.named_modules():
        path = tuple(name.split("."))
        settings = getattr(type(part), "__constants__", ()) if is_torchs(type(part)) else ()
        names = (vars(part).keys() & reader.words) - INTERNAL - set(settings)
        names -= {names[0] for names, _ in known.get(path, ())}
        entries = reader.settled(_by_name, part, names) if name and names else ()
        if entries:
            yield path, entries


def _by_name(reader: Reader, part: Any, names: set[str]) -> Iterator[Entry]:
    for name in sorted(names):
        yield from reader.read((name,), vars(part)[name])


def _flags(module: nn.Module) -> Iterator[tuple[Any, tuple[Entry, ...]]]:
    """Which parameters are frozen: code may ask that of any."""
    for name, part in module.named_modules():
        flags = {key: parameter.requires_grad for key, parameter in part.named_parameters(recurse=False)}
        if flags:
            path = tuple(name.split(".")) if name else ()
            yield path, tuple(((_PARAMETERS, key, "requires_grad"), flag) for key, flag in flags.items())


def _of_scopes(around: Surroundings, is_known: Callable[[Any], bool]) -> Iterator[tuple[Any, tuple[Entry, ...]]]:
    """Of all variables, and of those around the code that they have."""
    found: dict[int, tuple[Any, tuple[Entry, ...]]] = {}
    done: dict[int, tuple[set[Path], int]] = {}
    while True:
        known = len(around.words)
        waiting = [(key, *each) for key, each in around.scopes.found.items() if done.get(key) != (each[1], known)]
        if not waiting:
            return filter(operator.itemgetter(1), found.values())
        for key, scope, paths in waiting:
            done[key] = set(paths), known
            reader = Reader(paths, around.words, around, is_known)
            found[key] = scope, reader.settled(_of_scope, scope)
            around.words |= reader.words


def _of_scope(reader: Reader, scope: Scope) -> Iterator[Entry]:
    """Variables that are data, or have some; not the functions, classes and modules themselves that code names."""
    for name in sorted({path[0] for path in reader.paths}):
        try:
            value = scope.get(name)
        except ValueError:  # of an enclosing function, not filled yet
            continue
        if _is_watched(value) or _has_beside(value):
            yield from (entry for entry in reader.read((name,), value) if not _is_plain(entry[1]))


def _is_plain(kept: Any) -> bool:
    """Whether it is a class, a function that has nothing beside it, or an object of no class of the user's."""
    if type(kept) is not tuple or not kept:
        return False
    if kept[0] is What.FUNCTION:
        return not kept[2]
    return kept[0] is What.ITSELF or (kept[0] is What.OBJECT and not kept[1].is_users)
