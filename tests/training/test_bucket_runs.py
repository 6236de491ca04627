"""Runs on buckets: killed and resumed, on one process and on two, with the same bits."""

import numpy as np
import pytest
from PIL import Image

from runs import differences, kill_at, run_script, train
from worlds import World, finish

UNET = ["backbone=unet", "backbone.width=8", "backbone.head_dim=8", "backbone.multipliers=[1,2]"]
UNET += ["backbone.attention=[false,true]", "backbone.blocks=1", "backbone.dropout=0.2"]
DIT = ["backbone=dit", "backbone.width=16", "backbone.depth=1", "backbone.heads=2"]
SHAPES = [(20, 40), (40, 20), (30, 30), (30, 60)]  # height and width


@pytest.fixture(scope="module")
def tmp(tmp_path_factory):
    """A folder of wide and tall images, and the run ``whole`` on them."""
    tmp = tmp_path_factory.mktemp("buckets")
    (tmp / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(33):
        height, width = SHAPES[i % 4] if i else (10, 60)  # one image has a bucket of its own
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp / "images" / f"{i}.png")
    finish(tmp, "whole", 1, base=base(tmp))
    return tmp


def base(tmp, *, backbone=UNET):
    return [
        *("trainer=cpu", "trainer.threads=1", "trainer.max_steps=12"),
        *("trainer.val_check_interval=4", "trainer.log_every_n_steps=2"),
        *("data=folder", f"data.root={tmp / 'images'}", "data.image_size=16", "data.holdout=0.3"),
        *(
            "data.buckets=[16x16,12x20,20x12,8x32]",
            "data.batch_size=8",
            "data.shards=4",
            "reduction=tree",
        ),
        *("callbacks.checkpoint.every_n_train_steps=3", "callbacks.samples.every_n_steps=6"),
        *("callbacks.samples.n=2", "sampler.steps=2", "callbacks.samples.size=12x20"),
        *backbone,
    ]


@pytest.mark.slow
def test_a_killed_run_continues_bit_for_bit(tmp):
    kill_at(tmp, "killed", 6, base=base(tmp), saved=True)
    said = train(tmp, "killed", base=base(tmp)).stdout
    assert "resumed from step" in said
    assert "(bitwise" in said
    assert differences(tmp, "whole", "killed") == []


def test_killed_and_resumed_on_two_processes_it_has_the_bits_of_one(tmp):
    World(tmp, "two", 2, base=base(tmp)).until(4).kill().wait()
    assert "(bitwise" in finish(tmp, "two", 2, base=base(tmp)).output(0)
    assert differences(tmp, "whole", "two") == []


def forget(rank):
    """Count the batches of a bucket as they are asked for: a sampler with state, which dies."""
    from sturdy.data.buckets import BucketOrder

    exact = BucketOrder.rank
    counted: dict[int, dict[int, int]] = {}

    def count(self, batch):
        bucket, _ = exact(self, batch)
        ranks = counted.setdefault(bucket, {})
        return bucket, ranks.setdefault(batch, len(ranks))

    BucketOrder.rank = count


@pytest.mark.slow
def test_an_order_with_state_is_noticed(tmp):
    finish(tmp, "stateful", 1, base=base(tmp), first=forget)
    assert differences(tmp, "whole", "stateful") == [], "it is right as long as nothing dies"
    World(tmp, "forgot", 1, base=base(tmp), first=forget).until(6).kill().wait()
    finish(tmp, "forgot", 1, base=base(tmp), first=forget)
    assert differences(tmp, "whole", "forgot"), "this control controls nothing"


@pytest.mark.slow
def test_a_batch_that_is_left_out_moves_the_others_by_a_whole_batch(tmp):
    """Also where the run is killed afterwards: a batch never gets two sizes."""
    said = train(tmp, "sick", base=base(tmp), sabotage="poison:35").stdout
    assert "positions 32 to 39" in said
    kill_at(tmp, "sick-and-killed", 8, base=base(tmp), sabotage="poison:35", saved=True)
    train(tmp, "sick-and-killed", base=base(tmp), sabotage="poison:35")
    assert differences(tmp, "sick", "sick-and-killed") == []
    assert differences(tmp, "whole", "sick")


