"""The page of a run, opened in a browser from the file system: what it shows, and what it cannot
be made to do. The runs are written by hand; those of test_page_runs.py are trained.
"""

import json
import math
import os
import re
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from browsing import Opened, chromium
from exact_resume.__main__ import main
from exact_resume.attempt import record_start
from exact_resume.callbacks import page as callback
from exact_resume.checkpoint.store import STATE, Store
from exact_resume.fingerprint import fingerprint
from exact_resume.metrics import MetricsCSV, read_rows, read_series
from exact_resume.page import chart, sections, write
from exact_resume.page.read import read_run
from exact_resume.page.write import write_page
from exact_resume.resume import Guarantee
from exact_resume.skips import SkipLog, SkippedBatch

ROWS = 100_000
SPIKE = 54_321  # the step of one large loss
EVIL = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@pytest.fixture
def show(browser):
    """Open a file; all of them are closed after the test."""
    yield partial(Opened, browser)
    for context in browser.contexts:
        context.close()


def make(home, *, steps=(4, 8, 12), name="train/loss", max_steps=20, rate=16.0):
    """Write a run with checkpoints, a record, one start and pictures."""
    config = {"trainer": {"max_steps": max_steps, "deterministic": True}, "data": {"batch_size": 4}}
    store = Store(home / "checkpoints")
    record = MetricsCSV(home / "metrics.csv")
    home.mkdir(parents=True, exist_ok=True)
    for step in range(1, max(steps) + 1):
        record.log_metrics({name: 1 / step, "train/images_per_second": rate}, step)
        if step in steps:
            record.log_metrics({"val/loss": 1.5 / step}, step)
            then = fingerprint(config, "digest").as_dict()
            weights = {"weights": torch.full((1000,), float(step))}
            store.commit(step, {"global_step": step} | weights, fingerprint=then)
    enter(home, 1, 0)
    (home / "samples").mkdir()
    for step in steps:
        color = (20 * step, 0, 255 - 20 * step)
        Image.new("RGB", (24, 16), color).save(home / "samples" / f"step-{step:08d}.png")
    return store


def enter(home, number, step, guarantee="bitwise", banner="a banner", data=()):
    folder = home / "attempts" / f"{number:03d}"
    folder.mkdir(parents=True)
    given = Guarantee(guarantee) if step else None
    record_start(folder, banner, step=step, max_steps=20, guarantee=given, data=data)
    (folder / "environment.json").write_text(json.dumps({"start": "now", "host": "here"}))


@pytest.fixture
def home(tmp_path):
    make(tmp_path / "runs" / "a")
    return tmp_path / "runs" / "a"


# --- What it shows


def test_it_opens_without_a_word_and_shows_what_is_known(show, home):
    enter(home, 2, 8, "same samples", "resumed from step 8\n    torch: 1 -> 2", ["3 were broken"])
    skip = SkippedBatch(5, 16, 4, "train/loss was nan", ("one.png", "two.png"))
    SkipLog(home / "skips.jsonl").add(skip)
    MetricsCSV(home / "evaluations.csv").replace({"evaluation/kid": 0.0125}, 8)
    write_page(home)
    opened = show(home / "index.html")
    opened.check()
    text = opened.text()
    for part in (
        *("12", "of 20, 60.0%", "about 2 s", "same samples", "resumed from step 8"),
        *("3 were broken", "train/loss was nan", "one.png, two.png", "16 to 19", "0.0125"),
        *("last", "best", "as written", "restart", "batch left out"),
    ):
        assert part in text, part
    titles = opened.run("[...document.querySelectorAll('.plot i[title]')].map(e => e.title)")
    assert "start 2 at step 8: same samples" in titles
    assert "the batch of step 5 is left out: train/loss was nan" in titles
    assert "finished" not in text


@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (1280, "dark")])
def test_it_fits_a_phone_and_the_dark(show, home, width, scheme):
    write_page(home)
    size = {"width": width, "height": 700}
    opened = show(home / "index.html", viewport=size, color_scheme=scheme)
    opened.check()
    assert opened.run("document.documentElement.scrollWidth") <= width
    back = opened.run("getComputedStyle(document.body).backgroundColor")
    shade = sum(map(int, re.findall(r"\d+", back)))
    assert (shade < 150) == (scheme == "dark")


