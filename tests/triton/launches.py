"""Watches what Triton's interpreter launches, loads and stores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
from triton.runtime import interpreter


@dataclass
class Launch:
    """What one launch has done: its products, and the addresses of numbers and words of signs that it has touched."""

    kernel: str
    flop: int = 0
    loads: list[tuple[int, Any]] = field(default_factory=list)
    stores: list[tuple[int, Any]] = field(default_factory=list)

    @property
    def read(self) -> int:
        """Bytes, each once."""
        return _once(self.loads)

    @property
    def written(self) -> int:
        return _once(self.stores)


def _once(touched: list[tuple[int, Any]]) -> int:
    sizes = {size for size, _ in touched}
    return sum(size * len(np.unique(np.concatenate([a for s, a in touched if s == size]))) for size in sizes)


@contextmanager
def launched(*, run: bool = True) -> Iterator[list[Launch]]:
    """The launches in the block, in their order. Who wants their names alone need not ``run`` them."""
    launches: list[Launch] = []
    builder = interpreter.InterpreterBuilder
    call, load, store = interpreter.GridExecutor.__call__, builder.create_masked_load, builder.create_masked_store
    dot = builder.create_dot

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        launches.append(Launch(self.fn.__name__))
        if run:
            call(self, *args, **kwargs)

    def touch(touched: list[tuple[int, Any]], pointers: Any, mask: Any) -> None:
        element = pointers.get_element_ty()
        if element.primitive_bitwidth < 64 or element.is_floating():  # other integers are the call's table
            touched.append((element.primitive_bitwidth // 8, pointers.data[mask.data.astype(bool)].ravel()))

    def loaded(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        touch(launches[-1].loads, pointers, mask)
        return load(self, pointers, mask, *rest)

    def stored(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        touch(launches[-1].stores, pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def multiplied(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        launches[-1].flop += 2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
        return dot(self, a, b, *rest)

    with (
        mock.patch.object(interpreter.GridExecutor, "__call__", launch),
        mock.patch.object(builder, "create_masked_load", loaded),
        mock.patch.object(builder, "create_masked_store", stored),
        mock.patch.object(builder, "create_dot", multiplied),
    ):
        yield launches


@contextmanager
def last_program_first() -> Iterator[None]:
    """Programs run in the reverse of their usual order."""
    builder = interpreter.interpreter_builder
    move = builder.set_grid_idx

    def reverse(x: int, y: int, z: int) -> None:
        move(builder.grid_dim[0] - 1 - x, y, z)

    with mock.patch.object(builder, "set_grid_idx", reverse):
        yield
