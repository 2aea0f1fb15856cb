"""The clipped GRPO loss of tokens from hidden states and the head's weight."""

from locus_kernels.grpo_loss.op import grpo_loss

__all__ = ["grpo_loss"]
