"""How the gradients of shards are summed: on one fixed binary tree, within and across processes.

    ((g0 + g1) + (g2 + g3)) + ((g4 + g5) + (g6 + g7))

Floating-point addition is not associative, so the shape of the sum is part of the result. On this
tree every aligned power-of-two run of shards is a subtree: a process sums its own shards, and then
partners at distance 1, 2, 4, ... add each other's sums. So the bits do not depend on the number of
processes. An all-reduce is faster across many processes, but its bits do depend on their number.

Where each process keeps a part of every parameter, the backward pass of a shard sums gradients over
processes at once. Then neighbours in the tree must be computed at the same time: the shards are
dealt to the processes in turn, and the tree is climbed the other way round (``interleaved``).
"""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from exact_resume.distributed import peer_errors, rank, world_size

# Sums lists of tensors over the processes. It may change its argument in place.
GradientReducer = Callable[[list[Tensor]], list[Tensor]]


class TreeSum:
    """The sum of lists of tensors on the tree, pushed one shard after another.

    It carries like a binary counter, so at most ``log2(shards) + 1`` lists are alive.

    Attributes:
        stack: Pairs of a number of shards and the sum of their lists, in descending numbers.
    """

    def __init__(self) -> None:
        self.stack: list[tuple[int, list[Tensor]]] = []

    def push(self, tensors: Sequence[Tensor]) -> None:
        """Add the tensors of the next shard. They may be changed in place."""
        size = 1
        total = list(tensors)
        while self.stack and self.stack[-1][0] == size:
            _, left = self.stack.pop()
            torch._foreach_add_(left, total)
            total = left
            size *= 2
        self.stack.append((size, total))

    def sum(self) -> list[Tensor]:
        """Return the sum over all shards pushed.

        If their number is no power of two, the remaining subtrees are added from right to left.
        """
        _, total = self.stack.pop()
        while self.stack:
            _, left = self.stack.pop()
            torch._foreach_add_(left, total)
            total = left
        return total


def no_reduce(tensors: list[Tensor]) -> list[Tensor]:
    """Return ``tensors``: the sum over one process."""
    return tensors


def tree_all_reduce(tensors: list[Tensor]) -> list[Tensor]:
    """Sum over a power of two of processes on the upper levels of the tree.

    This is recursive doubling. Both partners compute the same sum, as ``a + b`` equals ``b + a`` to
    the bit, so all processes end with the same result. Each level sends all tensors once: the
    traffic is ``log2(processes)`` times the size of the gradient, and the memory twice its size.
    """
    mine = _flatten(tensors)
    theirs = torch.empty_like(mine)
    distance = 1
    with peer_errors():
        while distance < world_size():
            partner = rank() ^ distance
            exchange = [
                dist.P2POp(dist.isend, mine, partner),
                dist.P2POp(dist.irecv, theirs, partner),
            ]
            for work in dist.batch_isend_irecv(exchange):
                work.wait()
            mine.add_(theirs)
            distance *= 2
    return _unflatten(mine, tensors)


