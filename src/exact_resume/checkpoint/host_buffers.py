"""Host memory for copies of a state, allocated once."""

import ctypes
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


class HostBuffers:
    """Host memory for one copy of a state.

    Buffers are allocated once and reused: touching new memory takes longer than copying. Tensors
    of one shape, type and layout take the buffers of this kind in turn.
    """

    def __init__(self) -> None:
        self.pool: dict[Any, list[Tensor]] = {}

    def preallocate(self, state: Any) -> None:
        """Allocate the memory that ``copy`` will need for ``state``, and touch it.

        It is touched by C and not by torch, whose first parallel loop in a second thread starts a
        second team of OpenMP threads. libgomp then believes that there are more threads than
        cores, and lets training's own threads sleep between loops, which halves its speed.
        """

        def touch(value: Tensor, buffer: Tensor) -> Tensor:
            memory = buffer.untyped_storage()
            ctypes.memset(memory.data_ptr(), 0, memory.nbytes())
            return buffer

        self._fill(state, touch)

    def copy(self, state: Any) -> Any:
        """Return ``state`` with its tensors copied; the copy is valid until the next ``copy``."""

        def copy_tensor(value: Tensor, buffer: Tensor) -> Tensor:
            return buffer.copy_(value.detach(), non_blocking=value.is_cuda)

        copy = self._fill(state, copy_tensor)
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.current_stream().synchronize()
        return copy

    def _fill(self, state: Any, fill: Callable[[Tensor, Tensor], Tensor]) -> Any:
        used: Counter[Any] = Counter()  # buffers by kind

        def filled(value: Any) -> Any:
            if isinstance(value, Tensor) and not value.is_meta:
                # The layout matters: loaded optimizer state is used in the layout that it has.
                kind = (value.dtype, value.shape, value.stride(), value.is_cuda)
                buffers = self.pool.setdefault(kind, [])
                if used[kind] == len(buffers):
                    buffers.append(_empty_like(value))
                used[kind] += 1
                return fill(value, buffers[used[kind] - 1])
            if isinstance(value, Mapping):
                return {k: filled(v) for k, v in value.items()}
            if isinstance(value, list | tuple | set):
                return type(value)([filled(v) for v in value])
            return value

        return filled(state)


def _empty_like(value: Tensor) -> Tensor:
    """Return uninitialized host memory for a copy of ``value``, pinned if that is on a GPU."""
    return torch.empty_like(value, device="cpu", pin_memory=value.is_cuda, requires_grad=False)
