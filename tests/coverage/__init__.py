"""How much of csrc the tests run: ``python -m tests.coverage``."""
