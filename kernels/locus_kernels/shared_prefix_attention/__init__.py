"""Attention of G replies over one shared prompt."""

from locus_kernels.shared_prefix_attention.reference import (
    Ragged,
    SharedPrefixLayout,
    bidirectional_attention,
    causal_attention,
    decode_attention,
    shared_prefix_attention,
)

__all__ = ["Ragged", "SharedPrefixLayout", "bidirectional_attention", "causal_attention", "decode_attention", "shared_prefix_attention"]
