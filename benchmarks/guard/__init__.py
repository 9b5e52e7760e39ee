"""Instruction counts of small calls, which tell a regression from noise: ``python -m benchmarks.guard``.

A loaded machine changes times by more than a change of code does; the number of instructions that a call takes stays
the same to a tenth of a percent. ``calls`` is what is counted, ``callgrind`` counts it in a process under valgrind,
``baseline`` compares with the counts that are kept in ``baseline.json``.
"""