class AllReduce:
    """The backend's own all-reduce, begun while the backward pass still runs.

    Gradients are sent in buckets of fixed size, from the last parameter to the first, as this is
    the order in which the backward pass computes them. A bucket is sent as soon as it is full.
    Buckets depend on the parameters alone, so a resumed run has the same ones
    (DistributedDataParallel builds others after its first step).

    Args:
        parameters: In the order of their gradients, which come first in the list to be summed.
        overlap: Begin in the backward pass. Only for one backward pass a step.
        bucket: The size of a bucket in bytes.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, overlap: bool = True, bucket: int = 25 * 2**20
    ) -> None:
        self.parameters = list(parameters)
        self.buckets = _make_buckets(self.parameters, bucket)
        self.ready: set[int] = set()  # indices of parameters whose gradient is computed
        self.sent: list[tuple[Tensor, dist.Work]] = []  # one entry for each bucket sent
        if overlap:
            for index, parameter in enumerate(self.parameters):
                hook = self._make_hook(index)
                parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
        """Send the buckets that were not sent yet, and wait for all sums."""
        rest = tensors[len(self.parameters) :]
        with peer_errors():
            while len(self.sent) < len(self.buckets):
                self._send([tensors[i] for i in self.buckets[len(self.sent)]])
            self._send(rest)
            groups = [[tensors[i] for i in bucket] for bucket in self.buckets]
            for group, (flat, work) in zip([*groups, rest], self.sent, strict=True):
                work.wait()
                _unflatten(flat, group)
        self.ready = set()
        self.sent = []
        return tensors

    def _make_hook(self, index: int) -> Callable[[Tensor], None]:
        def on_gradient(parameter: Tensor) -> None:
            self.ready.add(index)
            with peer_errors():
                self._send_full_buckets()

        return on_gradient

    def _send_full_buckets(self) -> None:
        while len(self.sent) < len(self.buckets):
            bucket = self.buckets[len(self.sent)]
            if not self.ready.issuperset(bucket):
                return
            gradients = [self.parameters[i].grad for i in bucket]
            self._send([g for g in gradients if g is not None])

    def _send(self, tensors: list[Tensor]) -> None:
        flat = _flatten(tensors)
        work = dist.all_reduce(flat, async_op=True)
        assert work is not None
        self.sent.append((flat, work))


class TreeReduceScatter:
    """FSDP's reduce-scatter with the sum on the tree; for ``FSDPModule.set_custom_reduce_scatter``.

    Each process gets its part of the gradient from all others, and adds these up itself. The
    traffic is that of a reduce-scatter. The memory is more by one buffer, as large as the gradient
    of the layers that are reduced together.
    """

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Return an empty tensor, as FSDP needs for its input and output."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: object,
        async_op: bool = False,
    ) -> None:
        """Sum ``input_tensor`` over ``group``, and put this process's part in ``output_tensor``.

        Args:
            output_tensor: ``(n,)``.
            input_tensor: ``(n * processes,)``.
            group: the processes.
            op: ignored: it is always the sum.
            async_op: ignored: the sum has been enqueued when this returns.
        """
        received = torch.empty_like(input_tensor)
        with peer_errors():
            dist.all_to_all_single(received, input_tensor, group=group)
        tree = TreeSum()
        for part in received.chunk(group.size()):
            tree.push([part])
        output_tensor.copy_(tree.sum()[0])


def fsdp_reduce(tensors: list[Tensor]) -> list[Tensor]:
    """Sum over processes that each hold their part of every gradient.

    Args:
        tensors: Gradients, which the backward pass has already averaged over the processes, and
            last the loss, which is not summed yet.
    """
    *gradients, loss = tensors
    torch._foreach_mul_(gradients, world_size())
    with peer_errors():
        dist.all_reduce(loss)
    return tensors


def own_shards(shards: int, rank: int, processes: int, *, interleaved: bool = False) -> range:
    """Return the numbers of the shards that a process computes, in their order.

    Args:
        shards: The number of shards of a batch.
        rank: The number of the process.
        processes: The number of processes.
        interleaved: Deal the shards in turn, instead of consecutive ones to each.
    """
    if interleaved:
        return range(rank, shards, processes)
    own = shards // processes
    return range(rank * own, (rank + 1) * own)


def is_tree(shards: int, processes: int) -> bool:
    """Return whether each of ``processes`` has a subtree of the tree over ``shards``."""
    if processes == 1:
        return True
    return _is_power_of_two(shards) and _is_power_of_two(processes) and processes <= shards


def reduction_id(shards: int, processes: int, mode: str) -> str:
    """Return what the bits of the sum depend on, in words, for the fingerprint.

    Args:
        shards: The number of shards of a batch.
        processes: The number of processes.
        mode: ``"tree"``, or the name of another reduction.
    """
    if processes == 1 or mode == "tree":
        return f"tree over {shards} shards"
    return f"{mode} over {shards} shards on {processes} processes"


def _make_buckets(parameters: Sequence[nn.Parameter], size: int) -> list[list[int]]:
    """Cut the indices of ``parameters``, last first, into buckets of at most ``size`` bytes.

    A parameter that is larger has a bucket of its own.
    """
    buckets: list[list[int]] = [[]]
    filled = 0
    for index in reversed(range(len(parameters))):
        n_bytes = parameters[index].numel() * parameters[index].element_size()
        if filled and filled + n_bytes > size:
            buckets.append([])
            filled = 0
        buckets[-1].append(index)
        filled += n_bytes
    return buckets


def _is_power_of_two(n: int) -> bool:
    return n & (n - 1) == 0


def _flatten(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def _unflatten(flat: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """Copy ``flat`` back into ``tensors``, and return them.

    They keep their memory layout, which is part of what a later sum over them gives.
    """
    parts = torch.split(flat, [t.numel() for t in tensors])
    views = [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]
    torch._foreach_copy_(tensors, views)
    return tensors
