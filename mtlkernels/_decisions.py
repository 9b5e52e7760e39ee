"""What was decided about calls and models, and why, for ``logging.getLogger("mtlkernels")`` at DEBUG.

Every record has, beside its message, ``op``, ``direction``, ``device``, ``dtype``, ``rows``, ``implementation`` and
``reason``; those that do not apply are None. What is decided of a call is logged once a process: the first call's
``rows`` stand for all that were decided alike. A conversion is logged whenever it is made.

A call takes microseconds, and would feel it if it asked the logger. It reads :data:`on`, which says what the logger has
said last: when mtlkernels was imported, at :func:`log_decisions`, at a conversion, and where ``mk.use_backend`` begins.
Where C++ made a call's node in autograd's graph, the backward pass runs in C++ too, and is not logged.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from mtlkernels import _torch

LOGGER = logging.getLogger("mtlkernels")
LOGGER.addHandler(logging.NullHandler())

on = LOGGER.isEnabledFor(logging.DEBUG)
_pauses = 0  # of all threads
_lock = threading.Lock()
_noted: set[tuple[str | None, ...]] = set()


def log_decisions() -> bool:
    """Asks the logger "mtlkernels" anew whether it wants decisions, and lets it have each once more.

    Which implementation takes a call, and why, is logged at DEBUG, each decision once a process::

        import logging

        import mtlkernels as mk

        logging.basicConfig(level=logging.DEBUG)  # or logging.getLogger("mtlkernels").setLevel(logging.DEBUG)
        mk.log_decisions()

    Not needed where the level was set before mtlkernels was imported, as calls do not ask the logger, for their speed.
    ``mk.convert`` and ``mk.use_backend`` ask it too. Compiled code logs nothing.

    Returns:
        Whether decisions are logged now.
    """
    _noted.clear()
    return ask()


def ask() -> bool:
    """Asks the logger whether it wants decisions; not while the compiler traces, which cannot."""
    global on
    if _torch.compiling():
        return on
    on = LOGGER.isEnabledFor(logging.DEBUG) and not _pauses
    return on


def wanted() -> bool:
    """Whether decisions are logged; never while the compiler traces."""
    return on and not _torch.compiling()


@contextmanager
def paused() -> Iterator[None]:
    """Within the block nothing is logged: what is called there are trials."""
    _count_pause(1)
    try:
        yield
    finally:
        _count_pause(-1)


def _count_pause(step: int) -> None:
    global _pauses
    with _lock:  # blocks of several threads do not end in the order of their beginning
        _pauses += step
        ask()


def note(
    op: str, implementation: str, reason: str, like: Tensor | None = None, rows: int | None = None, direction: str = ""
) -> None:
    """Logs what takes a call and why, if nothing like it was logged before.

    Args:
        op: the public function, or the class of a module.
        implementation: a name of :func:`mtlkernels.backends`, or what else evaluates the call.
        reason: why.
        like: a tensor with the device and dtype of the call.
        rows: B, where the call has rows.
        direction: "forward", "backward", or another of the op's operators.
    """
    if not wanted():
        return
    device, dtype = (None, None) if like is None else (str(like.device), str(like.dtype).removeprefix("torch."))
    key = (op, direction, device, dtype, implementation, reason)
    if key in _noted:
        return
    _noted.add(key)
    where = "" if like is None else f" on {device} in {dtype}"
    many = "" if rows is None else f", B = {rows}"
    more = {"op": op, "direction": direction or None, "device": device, "dtype": dtype, "rows": rows}
    name = f"{op} {direction}" if direction else op
    _log(f"{name}{where}{many}: {implementation}, as {reason}", {**more, "implementation": implementation}, reason)


def report(op: str, line: str) -> None:
    """Logs a line of a report on a model, also while another thread's trials are at work."""
    if LOGGER.isEnabledFor(logging.DEBUG) and not _torch.compiling():
        fields = ("direction", "device", "dtype", "rows", "implementation")
        _log(f"{op}: {line}", {"op": op, **dict.fromkeys(fields)}, line)


def _log(message: str, fields: dict[str, object], reason: str) -> None:
    LOGGER.debug("%s", message, extra={**fields, "reason": reason}, stacklevel=3)
