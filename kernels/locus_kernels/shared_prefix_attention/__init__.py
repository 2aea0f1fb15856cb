"""Attention of packed sequences, and of G replies over one shared prompt."""

from locus_kernels.shared_prefix_attention.backends import BACKENDS, Backend, choose_backend
from locus_kernels.shared_prefix_attention.layout import Packed, Pairs, SharedPrefixLayout
from locus_kernels.shared_prefix_attention.op import packed_attention, shared_prefix_attention
from locus_kernels.transfer import send

__all__ = [
    "BACKENDS",
    "Backend",
    "Packed",
    "Pairs",
    "SharedPrefixLayout",
    "choose_backend",
    "packed_attention",
    "send",
    "shared_prefix_attention",
]
