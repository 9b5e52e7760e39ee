"""Optimizers for several losses: they wrap one of PyTorch's."""

from mtlkernels.optim.pcgrad import PCGrad

__all__ = ["PCGrad"]
