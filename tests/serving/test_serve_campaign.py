"""Thousands of requests while a worker is killed and a checkpoint replaced; and the control."""

import os
import random
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from exact_resume.checkpoint.store import Store
from runs import ROOT, run_script, train
from servers import RunningServer
from sturdy.sampling.loaded_run import open_run
from sturdy.serving.checkpoint import CheckpointSampler
from sturdy.serving.words import Words

pytest.importorskip("litserve")
pytest.importorskip("prometheus_client")
pytestmark = pytest.mark.slow

REQUESTS = int(os.environ.get("STURDY_SERVE_REQUESTS", "10000"))
CLIENTS = 8
LABELS = ("hatchback", "sedan", "pickup", "bus")
WORDS = [
    Words(seed, label, steps=steps, guidance=guidance)
    for seed in range(5)
    for label in LABELS
    for steps, guidance in ((2, 2.0), (3, 2.0), (2, 1.0))
]


@pytest.fixture(scope="module")
def tmp(tmp_path_factory):
    """A run of four steps, whose last checkpoint is aside."""
    tmp = tmp_path_factory.mktemp("campaign")
    words = ["trainer.max_steps=4", "trainer.val_check_interval=2", "callbacks.samples=null"]
    words += ["callbacks.checkpoint.every_n_train_steps=2"]
    words += ["optimizer.lr=0.02", "learning_rate.warmup=1", "ema.decay=0.1"]  # labels must count
    train(tmp, "run", *words)
    return tmp


def expected_files(tmp):
    """Return the file of each (words, step): each drawn alone."""
    given = [f"paths.runs={tmp / 'runs'}", "run=run", "device=cpu", "serve.exact=false"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("serve", given)
    torch.set_num_threads(1)
    files = {}
    for step in (2, 4):
        sampler = CheckpointSampler(cfg, open_run(OmegaConf.merge(cfg, {"ckpt_path": step})))
        files |= {(words, step): sampler.draw([words])[0] for words in WORDS}
    return files


def given_words(words):
    return {name: value for name, value in words._asdict().items() if value is not None}


def test_a_killed_worker_and_a_newer_checkpoint_lose_nothing(tmp, capsys):
    expected = expected_files(tmp)
    assert len(set(expected.values())) > 0.9 * len(expected)
    sampled = WORDS[3]
    options = {"sample.seed": sampled.seed, "sample.label": sampled.label}
    options |= {"sampler.steps": sampled.steps, "guidance.scale": sampled.guidance}
    words = [f"{name}={value}" for name, value in options.items() if value is not None]
    run_script(tmp, "sample", "run=run", "device=cpu", "sample.n=1", f"sample.out={tmp}/a", *words)
    assert (Path(tmp) / "a" / "000000.png").read_bytes() == expected[sampled, 4]

    store = Store(tmp / "runs" / "run" / "checkpoints")
    store.path(4).rename(tmp / "newer")
    server = RunningServer(tmp, "run")
    requests = random.Random(0).choices(WORDS, k=REQUESTS)
    done = 0

    def ask(words):
        nonlocal done
        reply = server.draw(**given_words(words))
        done += 1
        if done == REQUESTS // 3:
            server.kill_worker()
        if done == 2 * REQUESTS // 3:
            (tmp / "newer").rename(store.path(4))
        return reply

    start = time.monotonic()
    try:
        with ThreadPoolExecutor(CLIENTS) as pool:
            replies = list(pool.map(ask, requests))
        seconds = time.monotonic() - start
        killed = server.metric("sturdy_workers_lost_total")
        again = server.metric("sturdy_requests_again_total")
        images = server.metric("sturdy_batch_size_count")
        together = server.metric("sturdy_batch_size_sum") / images
    finally:
        code = server.stop()
    lost = [reply for reply in replies if reply.status != 200]
    wrong = 0
    for words, reply in zip(requests, replies, strict=True):
        wrong += reply.status == 200 and reply.body != expected[words, reply.step]
    steps = {step: sum(reply.step == step for reply in replies) for step in (2, 4)}
    with capsys.disabled():
        print(
            f"\n{REQUESTS} requests, {CLIENTS} at a time, in {seconds:.0f} s: {len(lost)} lost, "
            f"{wrong} wrong; {killed:.0f} worker killed, {again:.0f} asked again; by step {steps}; "
            f"{together:.1f} together on average"
        )
    assert (len(lost), wrong, killed, code) == (0, 0, 1, 0), server.said()
    assert min(steps.values()) > 0


def test_control_without_another_try_the_requests_of_a_killed_worker_fail(tmp):
    shutil.rmtree(tmp / "newer", ignore_errors=True)
    server = RunningServer(tmp, "run", "serve.retries=0")
    try:
        with ThreadPoolExecutor(CLIENTS) as pool:
            long = {"steps": 100, "guidance": 2}
            asked = [pool.submit(server.draw, seed=seed, **long) for seed in range(CLIENTS)]
            while server.metric("sturdy_waiting_requests") < CLIENTS:
                time.sleep(0.01)
            server.kill_worker()
            replies = [future.result() for future in asked]
    finally:
        server.stop()
    assert 503 in {reply.status for reply in replies}
    assert {reply.status for reply in replies} <= {200, 503}
