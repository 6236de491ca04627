"""fsdp2 on the fixed tree: one process, two and four that share the parameters give one hash.

The optimizer is not fused: that of a CPU rounds the last numbers of a tensor in another way.
"""

from pathlib import Path

import pytest
import torch

from runs import differences
from worlds import SHARDED, SHARDED_UNET, World, finish

EXACT = ["optimizer.fused=false", "clip=0.1"]
DIT = [*SHARDED, *EXACT]
UNET = [*SHARDED_UNET, *EXACT]
CUT = "strategy=fsdp2"


@pytest.fixture(scope="module")
def tmp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp = tmp_path_factory.mktemp("fsdp2-tree")
    finish(tmp, "one", 1, base=DIT)
    return tmp


@pytest.mark.parametrize("n", [2, 4])
def test_more_processes_give_the_bits_of_one(tmp: Path, n: int) -> None:
    finish(tmp, f"on-{n}", n, CUT, base=DIT)
    assert differences(tmp, "one", f"on-{n}") == []
