"""The page of real runs: a stock Lightning script and a run of the template, both killed once."""

import json
import shutil

import pytest

from browsing import Opened, chromium
from exact_resume.__main__ import main
from exact_resume.checkpoint.store import Store
from exact_resume.metrics import MetricsCSV
from runs import ROOT, differences, fork, kill_at, train

SCRIPT = ROOT / "examples" / "plain_lightning" / "train.py"
EVERY = 50  # steps between two checkpoints of it
STEPS = 200


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The directory of a stock run; it is killed once, and the page of then lies beside it."""
    tmp = tmp_path_factory.mktemp("plain")
    home = tmp / "spirals"
    words = [str(SCRIPT), str(home), str(STEPS)]
    process, out, err = fork(tmp, "spirals", words)
    store = Store(home / "checkpoints")
    record = MetricsCSV(home / "metrics.csv")
    while process.exitcode is None and not (store.steps() and 100 in record.column("val/loss")):
        pass
    process.kill()
    process.join()
    assert process.exitcode == -9, out.read_text() + err.read_text()
    shutil.copy(home / "index.html", tmp / "then.html")
    process, out, err = fork(tmp, "spirals", words)
    process.join(120)
    assert process.exitcode == 0, out.read_text() + err.read_text()
    return home


def test_a_stock_lightning_run_has_a_page(plain):
    assert ">training</span>" in (plain.parent / "then.html").read_text()
    starts = [json.loads(p.read_text()) for p in sorted(plain.glob("attempts/*/start.json"))]
    assert [start["guarantee"] for start in starts] == ["fresh", "bitwise"]
    rate = MetricsCSV(plain / "metrics.csv").column("train/lr")
    assert sorted(rate) == list(range(1, STEPS + 1))
    assert rate[1] == pytest.approx(3e-3), "the rate of the step, and not of the next"
    assert rate[STEPS] > 0
    with chromium() as browser:
        opened = Opened(browser, plain / "index.html")
        opened.check()
        text = opened.text()
        for part in ("finished", "Learning rate", "val/accuracy", "restart", starts[1]["banner"]):
            assert part in text, part
        title = opened.page.locator(".plot i.start").first.get_attribute("title")
        assert title == f"start 2 at step {starts[1]['step']}: bitwise"
    saved = Store(plain / "checkpoints").steps()
    assert (plain / "index.html").read_text().count("<td>as written</td>") == len(saved)


def test_status_makes_the_page_of_a_run_that_has_none(plain, tmp_path, capsys):
    assert main(["status", str(plain), "--html", str(tmp_path / "x.html")]) == 0
    assert "3 of 3 checkpoints verify" in capsys.readouterr().out
    with chromium() as browser:
        opened = Opened(browser, tmp_path / "x.html")
        opened.check()
        assert "as written" not in opened.text()


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A folder with the runs ``killed``, whose page comes later, and ``plain``, without a page."""
    tmp = tmp_path_factory.mktemp("template")
    train(tmp, "plain", "callbacks.page=null")
    kill_at(tmp, "killed", 7, "callbacks.page=null", saved=True)
    assert not (tmp / "runs" / "killed" / "index.html").exists()
    train(tmp, "killed")
    return tmp


def test_a_page_changes_no_bit_and_is_no_other_run(template):
    assert not (template / "runs" / "plain" / "index.html").exists()
    assert differences(template, "plain", "killed") == []
    start = json.loads((template / "runs/killed/attempts/002/start.json").read_text())
    assert start["guarantee"] == "bitwise"
    assert start["data"] == ["no image is left out"]


def test_the_grids_of_a_run_go_through_time_also_where_it_was_moved(template):
    moved = template / "moved"
    (template / "runs" / "killed").rename(moved)
    with chromium() as browser:
        opened = Opened(browser, moved / "index.html")
        page = opened.page
        sources = []
        for place in ("1", "0"):
            page.fill("#time", place)
            page.wait_for_function("picture.complete && picture.naturalWidth > 0")
            sources.append(opened.run("picture.src.slice(-17)"))
        assert sources == ["step-00000012.png", "step-00000006.png"]
        opened.check()
        assert "60 images, 8 classes; resumed from step" in opened.text()
    moved.rename(template / "runs" / "killed")


def test_a_page_that_cannot_be_written_stops_nothing(template):
    home = template / "runs" / "blocked"
    (home / "index.html").mkdir(parents=True)
    done = train(template, "blocked")
    assert done.stdout.count("the page of the run is not written, and training goes on") == 1
    assert differences(template, "plain", "blocked") == []
    (home / "index.html").rmdir()
    (home / "index.html").write_text("of my own")
    train(template, "blocked", "trainer.max_steps=14")
    assert (home / "index.html").read_text() == "of my own"
