"""The measuring, apart from what is measured.

``case`` is what a suite hands over, ``work`` the arithmetic and the traffic that a row needs, ``check`` the comparison
with float64 that comes before any timing, ``timing`` the interleaved rounds, ``contention`` what disturbed them,
``limits`` and ``peak`` what the machine could do at best. ``runner`` puts these together; ``machine``, ``report``,
``table``, ``plots`` and ``roofline`` write the result down, and ``compare`` holds it against an earlier one.
"""
