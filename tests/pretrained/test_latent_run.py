"""Real runs in latents: killed and resumed bit for bit, and drawn from, by the scripts."""

import json
import shutil

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image

from exact_resume.checkpoint.store import Store, load_state
from runs import COMMON, ROOT, command, differences, kill_at, run_script, train
from sturdy.data.cache_writer import seal
from sturdy.sampling.sample import main as draw
from sturdy.training.run import train as train_in_process
from tiny_vae import write_vae

pytest.importorskip("diffusers")

DIT = [*COMMON, "backbone=dit", "backbone.width=16", "backbone.depth=1", "backbone.heads=2"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with an autoencoder and the run ``whole``, and what its start said."""
    tmp = tmp_path_factory.mktemp("latents")
    write_vae(tmp / "vae")
    return tmp, train(tmp, "whole", base=base(tmp))


def base(tmp):
    return [*DIT, "space=latents", f"space.path={tmp / 'vae'}"]


def test_the_start_says_what_it_cached(home):
    tmp, done = home
    assert "latents of 60 images (4 x 4 x 4) cached in" in done.stdout
    assert done.stderr == ""
    again = train(tmp, "whole", base=base(tmp))
    assert "finished at step 12" in again.stdout
    assert "another configuration" not in again.stdout


def test_the_autoencoder_is_in_no_checkpoint(home):
    tmp, _ = home
    store = Store(tmp / "runs" / "whole" / "checkpoints")
    state = load_state(store.state(12))
    shapes = {tuple(tensor.shape) for tensor in state["state_dict"].values()}
    assert (8, 3, 3, 3) not in shapes, "the first convolution of the encoder"
    assert all(name.startswith(("denoiser.", "ema.")) for name in state["state_dict"])
    assert state["config"]["space"]["channels"] == 4
    assert state["config"]["backbone"]["image_channels"] == 4


def test_a_killed_run_continues_bit_for_bit_also_from_another_place(home):
    tmp, _ = home
    kill_at(tmp, "killed", 6, base=base(tmp), saved=True)
    shutil.copytree(tmp / "vae", tmp / "elsewhere", dirs_exist_ok=True)
    said = train(tmp, "killed", f"space.path={tmp / 'elsewhere'}", base=base(tmp)).stdout
    assert "resumed from step" in said
    assert "bitwise" in said
    assert differences(tmp, "whole", "killed") == []


def test_images_are_drawn_where_the_autoencoder_lies_now(home):
    tmp, _ = home
    words = ["run=whole", "sample.n=2", "sampler.steps=2", f"sample.out={tmp / 'drawn'}"]
    moved = tmp / "moved"
    (tmp / "vae").rename(moved)
    try:
        assert f"{tmp / 'vae'} is not there" in run_script(tmp, "sample", *words, code=2)
        run_script(tmp, "sample", *words, f"space.path={moved}")
        said = run_script(tmp, "sample", *words, f"condition.path={moved}", code=2)
    finally:
        moved.rename(tmp / "vae")
    assert "this run has no condition with a path" in said


def test_latents_with_other_bits_are_noticed(home):
    """As when another device has made the cache anew."""
    tmp, _ = home
    kill_at(tmp, "other-bits", 6, base=base(tmp), saved=True)
    shutil.copytree(tmp / "cache", tmp / "of-another-device")
    [path] = [p for p in (tmp / "of-another-device").glob("*/manifest.json") if is_latents(p)]
    manifest = json.loads(path.read_text())
    del manifest["seal"]
    manifest["digest"] = "0" * len(manifest["digest"])
    path.write_text(json.dumps(manifest | {"seal": seal(manifest)}))
    cache = f"paths.cache={tmp / 'of-another-device'}"
    said = train(tmp, "other-bits", cache, base=base(tmp)).stdout
    assert "same samples" in said
    assert "latents" in said
    assert "bitwise" not in said


def is_latents(path):
    return json.loads(path.read_text())["channels"] == 8


def test_encoding_at_every_step_gives_the_same_bits(home):
    tmp, _ = home
    said = train(tmp, "live", "space.cached=false", base=base(tmp)).stdout
    assert "latents of" not in said
    assert differences(tmp, "whole", "live") == []


REFUSALS = {
    "data.image_size=18": ["data.image_size=18 must be a multiple of 4"],
    "data.augment=0.5": ["data.augment=0.5 must be 0", "space.cached=false"],
    "alignment=embedded": ["alignment=none", "space.cached=false"],
    "space.path=/nowhere": ["/nowhere is not there"],
    "space.channels=3": ["space.channels=3 must be 4"],
}


def test_what_does_not_go_together_is_refused_in_a_line(home, capsys):
    tmp, _ = home
    write_vae(tmp / "other", seed=1)
    refusals = REFUSALS | {
        f"name=whole trainer.max_steps=13 space.path={tmp / 'other'}": ["space.key: "]
    }
    for words, texts in refusals.items():
        overrides = [*command(tmp, "refused", base=base(tmp))[2:], *words.split()]
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            cfg = compose("train", overrides)
        assert train_in_process(cfg, overrides) == 2, words
        said = capsys.readouterr().err
        assert all(text in said for text in texts), f"{words}: {said}"
        assert "Traceback" not in said


def test_settings_of_pixels_are_pointed_out(home):
    tmp, _ = home
    inner = "schedule.schedule._target_=sturdy.diffusion.schedule.ScaledLinear"
    words = ["target=preconditioned", "schedule=shifted", inner, "trainer.max_steps=1"]
    said = train(tmp, "scales", *words, base=base(tmp)).stdout
    assert "schedule.image_size=16 counts pixels" in said
    assert "schedule.image_size=4" in said
    assert "target.sigma_data=0.5 is not the standard deviation of the latents" in said


def test_an_image_is_edited_where_the_mask_is_white(home):
    tmp, _ = home
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    white = np.zeros((16, 16), dtype=bool)
    white[4:10, 3:9] = True
    Image.fromarray(image).save(tmp / "image.png")
    Image.fromarray(np.uint8(255) * white).save(tmp / "mask.png")
    edits = {"all": [], "hole": [f"sample.mask={tmp / 'mask.png'}"]}
    drawn = {}
    for name, words in edits.items():
        overrides = [f"paths.runs={tmp / 'runs'}", "run=whole", "sample.n=2", "device=cpu"]
        overrides += [f"sample.image={tmp / 'image.png'}", f"sample.out={tmp / name}", *words]
        threads = torch.get_num_threads()
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            assert draw(compose("sample", overrides), overrides) == 0
        torch.set_num_threads(threads)
        drawn[name] = np.asarray(Image.open(tmp / name / "000001.png"))
    assert (drawn["hole"][~white] == image[~white]).all()
    assert (drawn["hole"][white] != image[white]).any()
    assert (drawn["all"][~white] != image[~white]).any()
