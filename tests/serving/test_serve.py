"""A real server, asked over HTTP: the bytes of sample.py, whatever else happens to it."""

import json
import os
import random
import shutil
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from exact_resume.checkpoint.store import Store
from runs import SMALL_UNET, run_script, train
from servers import RunningServer

pytest.importorskip("litserve")
pytest.importorskip("prometheus_client")

CHROMIUM = Path("/usr/bin/chromium")
QUEUE = 12
WORDS = [
    {"seed": 0, "label": "sedan", "steps": 3, "guidance": 2},
    {"seed": 7, "label": "pickup", "steps": 3, "guidance": 2},
    {"seed": 7, "label": "pickup", "steps": 3, "guidance": 1},
    {"seed": 2**40},
]
KEYS = {"label": "sample.label", "steps": "sampler.steps", "guidance": "guidance.scale"}
KEYS |= {"seed": "sample.seed"}
LONG = {"steps": 60, "guidance": 2}


@pytest.fixture(scope="module")
def tmp(tmp_path_factory):
    """A run of four steps, whose last checkpoint was not there when the server started."""
    tmp = tmp_path_factory.mktemp("serve")
    words = ["trainer.max_steps=4", "trainer.val_check_interval=2"]
    words += ["callbacks.checkpoint.every_n_train_steps=2", "callbacks.samples.every_n_steps=null"]
    words += ["optimizer.lr=0.02", "learning_rate.warmup=1", "ema.decay=0.1"]  # labels must count
    train(tmp, "run", *words, base=SMALL_UNET)
    store = Store(tmp / "runs" / "run" / "checkpoints")
    assert store.steps() == [2, 4]
    store.path(4).rename(tmp / "newer")
    return tmp


@pytest.fixture(scope="module")
def server(tmp):
    server = RunningServer(tmp, "run", f"serve.queue={QUEUE}", "serve.log=null")
    yield server
    server.stop()


def sampled(tmp, words, *more):
    """Return the file that sample.py writes for the same words."""
    out = tmp / f"sampled-{time.monotonic_ns()}"
    options = [f"{KEYS[name]}={value}" for name, value in words.items()]
    given = ["run=run", "device=cpu", "sample.n=1", f"sample.out={out}"]
    run_script(tmp, "sample", *given, *options, *more)
    return (out / "000000.png").read_bytes()


def test_the_bytes_are_those_of_sample_whatever_is_drawn_with_them(tmp, server):
    expected = [sampled(tmp, words) for words in WORDS]
    assert len(set(expected)) == len(expected)
    assert [server.draw(**words) for words in WORDS] == [(200, file, 2) for file in expected]
    order = random.Random(0).choices(range(len(WORDS)), k=64)
    replies = server.draw_all([WORDS[k] for k in order])
    assert replies == [(200, expected[k], 2) for k in order]
    batches = server.metric("sturdy_batch_size_sum")
    assert batches > server.metric("sturdy_batch_size_count"), "some were drawn together"


MISTAKES = {
    '{"label": "pickp"}': "label=pickp is no class of this run; near it are: pickup",
    '{"label": "zebra"}': "there are: hatchback, sedan, coupe, suv, pickup and 3 more",
    '{"label": 3}': "label must be a text of at most 200 characters",
    '{"prompt": "a car"}': "prompt: this run was trained without captions",
    '{"seed": -1}': "seed must be a whole number from 0 to 9007199254740991",
    '{"seed": true}': "seed must be a whole number",
    '{"seed": 1.5}': "seed must be a whole number",
    '{"seed": 9007199254740992}': "seed must be a whole number",
    '{"steps": 0}': "steps must be a whole number from 1 to 250",
    '{"steps": 251}': "steps must be a whole number from 1 to 250",
    '{"guidance": -0.1}': "guidance must be a number from 0 to 30",
    '{"guidance": NaN}': "guidance must be a number from 0 to 30",
    '{"guidance": 31}': "guidance must be a number from 0 to 30",
    '{"guidance": "2"}': "guidance must be a number from 0 to 30",
    '{"image": "/etc/passwd"}': "image is no word of a request; there are: seed, label, prompt",
    "[1]": "the body must be a JSON object",
    '{"seed": 1': "the body must be JSON",
    "[" * 50_000: "the body must be JSON",
    "\xff": "the body must be JSON",
}


@pytest.mark.parametrize("body", MISTAKES, ids=lambda body: body[:30])
def test_a_mistake_is_answered_with_a_line(server, body):
    reply = server.post(body.encode("latin1"))
    assert reply.status == 422
    assert MISTAKES[body] in reply.detail
    assert "\n" not in reply.detail


def test_a_large_body_is_refused(server):
    reply = server.post(b'{"label": "' + b"a" * 100_000 + b'"}')
    assert (reply.status, reply.detail) == (413, "Payload too large")


def test_what_does_not_fit_the_queue_is_told_so_and_the_rest_is_drawn(server):
    replies = server.draw_all([{"seed": k, **LONG} for k in range(3 * QUEUE)], 3 * QUEUE)
    full = [reply for reply in replies if reply.status == 503]
    assert full
    assert {reply.detail for reply in full} == {f"{QUEUE} requests wait already; try again"}
    drawn = [reply for reply in replies if reply.status == 200]
    assert len(drawn) >= QUEUE
    assert len(drawn) + len(full) == len(replies)