def test_images_are_drawn_at_any_size(tmp):
    with Image.open(tmp / "runs" / "whole" / "samples" / "step-00000012.png") as grid:
        assert grid.height == 4 * 12 + 4, "one row of images, 4 times as large, and two gaps"
    words = ["run=whole", "sample.n=2", "sampler.steps=2"]
    for size, width in (("12x20", 20), ("20x12", 12), ("null", 16)):
        run_script(tmp, "sample", *words, f"sample.size={size}", f"sample.out={tmp / size}")
        with Image.open(tmp / size / "000001.png") as image:
            assert image.width == width
    said = run_script(tmp, "sample", *words, "sample.size=20", code=2)
    assert "sample.size=20 must be height x width" in said
    said = run_script(tmp, "sample", *words, "sample.size=13x20", code=2)
    assert "multiple of 2" in said


@pytest.mark.slow
def test_an_image_is_edited_at_its_own_shape(tmp):
    words = [
        "run=whole",
        "sample.n=1",
        "sampler.steps=2",
        f"sample.image={tmp / 'images' / '4.png'}",
    ]
    run_script(tmp, "sample", *words, "sample.size=12x20", f"sample.out={tmp / 'edited'}")
    with Image.open(tmp / "edited" / "000000.png") as image:
        assert image.size == (20, 12)
    white = np.full((20, 40, 3), 255, dtype=np.uint8)
    white[:, 20:] = 0
    Image.fromarray(white).save(tmp / "mask.png")
    words += [f"sample.mask={tmp / 'mask.png'}", f"sample.out={tmp / 'half'}"]
    run_script(tmp, "sample", *words, "sample.size=12x20")
    halves = [
        np.array(Image.open(tmp / name / "000000.png"))[:, 10:] for name in ("edited", "half")
    ]
    assert not np.array_equal(*halves)


REFUSALS = {
    "alignment=embedded": "data.buckets does not go with alignment",
    "trainer.compile=true": "data.buckets does not go with trainer.compile=true",
    "data.augment=0.5": "data.augment=0.5 must be 0 with buckets",
    "data.balance=0.5": "data.balance=0.5 must be 0 with buckets",
    "data.crop=random": "data.crop=random does not go with buckets",
    "data.buckets=[16]": "data.buckets=16 must be height x width",
    "data.buckets=[15x17]": "must be a multiple of 2, not 15 x 17",
    "backbone=aligned_dit": "do not fit a network for",
}


@pytest.mark.parametrize("word", REFUSALS)
def test_what_does_not_go_with_buckets_is_refused_in_a_line(tmp, word):
    keys = [w for w in base(tmp) if not (word.startswith("backbone=") and w.startswith("backbone"))]
    done = train(tmp, "refused", word, base=keys, code=2)
    assert REFUSALS[word] in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_other_buckets_are_another_run(tmp):
    said = train(
        tmp, "whole", "trainer.max_steps=15", "data.buckets=[16x16]", base=base(tmp), code=2
    )
    assert "data.buckets" in said.stderr


@pytest.mark.slow
def test_a_report_on_several_sizes_is_refused(tmp):
    said = run_script(tmp, "evaluate", "run=whole", code=2)
    assert "trained with data.buckets" in said


@pytest.mark.slow
def test_a_dit_and_automatic_buckets(tmp):
    words = ["data.buckets=auto", "trainer.max_steps=6"]
    train(tmp, "dit", *words, base=base(tmp, backbone=DIT))
    kill_at(tmp, "dit-killed", 4, *words, base=base(tmp, backbone=DIT), saved=True)
    train(tmp, "dit-killed", *words, base=base(tmp, backbone=DIT))
    assert differences(tmp, "dit", "dit-killed") == []
