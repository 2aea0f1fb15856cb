"""The head's kernels, with the signatures of `reference.py`: equal bits every time.

`triton_head.py`: the tile product that both passes share, and how it is launched; `triton_forward.py` and
`triton_backward.py`: the passes.
"""

from locus_kernels.linear_logprob.triton_backward import backward
from locus_kernels.linear_logprob.triton_forward import forward

__all__ = ["backward", "forward"]
