"""What the launchers share: names for the fields of a job, and the interpreter's flag.

A job is a `NamedTuple` of whole numbers that tells a kernel where one of many tensors lies; kernels read its
fields as int64 from a table [jobs, fields].
"""

from __future__ import annotations

import triton
import triton.language as tl

# Whether TRITON_INTERPRET=1 was set when Triton was imported
INTERPRETED: bool = triton.knobs.runtime.interpret


def fields(job: type[tuple[int, ...]], names: str) -> list[tl.constexpr]:
    """The places of these fields (names separated by spaces) in a NamedTuple class, for kernels to add to a
    job's address. ValueError for a name that the class does not have."""
    return [tl.constexpr(job._fields.index(name)) for name in names.split()]  # type: ignore[attr-defined]
