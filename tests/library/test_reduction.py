"""The tree's shape: it is part of the result, and does not depend on how many processes share
it.
"""

import pytest
import torch

from exact_resume.reduction import TreeSum


def gradients(n):
    rng = torch.Generator().manual_seed(n)
    scales = 10.0 ** torch.randint(-3, 4, (n, 1, 1), generator=rng)
    return [list((s * torch.randn(2, 500, generator=rng)).unbind()) for s in scales]


def on_tree(shards):
    tree = TreeSum()
    for tensors in shards:
        tree.push([t.clone() for t in tensors])
    return tree.sum()


def recursive(shards):
    """A complete subtree on the left, the rest on the right."""
    if len(shards) == 1:
        return shards[0]
    left = 1
    while 2 * left < len(shards):
        left *= 2
    return [a + b for a, b in zip(recursive(shards[:left]), recursive(shards[left:]), strict=True)]


def left_fold(shards):
    total = shards[0]
    for tensors in shards[1:]:
        total = [a + b for a, b in zip(total, tensors, strict=True)]
    return total


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("n", range(1, 10))
def test_the_bits_are_those_of_the_recursion(n):
    assert equal(on_tree(gradients(n)), recursive(gradients(n)))


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_processes_that_own_subtrees_give_the_same_bits(world):
    shards = gradients(8)
    own = 8 // world
    assert equal(on_tree([on_tree(shards[i : i + own]) for i in range(0, 8, own)]), on_tree(shards))


@pytest.mark.parametrize("n", [4, 5, 8])
def test_control_a_left_fold_differs(n):
    tree, fold = on_tree(gradients(n)), left_fold(gradients(n))
    assert not equal(tree, fold)
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in zip(tree, fold, strict=True))


def test_no_more_copies_than_the_tree_is_deep():
    tree = TreeSum()
    for n, tensors in enumerate(gradients(64), start=1):
        tree.push(tensors)
        assert len(tree.stack) == n.bit_count()
