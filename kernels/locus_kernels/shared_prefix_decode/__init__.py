"""One decoding step over shared prompts."""

from locus_kernels.shared_prefix_decode.op import shared_prefix_decode

__all__ = ["shared_prefix_decode"]
