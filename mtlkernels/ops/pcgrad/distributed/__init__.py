"""PCGrad on several machines, by torch.distributed: imported only by a call that needs it.

Two cases. Under data parallelism (``group=``) every rank holds gradients of its part of the batch, of all parameters:
``data_parallel.py``. With sharded gradients (DTensors) every rank holds its part of each gradient: ``sharded.py``. In
both, inner products are summed over the ranks, and one rank's coefficients are everybody's.
"""
