"""The fixed binary tree on which shard gradients are summed.

    ((g0 + g1) + (g2 + g3)) + ((g4 + g5) + (g6 + g7))

Floating-point addition is not associative, so the shape of the sum is part of the result. On this tree every
aligned power-of-two run of shards is a subtree, so processes that own such runs can sum their own and then each
other's, and the bits do not depend on their number. ``log2(V) + 1`` copies are alive at most.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class Tree:
    """Sums lists of tensors, pushed one shard after another, like carries of a binary counter."""

    def __init__(self) -> None:
        self.stack: list[tuple[int, list[Tensor]]] = []  # (shards summed, their sum), sizes descending

    def push(self, tensors: Sequence[Tensor]) -> None:
        """Add the next shard's tensors; they are taken over and may be changed in place."""
        size, total = 1, list(tensors)
        while self.stack and self.stack[-1][0] == size:
            _, left = self.stack.pop()
            torch._foreach_add_(left, total)
            size, total = 2 * size, left
        self.stack.append((size, total))

    def sum(self) -> list[Tensor]:
        """The sum over all shards pushed; a number that is no power of two folds the rest right to left."""
        _, total = self.stack.pop()
        while self.stack:
            _, left = self.stack.pop()
            torch._foreach_add_(left, total)
            total = left
        return total
