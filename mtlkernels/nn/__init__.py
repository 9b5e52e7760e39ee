"""Trunks of multi-task models: modules that give each task a representation, evaluated by the fused operators."""

from mtlkernels.nn.snr import SNR
from mtlkernels.nn.trunks import CGC, PLE, MMoE

__all__ = ["CGC", "PLE", "SNR", "MMoE"]
