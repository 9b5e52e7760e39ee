"""Random calls of every op by every implementation, held against float64: ``make fuzz CASES=10000 SEED=1``.

A case is a frozen dataclass of plain values, so that its ``repr`` is a line of Python. Hypothesis draws cases and makes
one that fails as small as it can; what is printed then is a test. The modules ``*_cases`` have a strategy ``CASES`` and
a function ``check`` each, ``targets`` lists them.

What is judged is a call's outputs and its gradients, by the error that PyTorch makes in the same dtype against the
formula in float64 (``tests/ops/*/definition.py``, written apart from the reference). Tensors lie between pages that may
not be touched, in any layout; memory that a kernel should write holds NaN before.
"""
