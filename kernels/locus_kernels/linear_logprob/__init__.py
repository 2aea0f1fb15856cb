"""Log-probability of tokens from hidden states and the head's weight."""

from locus_kernels.linear_logprob.op import linear_logprob

__all__ = ["linear_logprob"]
