"""The C++ kernels under sanitizers: ``python -m tests.sanitize``, or ``make sanitize``."""
