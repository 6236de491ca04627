"""Requests in one process: which are drawn together, and that this changes no bit."""

import pytest
import torch
from hydra import compose, initialize_config_dir

from runs import ROOT, SMALL_UNET, train
from sturdy.sampling.loaded_run import open_run
from sturdy.serving.checkpoint import CheckpointSampler
from sturdy.serving.main import main
from sturdy.serving.words import Words


@pytest.fixture(scope="module")
def tmp(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("requests")
    words = ["trainer.max_steps=2", "trainer.val_check_interval=2", "callbacks.samples=null"]
    words += ["optimizer.lr=0.02", "learning_rate.warmup=1", "ema.decay=0.1"]
    train(tmp, "run", *words, base=SMALL_UNET)
    return tmp


def config(tmp, *words):
    given = [f"paths.runs={tmp / 'runs'}", "run=run", "device=cpu", "threads=1", *words]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("serve", given)


@pytest.fixture(scope="module")
def sampler(tmp):
    cfg = config(tmp)
    return CheckpointSampler(cfg, open_run(cfg))


REQUESTS = [
    Words(seed=seed, label=label, steps=steps, guidance=guidance)
    for seed, label in ((0, "van"), (1, "bus"), (2, "van"), (3, None))
    for steps in (2, 3)
    for guidance in (None, 1.0, 3.0)
]


def test_an_image_does_not_depend_on_its_company(sampler):
    alone = [sampler.draw([words])[0] for words in REQUESTS]
    assert len(set(alone)) > len(alone) / 2
    assert sampler.draw(REQUESTS) == alone
    assert sampler.draw(REQUESTS[::-1]) == alone[::-1]


def test_what_asks_for_the_same_settings_is_drawn_together(sampler, monkeypatch):
    sizes = []

    def note(words):
        sizes.append(len(words))
        return images(words)

    images = sampler._images
    monkeypatch.setattr(sampler, "_images", note)
    monkeypatch.setattr(sampler, "batch_sizes", {1.0: 2, 2.0: 3})
    sampler.draw([Words(seed=k, guidance=2.0) for k in range(7)])
    sampler.draw([Words(seed=k, guidance=1.0) for k in range(4)])
    sampler.draw([Words(steps=2), Words(steps=3), Words(seed=1, steps=2)])
    assert sizes == [3, 3, 1, 2, 2, 2, 1]


def test_control_a_batch_that_rounds_otherwise_is_never_drawn(sampler):
    """A network whose last bits depend on the size of the batch, as with kernels of a GPU."""

    def nudge(module, arguments, output):
        return output * (1 + 1e-6) if len(output) >= 2 * 3 else output

    handle = sampler.network.register_forward_hook(nudge)
    try:
        with torch.no_grad():
            assert sampler.exact_batch_size(2.0, 8) == 2
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("serve.port=80", "serve.port=80 must be a whole number of at least 1024"),
        ("serve.port=70000", "serve.port=70000 must be at most 65535"),
        ("serve.host=example.org", "serve.host=example.org must be one of 127.0.0.1, 0.0.0.0, ::"),
        ("serve.queue=0", "serve.queue=0 must be a whole number of at least 1"),
        ("serve.max_guidance=x", "serve.max_guidance=x must be a number of at least 0"),
        ("serve.exact=maybe", "serve.exact=maybe must be true or false"),
        ("run=rum", "run=rum is not there"),
        ("sampler.steps=0", "steps"),
    ],
)
def test_a_mistaken_command_is_told_so(tmp, capsys, monkeypatch, word, line):
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    assert main(config(tmp, word), [word]) == 2
    said = capsys.readouterr().err
    assert line in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    torch.use_deterministic_algorithms(False)


def test_a_missing_extra_is_named(tmp, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(config(tmp), []) == 2
    assert "pip install 'sturdy-diffusion[serve]'" in capsys.readouterr().err
    torch.use_deterministic_algorithms(False)
