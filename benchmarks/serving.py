"""Measure what serving costs: python benchmarks/serving.py [run] [overrides]

Images a second of the sampler alone, in batches, and of serve.py under as many clients as a batch
has images. Prints their ratio. Without a run, a tiny one is trained, whose images take
milliseconds: the ratio of a real run is nearer to 1.
"""

import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hydra import compose, initialize_config_dir

from sturdy.sampling.loaded_run import open_run, prepare_torch
from sturdy.serving.checkpoint import CheckpointSampler
from sturdy.serving.words import Words

ROOT = Path(__file__).resolve().parents[1]
CLIENTS = 8
REQUESTS = 400
STEPS = 20
ROUNDS = 3
TINY = (
    "experiment=cars trainer=cpu trainer.threads=1 trainer.max_steps=2 data.image_size=32 "
    "data.source.n=60 backbone.width=64 backbone.depth=4 callbacks.samples=null"
).split()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        words = sys.argv[1:]
        if not words:
            paths = [f"paths.runs={folder}/runs", f"paths.cache={folder}/cache"]
            train = [sys.executable, str(ROOT / "train.py"), *TINY, *paths, "name=tiny"]
            subprocess.run(train, check=True, stdout=subprocess.DEVNULL)
            words = ["run=tiny", *paths]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        words += ["threads=1", f"serve.port={port}", f"serve.log={folder}/log"]
        bare, served = compare(words, port)
    print(f"| bare, batches of {CLIENTS} | {bare:.1f} images/s |")
    print(f"| served, {CLIENTS} clients | {served:.1f} images/s |")
    print(f"| ratio | {served / bare:.2f} |")


def compare(words: list[str], port: int) -> tuple[float, float]:
    """Return images a second, bare and served; they take turns, so that both see the same load."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("serve", words)
    prepare_torch(cfg)
    sampler = CheckpointSampler(cfg, open_run(cfg))
    print(f"images that are drawn together: {sampler.batch_sizes}")
    server = subprocess.Popen([sys.executable, str(ROOT / "serve.py"), *words])
    try:
        wait_until_ready(port, server)
        served(port, CLIENTS)
        results = [(bare(sampler), served(port)) for _ in range(ROUNDS)]
    finally:
        server.terminate()
        server.wait()
    return max(b for b, _ in results), max(s for _, s in results)


def bare(sampler: CheckpointSampler) -> float:
    requests = [Words(seed=seed, steps=STEPS) for seed in range(REQUESTS)]
    start = time.perf_counter()
    for first in range(0, REQUESTS, CLIENTS):
        sampler.draw(requests[first : first + CLIENTS])
    return REQUESTS / (time.perf_counter() - start)


def served(port: int, n: int = REQUESTS) -> float:
    def ask(seed: int) -> None:
        body = json.dumps({"seed": seed, "steps": STEPS}).encode()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/draw", body) as response:
            response.read()

    start = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(ask, range(n)))
    return n / (time.perf_counter() - start)


def wait_until_ready(port: int, server: subprocess.Popen[bytes]) -> None:
    while server.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise SystemExit("the server did not start")


if __name__ == "__main__":
    main()
