"""How shard gradients are summed: on one fixed binary tree, inside a process and then across
processes.

    ((g0 + g1) + (g2 + g3)) + ((g4 + g5) + (g6 + g7))

Floating-point addition is not associative, so the shape of the sum is part of the result. On this
tree every aligned power-of-two run of shards is a subtree: a process sums its own, and then
partners at distance 1, 2, 4, ... sum each other's. So the bits do not depend on the number of
processes. An all-reduce is faster across many processes, and its bits do.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from exact_resume.distributed import peer_errors, rank, world_size

GradientReducer = Callable[
    [list[Tensor]], list[Tensor]
]  # over processes; what it is given it may change


class TreeSum:
    """Sums lists of tensors, pushed one shard after another, like carries of a binary counter.

    ``log2(V) + 1`` of them are alive at most.
    """

    def __init__(self) -> None:
        self.stack: list[
            tuple[int, list[Tensor]]
        ] = []  # (shards summed, their sum), sizes descending

    def push(self, tensors: Sequence[Tensor]) -> None:
        """Add the next shard's tensors; they are taken over and may be changed in place."""
        size, total = 1, list(tensors)
        while self.stack and self.stack[-1][0] == size:
            _, left = self.stack.pop()
            torch._foreach_add_(left, total)
            size, total = 2 * size, left
        self.stack.append((size, total))

    def sum(self) -> list[Tensor]:
        """The sum over all shards pushed; a number that is no power of two folds the rest right to
        left.
        """
        _, total = self.stack.pop()
        while self.stack:
            _, left = self.stack.pop()
            torch._foreach_add_(left, total)
            total = left
        return total


def no_reduce(tensors: list[Tensor]) -> list[Tensor]:
    """The sum over one process."""
    return tensors


def tree_all_reduce(tensors: list[Tensor]) -> list[Tensor]:
    """The upper levels of the tree, over a power of two of processes, by recursive doubling.

    Both partners compute one sum, and ``a + b`` is ``b + a`` to the bit, so all end with the same.
    Each level sends all
    of it once: ``log2(W)`` times the traffic of the gradient, and twice its memory.
    """
    flat = _flatten(tensors)
    theirs = torch.empty_like(flat)
    distance = 1
    with peer_errors():
        while distance < world_size():
            partner = rank() ^ distance
            sends = [dist.P2POp(dist.isend, flat, partner), dist.P2POp(dist.irecv, theirs, partner)]
            for work in dist.batch_isend_irecv(sends):
                work.wait()
            flat.add_(theirs)
            distance *= 2
    return _unflatten(flat, tensors)


class AllReduce:
    """The backend's own sum over processes, begun while the backward pass still runs.

    Gradients are gathered in buckets of fixed size, from the last parameter to the first as they
    come out of the backward pass, and each bucket is sent in that order as soon as it is full.
    Buckets depend on the parameters alone, so a resumed run has the same ones
    (DistributedDataParallel builds others after its first step).

    Args:
        parameters: in the order in which their gradients lead the list to be summed.
        overlap: begin in the backward pass; only where that is run once a step.
        bucket: bytes.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, overlap: bool = True, bucket: int = 25 * 2**20
    ) -> None:
        self.parameters = list(parameters)
        self.buckets: list[list[int]] = [[]]  # numbers of parameters
        filled = 0
        for i in reversed(range(len(self.parameters))):
            p = self.parameters[i]
            if filled and filled + p.numel() * p.element_size() > bucket:
                self.buckets.append([])
                filled = 0
            self.buckets[-1].append(i)
            filled += p.numel() * p.element_size()
        self.ready: set[int] = set()
        self.sent: list[tuple[Tensor, dist.Work]] = []
        if overlap:
            for i, p in enumerate(self.parameters):
                p.register_post_accumulate_grad_hook(lambda p, i=i: self._came(i))  # type: ignore[misc]

    def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
        """Send what was not sent, and wait for all of it."""
        with peer_errors():
            while len(self.sent) < len(self.buckets):
                self._send([tensors[i] for i in self.buckets[len(self.sent)]])
            rest = tensors[len(self.parameters) :]
            self._send(rest)
            for numbers, (flat, work) in zip([*self.buckets, None], self.sent, strict=True):
                work.wait()
                _unflatten(flat, rest if numbers is None else [tensors[i] for i in numbers])
        self.ready, self.sent = set(), []
        return tensors

    def _came(self, number: int) -> None:
        self.ready.add(number)
        with peer_errors():
            while len(self.sent) < len(self.buckets) and self.ready.issuperset(
                self.buckets[len(self.sent)]
            ):
                gradients = [self.parameters[i].grad for i in self.buckets[len(self.sent)]]
                self._send([g for g in gradients if g is not None])

    def _send(self, tensors: list[Tensor]) -> None:
        flat = _flatten(tensors)
        work = dist.all_reduce(flat, async_op=True)
        assert work is not None
        self.sent.append((flat, work))


def fsdp_reduce(tensors: list[Tensor]) -> list[Tensor]:
    """The sum where each process holds its part of every gradient, averaged in the backward pass;
    the loss is last.
    """
    *gradients, loss = tensors
    torch._foreach_mul_(gradients, world_size())
    with peer_errors():
        dist.all_reduce(loss)
    return tensors


def is_tree(shards: int, processes: int) -> bool:
    """Whether ``processes`` own subtrees of the tree over ``shards``."""
    return processes == 1 or (
        _power_of_two(shards) and _power_of_two(processes) and processes <= shards
    )


def reduction_id(shards: int, processes: int, how: str) -> str:
    """What the bits of the sum depend on, for the fingerprint of the stack."""
    if processes == 1 or how == "tree":
        return f"tree over {shards} shards"
    return f"{how} over {shards} shards on {processes} processes"


def _power_of_two(n: int) -> bool:
    return n & (n - 1) == 0


def _flatten(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def _unflatten(flat: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """Back into ``tensors``, whose memory layout is part of what a later sum over them gives."""
    parts = flat.split([t.numel() for t in tensors])
    torch._foreach_copy_(
        tensors, [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]
    )
    return tensors
