"""A run that begins from the weights of another: which are taken, what is said, and what it counts
as.
"""

import copy
import json
import shutil

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import nn

from exact_resume.checkpoint.store import MANIFEST, STATE, Store, load_state
from runs import ROOT, SMALL, differences, kill_at, train
from sturdy.diffusion import Denoiser, Objective, RectifiedFlow, Velocity
from sturdy.training.build import build_module
from sturdy.training.ema import PowerEMA
from sturdy.training.init_from import differing_weights, find_source, init_from
from sturdy.training.match_weights import class_change, match
from sturdy.training.module import DiffusionModule
from tiny_module import fit, save

DIT = ["backbone=dit", "backbone.width=16", "backbone.depth=1", "backbone.heads=2"]
LABEL = "backbone.condition.label.weight"


def config(*overrides, classes=("a", "b"), conditions=0):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose(
            "train",
            [
                "backbone=dit",
                "backbone.width=16",
                "backbone.depth=1",
                "backbone.heads=2",
                *overrides,
            ],
        )
    cfg.classes, cfg.num_classes, cfg.num_conditions, cfg.data.shards = (
        list(classes),
        len(classes),
        conditions,
        1,
    )
    return OmegaConf.to_container(cfg, resolve=True)


def awake(module):
    """Give every weight a value of its own, the averages others than what they average."""
    rng = torch.Generator().manual_seed(1)
    for p in module.parameters():
        p.data.normal_(generator=rng)
    return module


def saved(module, runs, name="base", step=500):
    """Commit a checkpoint of ``module`` as that of a run; returns the weights that another run
    takes.
    """
    state = {"global_step": step, "state_dict": module.state_dict(), "config": module.config}
    Store(runs / name / "checkpoints").commit(step, state)
    return module.ema.model.state_dict()


def begin(runs, settings, word="base"):
    """A module of ``settings`` that began from a run, an equal one that did not, and what was
    said.
    """
    module, fresh = build_module(settings), build_module(settings)
    return module, fresh.denoiser.state_dict(), init_from(module, find_source(word, runs))


def test_rows_of_labels_go_by_the_names_of_the_classes(tmp_path):
    old = saved(awake(build_module(config())), tmp_path)
    module, fresh, told = begin(tmp_path, config(classes=("c", "b", "d", "a")))
    assert told.splitlines() == [
        "init_from=base (step 500, EMA weights): all 25 tensors taken",
        "    2 -> 4 classes: c, d are new; rows by name",
    ]
    expected = [
        fresh[LABEL][0],
        old[LABEL][1],
        fresh[LABEL][2],
        old[LABEL][0],
        old[LABEL][2],
    ]  # the null label is last
    for network in (module.denoiser, module.ema.model):
        weights = network.state_dict()
        assert torch.equal(weights[LABEL], torch.stack(expected))
        assert all(torch.equal(weights[name], old[name]) for name in weights.keys() - {LABEL})


@pytest.mark.parametrize(
    ("then", "now"), [("default", "power"), ("power", "default"), ("power", "power")]
)
def test_every_kind_of_average_begins_with_the_same_weights(then, now, tmp_path):
    old = saved(awake(build_module(config(f"ema={then}"))), tmp_path)
    module, _, _ = begin(tmp_path, config(f"ema={now}"))
    assert len(module.ema.networks()) == (2 if now == "power" else 1)
    for network in (module.denoiser, *module.ema.networks()):
        assert all(torch.equal(weight, old[name]) for name, weight in network.state_dict().items())
    assert isinstance(module.ema, PowerEMA) == (now == "power")


