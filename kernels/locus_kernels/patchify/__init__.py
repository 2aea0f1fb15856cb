"""RGB image to vision-tower patches."""

from locus_kernels.patchify.reference import patchify

__all__ = ["patchify"]
