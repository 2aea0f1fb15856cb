"""Sampling from logits with counter-based random numbers."""

from locus_kernels.sample.op import sample

__all__ = ["sample"]
