"""What tests put around an operator to see what it does: operations, allocations, reads."""

from __future__ import annotations

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Operations that need values on the host, and so wait for the device
WAITING = (
    "_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique", "_unique2",
)  # fmt: skip


class Operations(TorchDispatchMode):
    """Names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class Allocations(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned, those of shape `spared` left out."""

    def __init__(self, spared: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.largest, self.spared = 0, spared

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, Tensor) and tuple(t.shape) != self.spared and not t._is_view():
                self.largest = max(self.largest, t.numel())
        return out


class BytesRead(TorchDispatchMode):
    """Counts the bytes that operators, but for those that make views, read from a tensor's storage."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.storage, self.bytes = tensor.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            tensors = [a for a in args if isinstance(a, Tensor)]
            read = [a for a in tensors if a.untyped_storage().data_ptr() == self.storage]
            self.bytes += sum(a.numel() * a.element_size() for a in read)
        return func(*args, **(kwargs or {}))
