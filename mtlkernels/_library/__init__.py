"""Every operator's schema and fake kernel."""

from mtlkernels._library import mixtures, pcgrad, snr  # noqa: F401  (they define the operators)
from mtlkernels._library.definition import cast_floats, define, register_autograd

__all__ = ["cast_floats", "define", "register_autograd"]