def test_the_slider_goes_through_time_also_by_keys_and_after_a_move(show, home):
    write_page(home)
    moved = home.with_name("elsewhere")
    home.rename(moved)
    opened = show(moved / "index.html")
    page = opened.page

    def shown():
        page.wait_for_function("picture.complete && picture.naturalWidth === 24")
        return opened.run("picture.src.slice(-12)")

    assert shown() == "00000012.png"
    assert page.inner_text("#when") == "step 12"
    page.focus("#time")
    page.keyboard.press("ArrowLeft")
    assert shown() == "00000008.png"
    page.fill("#time", "0")
    assert shown() == "00000004.png"
    assert page.inner_text("#when") == "step 4"
    page.click("#play")
    page.wait_for_function("document.getElementById('when').textContent === 'step 12'")
    opened.check()


def test_a_page_elsewhere_finds_the_pictures(show, home, tmp_path):
    elsewhere = tmp_path / "other folder" / "page.html"
    elsewhere.parent.mkdir()
    assert main(["status", str(home), "--html", str(elsewhere)]) == 0
    opened = show(elsewhere)
    opened.page.wait_for_function("picture.complete && picture.naturalWidth === 24")
    opened.check()
    assert not (home / "index.html").exists()


def test_values_under_the_pointer_and_by_keys(show, home):
    write_page(home)
    opened = show(home / "index.html")
    plot = opened.page.locator(".plot").first
    box = plot.bounding_box()
    opened.page.mouse.move(box["x"] + box["width"] / 3, box["y"] + 20)
    output = opened.page.locator("figcaption output").first
    assert output.inner_text() == "step 4: train 0.25, val 0.375"
    opened.page.mouse.move(0, 0)
    plot.focus()
    opened.page.keyboard.press("ArrowLeft")
    assert output.inner_text() == "step 3: train 0.3333, val 0.375"
    assert "train/loss is 0.08333 at step 12" in plot.get_attribute("aria-label")
    opened.check()


def test_what_does_not_verify_is_said_by_status_and_not_read_in_training(home, capsys):
    store = Store(home / "checkpoints")
    state = store.path(8) / STATE
    state.write_bytes(state.read_bytes()[:-1] + b"x")
    write_page(home)
    assert "<td>as written</td>" in (home / "index.html").read_text()
    assert main(["status", str(home), "--html"]) == 1
    assert "2 of 3 checkpoints verify" in capsys.readouterr().out
    text = (home / "index.html").read_text()
    assert "state.ckpt has changed" in text
    assert "<td>as written</td>" not in text
    assert text.count('<span class="pill good">yes</span>') == 2


def test_a_run_that_is_finished_or_has_nothing_yet(show, home, tmp_path):
    make(tmp_path / "done", steps=(20,))
    write_page(tmp_path / "done")
    assert "finished" in show(tmp_path / "done" / "index.html").text()
    (tmp_path / "new" / "attempts").mkdir(parents=True)
    write_page(tmp_path / "new", live=True)
    opened = show(tmp_path / "new" / "index.html")
    opened.check()
    assert "training" in opened.text()


# --- The time line


def test_starts_of_an_abandoned_branch_are_not_on_the_time_line(home):
    for number, step in enumerate((9, 9, 4, 8), 2):
        enter(home, number, step)
    assert [start.number for start in read_run(home).entries()] == [1, 4, 5]
    write_page(home)
    text = (home / "index.html").read_text()
    assert "start 5 at step 8" in text
    assert "start 2 at step 9" not in text


def test_a_start_of_an_older_version_has_no_banner(home):
    (home / "attempts" / "001" / "start.json").unlink()
    enter(home, 2, 8)
    write_page(home)
    text = (home / "index.html").read_text()
    assert "stored no banner" in text
    assert "start 2 at step 8" in text


# --- Many rows


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """A run of 100,000 rows, whose first losses are huge, and one later loss is large."""
    home = tmp_path_factory.mktemp("long")
    noise = np.random.default_rng(0).normal(size=(ROWS + 1, 2))
    with (home / "metrics.csv").open("w") as file:
        file.write("step,train/loss,train/grad_norm,train/lr\n")
        for step in range(1, ROWS + 1):
            loss = 0.1 + 900 * math.exp(-step / 30) + 0.01 * abs(noise[step, 0])
            loss = 7.77 if step == SPIKE else loss
            lr = 1e-3 * (1 + math.cos(math.pi * step / ROWS))
            file.write(f"{step},{loss:.9g},{1 + 0.1 * abs(noise[step, 1]):.9g},{lr:.9g}\n")
    return home


def points(home):
    """Return the paths of the page: how many points each has."""
    paths = re.findall(r'<path class="([^"]*)" d="([^"]*)"', (home / "index.html").read_text())
    return {name: len(re.findall(r"\d+ \d+", path)) for name, path in paths}