def in_flight(server, requests, do):
    """Ask all at once, ``do`` something when all wait, and return the replies."""
    replies = []
    asking = threading.Thread(target=lambda: replies.extend(server.draw_all(requests)))
    asking.start()
    while server.metric("sturdy_waiting_requests") < len(requests):
        time.sleep(0.01)
    do()
    asking.join()
    return replies


def test_a_worker_that_is_killed_loses_no_request(server):
    requests = [{"seed": k, **LONG} for k in range(8)]
    killed = in_flight(server, requests, server.kill_worker)
    assert [reply.status for reply in killed] == [200] * 8, server.said()
    assert server.metric("sturdy_workers_lost_total") == 1
    assert server.metric("sturdy_requests_again_total") >= 1
    assert server.draw_all(requests) == killed
    assert server.get("/health").status == 200
    assert "a worker was lost" in server.said()
    server.kill_worker()  # while it waits; what comes before this is noticed is not lost either
    assert server.draw_all(requests[:2]) == killed[:2]
    assert server.metric("sturdy_workers_lost_total") == 2


def test_a_newer_checkpoint_is_taken_up_unless_it_is_damaged(tmp, server):
    store = Store(tmp / "runs" / "run" / "checkpoints")
    words = WORDS[1]
    before = server.draw(**words)
    assert before.step == 2
    damaged = tmp / "damaged"
    shutil.copytree(tmp / "newer", damaged)
    content = bytearray((damaged / "state.ckpt").read_bytes())
    content[len(content) // 2] ^= 1
    (damaged / "state.ckpt").write_bytes(content)
    damaged.rename(store.path(6))
    wait_for(lambda: "step 6 is left aside" in server.said())
    assert server.draw(**words) == before

    stop = threading.Event()
    replies = []

    def keep_asking():
        while not stop.is_set():
            replies.append(server.draw(**words))

    asking = [threading.Thread(target=keep_asking) for _ in range(4)]
    for thread in asking:
        thread.start()
    (tmp / "newer").rename(store.path(4))
    wait_for(lambda: any(reply.step == 4 for reply in replies[:]))
    stop.set()
    for thread in asking:
        thread.join()
    after = (200, sampled(tmp, words, "ckpt_path=4"), 4)
    assert after[1] != before.body
    assert set(replies) == {before, after}
    assert server.said().count("step 6 is left aside") == 1
    assert server.said().count("step 4 is taken up") == 1
    shutil.rmtree(store.path(6))


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_page_draws(tmp, server):
    if not CHROMIUM.exists():
        pytest.skip("there is no /usr/bin/chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        page = browser.new_page()
        said = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(server.url("/"))
        page.select_option("#label", "pickup")
        page.fill("#seed", "7")
        page.fill("#steps", "3")
        page.click("#draw")
        page.wait_for_selector("#command:visible", timeout=60_000)
        assert page.evaluate("document.getElementById('image').naturalWidth") == 16
        command = page.inner_text("#words")
        page.fill("#seed", "1e99")
        page.evaluate("document.getElementById('form').noValidate = true")
        page.click("#draw")
        page.wait_for_selector("#said.wrong", timeout=60_000)
        assert "seed must be a whole number" in page.inner_text("#said")
        browser.close()
    assert [text for text in said if "422" not in text] == []
    local = (server.url("/"), "blob:", "data:")
    assert [url for url in asked if not url.startswith(local)] == []
    assert command.startswith("python sample.py ")
    assert "sample.n=1 sample.seed=7 sample.label=pickup sampler.steps=3" in command
    assert "ckpt_path=" in command


def test_each_request_is_in_the_log(tmp, server):
    reply = server.draw(seed=12345, label="van", steps=1)
    lines = (tmp / "runs" / "run" / "serve.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert last["seconds"] >= 0
    assert last["time"].endswith("Z")
    known = {name: last[name] for name in ("seed", "label", "steps", "step", "status")}
    expected = {"seed": 12345, "label": "van", "steps": 1, "step": reply.step, "status": 200}
    assert known == expected


def test_a_second_server_is_told_that_the_port_is_in_use(tmp, server):
    said = run_script(tmp, "serve", "run=run", f"serve.port={server.port}", code=2)
    assert f"error: serve.port={server.port} cannot be used" in said


def test_a_signal_ends_it_after_the_last_answer(server):
    """The signal comes to all its processes, as from a service manager."""
    requests = [{"seed": k, **LONG} for k in range(4)]
    replies = in_flight(server, requests, lambda: os.killpg(server.process.pid, signal.SIGTERM))
    assert [reply.status for reply in replies] == [200] * 4
    assert server.stop() == 0
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", server.port)) != 0
    assert "Traceback" not in server.said()
    lines = server.said().splitlines()
    assert any(f"is served at http://127.0.0.1:{server.port}" in line for line in lines)