@pytest.mark.parametrize(
    ("then", "now", "told"),
    [
        ({}, {"classes": ()}, ["2 -> 0 classes: a, b are gone", f"not taken: {LABEL}"]),
        ({"classes": ()}, {}, ["0 -> 2 classes: a, b are new", f"new here: {LABEL}"]),
        ({}, {"conditions": 3}, ["new here: backbone.condition.more.weight"]),
        ({"conditions": 3}, {"conditions": 6}, ["new here: backbone.condition.more.weight"]),
        ({"conditions": 6}, {}, ["not taken: backbone.condition.more.weight"]),
    ],
)
def test_tables_that_the_data_decide_are_left_or_begin_anew(then, now, told, tmp_path):
    old = saved(awake(build_module(config(**then))), tmp_path)
    module, fresh, said = begin(tmp_path, config(**now))
    assert [line.strip() for line in said.splitlines()[1:]] == told
    for name, weight in module.denoiser.state_dict().items():
        taken = name in old and old[name].shape == weight.shape
        assert torch.equal(weight, old[name] if taken else fresh[name]), name
    assert not (
        module.denoiser.state_dict().get("backbone.condition.more.weight", torch.zeros(1))
    ).any()


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["backbone.width=32"], "holds another network: backbone.width 16 -> 32"),
        (
            ["backbone.depth=3", "backbone.dropout=0.5"],
            "backbone.depth 1 -> 3, backbone.dropout 0.0 -> 0.5",
        ),
        (["backbone=unet"], "is of another backbone, DiT; this run's is UNet"),
    ],
)
def test_another_network_is_refused_by_the_keys_that_differ(overrides, told, tmp_path):
    saved(build_module(config()), tmp_path)
    words = [word for word in overrides if "=" in word]
    if "backbone=unet" in words:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            other = OmegaConf.to_container(
                compose("train", [*words, "data.shards=1"]), resolve=True
            )
    else:
        other = config(*words, classes=("a", "b", "c"))
    module = build_module(other)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=r"^init_from=base ") as error:
        init_from(module, find_source("base", tmp_path))
    assert told in str(error.value)
    assert all(torch.equal(weight, before[name]) for name, weight in module.state_dict().items())


def test_settings_that_give_the_weights_another_meaning_are_told(tmp_path):
    saved(build_module(config("data.image_size=16")), tmp_path)
    other = ["data.image_size=32", "target=noise", "schedule=linear", "objective=min_snr"]
    _, _, told = begin(tmp_path, config(*other))
    assert [line.strip() for line in told.splitlines()[1:]] == [
        "its target is velocity, here noise: the output layer must be learned anew",
        "its schedule is rectified_flow, here linear: the same time is another level of noise",
        "its data.image_size is 16, here 32: the same shape has another size in pixels",
    ]


class Own(nn.Module):
    """A backbone as a user writes it, whose label tables are no embeddings; it names them
    itself.
    """

    label_tables = ("gain", "shift")

    def __init__(self, classes):
        super().__init__()
        self.gain, self.shift = (nn.Parameter(torch.rand(classes + 1, 3)) for _ in range(2))
        self.out = nn.Conv2d(3, 3, 1)
        self.place = nn.Embedding(classes + 1, 3)  # has as many rows by chance

    def forward(self, x, t, label):
        return self.out(
            x * self.gain[label][:, :, None, None] + self.shift[label][:, :, None, None]
        )


def test_a_backbone_of_ones_own_may_name_its_label_tables():
    module, other = Own(2), Own(2)
    found = match(module, other.state_dict(), {"classes": ["a", "b"]}, {"classes": ["b", "a"]})
    assert sorted(found.tables) == ["gain", "shift"]
    for name in ("gain", "shift"):
        assert torch.equal(found.weights[name], getattr(other, name)[[1, 0, 2]])
    assert torch.equal(found.weights["place.weight"], other.place.weight)


def test_what_changed_about_the_classes_in_words():
    def change(then, now):
        return class_change({"classes": then}, {"classes": now})

    assert change(["a"], ["a"]) is None
    assert change(["a", "b"], ["a", "b", "c"]) == "2 -> 3 classes: c is new; rows by name"
    assert change(["automobile", "truck"], ["truck", "zcar"]) == (
        "2 -> 2 classes: zcar is new, automobile is gone; rows by name"
    )
    assert change(["a", "b"], ["b", "a"]) == "2 -> 2 classes: in another order; rows by name"
    assert "0, 1, 2, 3, 4 and 995 more are new" in change([], [str(n) for n in range(1000)])


def labelled(classes):
    """A tiny module with these classes, each table's rows of their own."""
    torch.manual_seed(len(classes))
    denoiser = Denoiser(Own(len(classes)), RectifiedFlow(), Velocity(), len(classes))
    return DiffusionModule(denoiser, Objective(), config={"classes": list(classes)})