def highest_near_the_spike(home):
    """Return the largest value that the drawing of the loss shows around the spike."""
    data = re.search(r'id="data"[^>]*>(.*?)</script>', (home / "index.html").read_text())
    curve = json.loads(data[1])["charts"][0][0]
    near = np.abs(np.array(curve["x"]) - SPIKE) < 1000
    values = np.array(curve.get("hi", curve["y"]))[near]
    return values.max()


def test_a_hundred_thousand_rows(show, long):
    write_page(long)
    size = (long / "index.html").stat().st_size
    opened = show(long / "index.html")
    opened.check()
    print(f"{ROWS:,} rows: {size:,} bytes, loaded in {opened.seconds:.2f} s")
    assert size < 250_000
    assert max(points(long).values()) <= 2 * chart.COLUMNS
    assert opened.run("document.querySelectorAll('svg *').length") < 50


def test_one_large_loss_is_seen_and_the_first_ones_do_not_flatten_the_rest(show, long):
    write_page(long)
    assert highest_near_the_spike(long) == 7.77
    opened = show(long / "index.html")
    plot = opened.page.locator(".plot").first
    box = plot.bounding_box()
    opened.page.mouse.move(box["x"] + box["width"] * SPIKE / ROWS, box["y"] + 20)
    assert "to 7.77)" in opened.page.locator("figcaption output").first.inner_text()
    curves = [chart.thin("loss", *read_series(long / "metrics.csv")["train/loss"])]
    scale = chart.fit_scale(curves)
    usual, spike = scale.place(np.array([0.1, 7.77])).tolist()
    assert usual - spike > chart.SIZE / 3, "the spike is drawn high above the rest"
    assert scale.high < 100


def test_control_means_alone_lose_the_large_loss(long, monkeypatch):
    def careless(name, steps, values):
        curve = chart.thin(name, steps, values)
        return chart.Curve(name, curve.x, *[curve.mean] * 3, curve.not_finite, curve.size)

    monkeypatch.setattr(sections, "thin", careless)
    write_page(long)
    assert highest_near_the_spike(long) < 1


