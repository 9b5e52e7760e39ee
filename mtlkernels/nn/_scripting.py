"""What ``torch.jit.script`` says of the modules, whose wiring is Python."""

from __future__ import annotations

from typing import NoReturn


class NotScriptable:
    """A module that ``torch.jit.script`` cannot compile, and that says what to do instead."""

    def __prepare_scriptable__(self) -> NoReturn:
        name = type(self).__name__
        raise RuntimeError(
            f"mtlkernels.nn's {name} must be traced, not scripted: call torch.jit.trace(module, example), whose graph"
            " needs no mtlkernels where it is loaded and can be part of a script, or torch.export.export"
        )