def test_on_purpose_a_run_goes_on_with_other_classes_and_its_optimizer_state_follows(tmp_path):
    t, _ = fit(labelled("abc"), tmp_path, steps=2)
    state = load_state(save(t))
    rows, moments = (
        state["state_dict"]["denoiser.backbone.gain"],
        state["optimizer_states"][0]["state"],
    )
    module = labelled("cxba")
    fresh = module.denoiser.backbone.gain.detach().clone()
    module.on_load_checkpoint(state)
    found = state["state_dict"]["denoiser.backbone.gain"]
    assert torch.equal(found, torch.stack([rows[2], fresh[1], rows[1], rows[0], rows[3]]))
    optimizer = module.configure_optimizers()
    optimizer.load_state_dict(state["optimizer_states"][0])
    gain = optimizer.state[module.denoiser.backbone.gain]
    old = moments["denoiser.backbone.gain"]["exp_avg"]
    assert old[:4].any(dim=1).all(), "a control: every row has a state to be moved"
    assert torch.equal(
        gain["exp_avg"], torch.stack([old[2], torch.zeros(3), old[1], old[0], old[3]])
    )
    assert gain["step"] == 2


def test_a_source_is_a_run_by_name_or_path_a_checkpoint_or_its_file(tmp_path):
    module = build_module(config())
    for step in (100, 500):
        saved(module, tmp_path / "runs", step=step)
    saved(module, tmp_path / "runs", "other", step=5)
    store = Store(tmp_path / "runs" / "base" / "checkpoints")
    words = ["base", str(tmp_path / "runs" / "base"), str(store.path(500)), str(store.state(500))]
    ids = {find_source(word, tmp_path / "runs").sha256 for word in words}
    assert {find_source(word, tmp_path / "runs").state for word in words} == {store.state(500)}
    assert ids == {store.verify(500)["files"][STATE]["sha256"]}
    lone = tmp_path / "lone.ckpt"
    shutil.copy(store.state(500), lone)
    assert {find_source(str(lone), tmp_path).sha256} == ids

    for word in ("nobody", str(tmp_path / "nobody")):
        with pytest.raises(
            ValueError, match=rf"init_from={word} is not there\..*runs in .*: base, other$"
        ):
            find_source(word, tmp_path / "runs")

    broken = store.state(500)
    broken.write_bytes(broken.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"does not verify: state\.ckpt has changed"):
        find_source(str(broken), tmp_path / "runs")
    assert find_source("base", tmp_path / "runs").state == store.state(100)
    assert store.steps() == [100, 500], "who only reads leaves it where it is"


def test_what_a_run_began_from_counts_by_its_content(tmp_path):
    for name in ("base", "other"):
        saved(
            awake(build_module(config())) if name == "base" else build_module(config()),
            tmp_path,
            name,
        )
    saved(build_module(config()), tmp_path, "base", step=900)  # it went on
    path = Store(tmp_path / "base" / "checkpoints").path(500)
    began = {"path": str(path / STATE), "sha256": find_source(str(path), tmp_path).sha256}

    def refused(word, before="base", began=began):
        return differing_weights(began, word, before, tmp_path)

    shutil.copytree(path, tmp_path / "moved")
    for word in (None, "base", str(path), str(tmp_path / "moved"), "gone"):
        assert refused(word) is None, word
    assert "init_from=other holds other weights than this run began from" in refused("other")
    assert "holds other weights" in refused(
        str(tmp_path / "base" / "checkpoints" / "step-00000900")
    )
    assert "did not begin from it" in refused("base", before=None, began=None)
    assert refused("base", before="base", began=None) is None, "written before it was written down"
    shutil.rmtree(path)  # pruned
    assert refused("base") is None
    assert refused("base", before="moved") is not None


def test_a_run_that_began_from_another_is_killed_and_goes_on_without_it(tmp_path):
    """Its checkpoints carry what it began from; the other run may be gone."""
    words = [*SMALL, "trainer.max_steps=8", "callbacks.samples.every_n_steps=100"]
    train(tmp_path, "base", "trainer.max_steps=3", base=words)
    sha256 = find_source("base", tmp_path / "runs").sha256
    told = train(tmp_path, "whole", "init_from=base", base=words).stdout
    assert "init_from=base (step 3, EMA weights): all" in told
    kill_at(tmp_path, "killed", 6, "init_from=base", base=words, saved=True)
    shutil.rmtree(tmp_path / "runs" / "base")
    assert "bitwise" in train(tmp_path, "killed", "init_from=base", base=words).stdout
    assert differences(tmp_path, "whole", "killed") == []
    for name in ("whole", "killed"):
        store = Store(tmp_path / "runs" / name / "checkpoints")
        manifest = json.loads((store.path(8) / MANIFEST).read_bytes())
        assert (
            manifest["init_from"]["sha256"]
            == load_state(store.state(8))["init_from"]["sha256"]
            == sha256
        )