def test_the_fast_reader_reads_as_the_other(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text('step,a,"b,c"\n1,0.5,\n2,nan,3\nx,1,1\n3,word,4\n4,1\n5,1e-3,7\n6,2')
    series = read_series(path)
    assert {name: [*map(tuple, np.stack(s).T)] for name, s in series.items() if name != "a"} == {
        "b,c": [(2, 3), (3, 4), (5, 7)]
    }
    assert series["a"][0].tolist() == [1, 2, 3, 5]
    assert [row["step"] for row in read_rows(path)] == ["1", "2", "3", "5"]
    path.write_text("step,a\n1,0.5\n2,nan\n3,0.25\n")
    assert chart.thin("a", *read_series(path)["a"]).not_finite.tolist() == [2]
    assert read_series(tmp_path / "none.csv") == {}
    path.write_text("a,b\n1,2\n")
    assert read_series(path) == {}


def test_any_values_are_drawn(show, tmp_path):
    columns = {
        "train/loss": [-1.0, 1e6, 0.5],
        "train/lr": [0.0],
        "one": [1.0, 1.0],
        "negative": [-5.0, -5.0],
        "wide": [1e-300, 1e300],
        "none": [math.nan],
        "some": [math.inf, 1.0],
        "tiny": [1e-30, 1.1e-30],
    }
    record = MetricsCSV(tmp_path / "metrics.csv")
    for name, values in columns.items():
        for step, value in enumerate(values):
            record.log_metrics({name: value}, step)
    write_page(tmp_path)
    opened = show(tmp_path / "index.html")
    opened.check()
    assert opened.run("document.querySelectorAll('.plot').length") == len(columns) - 1
    assert not re.search(r"\bnan\b|\binf", (tmp_path / "index.html").read_text(), re.IGNORECASE)


# --- Names that are no names


def write_evil(home):
    evil = home.with_name(EVIL.replace("/", "\u2215"))
    make(evil, name=f"train/{EVIL}")
    enter(evil, 2, 8, EVIL, EVIL, [EVIL])
    SkipLog(evil / "skips.jsonl").add(SkippedBatch(5, 16, 4, EVIL, (EVIL,)))
    MetricsCSV(evil / "evaluations.csv").replace({EVIL: 1.0}, 8)
    (evil / "attempts" / "001" / "environment.json").write_text(json.dumps({"host": EVIL}))
    write_page(evil)
    return evil / "index.html"


def test_names_are_text(show, home):
    opened = show(write_evil(home))
    opened.page.wait_for_timeout(100)
    assert opened.run("window.hacked") is None
    assert opened.run("document.scripts.length") == 2
    assert opened.text().count(EVIL) > 5
    opened.check()


@pytest.mark.parametrize("where", ["sections", "chart", "write", "json"])
def test_control_without_escaping_they_are_commands(show, home, where, monkeypatch):
    if where == "json":
        monkeypatch.setattr(write, "as_json", json.dumps)
    else:
        module = {"sections": sections, "chart": chart, "write": write}[where]
        monkeypatch.setattr(module, "escape", str)
    opened = show(write_evil(home))
    opened.page.wait_for_timeout(100)
    assert opened.run("window.hacked") == 1 or opened.problems


# --- Writing


class Cut:
    """A file that writes half of the data; then its process is killed."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def write(self, data):
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        os.kill(os.getpid(), signal.SIGKILL)


def kill_a_write(home, *, careless=False):
    """Write the page in another process, which is killed in the middle."""
    child = os.fork()
    if child == 0:
        opened = Path.open
        Path.open = lambda path, mode="r", *rest, **options: (
            Cut(opened(path, mode)) if "w" in mode else opened(path, mode, *rest, **options)
        )
        if careless:
            write.atomic_write = lambda path, **_: path.open("wb")
        try:
            write_page(home)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_a_killed_write_leaves_the_old_page_and_the_next_one_cleans_up(home):
    write_page(home)
    before = (home / "index.html").read_bytes()
    kill_a_write(home)
    assert (home / "index.html").read_bytes() == before
    write_page(home)
    assert [path.name for path in home.glob("*index.html*")] == ["index.html"]


def test_control_a_careless_write_loses_the_old_page(home):
    write_page(home)
    before = (home / "index.html").read_bytes()
    kill_a_write(home, careless=True)
    assert (home / "index.html").read_bytes() != before


def test_nothing_else_is_written_and_no_other_file_is_replaced(home, capsys):
    before = {path: path.stat().st_mtime_ns for path in home.rglob("*") if path.is_file()}
    assert main(["status", str(home), "--html"]) == 0
    after = {path: path.stat().st_mtime_ns for path in home.rglob("*") if path.is_file()}
    assert after.keys() - before.keys() == {home / "index.html"}
    assert {path: after[path] for path in before} == before
    assert main(["status", str(home), "--html", str(home / "metrics.csv")]) == 2
    assert "metrics.csv is there and is no page of a run" in capsys.readouterr().err
    assert (home / "metrics.csv").stat().st_mtime_ns == before[home / "metrics.csv"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["nowhere", "--html"], "nowhere is not there; give the directory of a run"),
        (["empty", "--html"], "empty holds nothing of a run; give the directory of a run"),
        (["a", "--html", "nowhere/x.html"], "nowhere/x.html cannot be written: No such file"),
        (["a", "--html", "empty"], "empty cannot be written: Is a directory"),
        (["a", "--html", "x.html", "y.html"], "usage: "),
        (["a", "--htm"], "usage: "),
    ],
)
def test_mistakes(words, text, home, capsys, monkeypatch):
    monkeypatch.chdir(home.parent)
    Path("empty").mkdir()
    assert main(["status", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert text in err
    assert err.count("\n") == 1
    assert [*Path("empty").iterdir()] == []


@pytest.mark.parametrize("name", ["skips.jsonl", "evaluations.csv"])
def test_a_damaged_file_is_said_and_the_rest_is_shown(show, home, name):
    (home / name).write_bytes(b"step,a\n\xff\xfe\n{\n")
    write_page(home)
    opened = show(home / "index.html")
    opened.check()
    assert f"{name} cannot be read" in opened.text()
    assert "of 20, 60.0%" in opened.text()


def test_a_page_that_takes_long_is_written_rarely(home, monkeypatch):
    class Trainer:
        is_global_zero = True
        logger = MetricsCSV(home / "metrics.csv")

    page = callback.Page()
    page.on_validation_end(Trainer(), None)
    assert (home / "index.html").exists()
    monkeypatch.setattr(callback, "CHEAP", 0.0)
    page.on_validation_end(Trainer(), None)
    (home / "index.html").unlink()
    page.on_validation_end(Trainer(), None)
    assert not (home / "index.html").exists()
    page.write(Trainer(), live=False)
    assert (home / "index.html").exists(), "the last page is always written"
