"""What mtlkernels is worth, measured against what a user would pick instead: ``python benchmarks/run.py``."""
