"""What a call on a GPU costs the host, measured without one: ``benchmarks/run.py gpu-host``."""
