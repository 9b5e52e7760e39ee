"""Serving on a CPU against the runtimes that people serve with, each in a process of its own.

``models`` is what is served, ``contenders`` who serves it, ``worker`` the process that a contender runs in, ``compare``
checks and times them in turns. The suite is ``benchmarks/suites/serving.py``.
"""
