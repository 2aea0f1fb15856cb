"""RGB images to vision-tower patches."""

from locus_kernels.patchify.op import patchify, patchify_images

__all__ = ["patchify", "patchify_images"]
