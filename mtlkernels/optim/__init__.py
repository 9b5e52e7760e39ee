"""Optimizers for several losses: they wrap one of PyTorch's."""

from mtlkernels.optim.gram_weighted import GramWeighted
from mtlkernels.optim.pcgrad import PCGrad

__all__ = ["GramWeighted", "PCGrad"]
