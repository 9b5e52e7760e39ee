"""The measuring, apart from what is measured.

``case`` is what a suite hands over, ``check`` the comparison with float64 that comes before any timing, ``timing`` the
interleaved rounds, ``limits`` what the machine could do at best. ``runner`` puts these together; ``machine``,
``report``, ``table`` and ``plots`` write the result down.
"""
