"""Alignment with a frozen encoder: its closed forms, whom its gradient reaches, and real runs with
it through kills.
"""

import csv
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from exact_resume.checkpoint.store import Store, load_state
from exact_resume.randomness import Draws, generator, reseed
from runs import SMALL, differences
from sturdy.backbone import DiT, UNet
from sturdy.diffusion import Denoiser, Objective, RectifiedFlow, Velocity
from sturdy.encoders.encoder import Encoder
from sturdy.training.alignment import Alignment
from sturdy.training.build import load_module
from sturdy.training.init_from import find_source, init_from
from sturdy.training.module import DiffusionModule
from tiny_module import batch, fit, save
from tiny_module import make as unaligned
from worlds import World, finish

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
BACKBONES = {
    "dit": partial(DiT, width=16, depth=2, heads=2),
    "unet": partial(
        UNet, width=8, multipliers=(1, 2), blocks=1, attention=(False, True), head_dim=8
    ),
}
dit, unet = BACKBONES.values()
ALIGNED = ["alignment=embedded", "alignment.encoder.seen=400", "alignment.hidden=32"]


class Fixed(Encoder):
    """Sees in every picture the map that it is given, ``(1, d, h', w')``."""

    def __init__(self, features):
        super().__init__()
        self.most, self.channels = 0, features.shape[1]
        self.features = nn.Parameter(features)

    def prepare(self, *args, **options):
        pass

    def forward(self, x0):
        return self.features.expand(len(x0), -1, -1, -1)


class Means(Encoder):
    """Sees the mean colour of each square of the picture."""

    most, channels = 0, 3

    def __init__(self, gain=1.0):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([1.0, gain, 1.0])[:, None, None])

    def prepare(self, *args, **options):
        pass

    def forward(self, x0):
        return self.gain * nn.functional.avg_pool2d(x0, x0.shape[2] // 2)


def awake(backbone):
    """Give the layers that start at zero small weights, so that everything has an effect."""
    for parameter in backbone.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2, generator=generator("awake"))
    return backbone


def aligned(backbone, encoder=None, project=None, **options):
    alignment = Alignment(backbone, encoder=encoder or Means(), hidden=16, **options)
    if project is not None:
        alignment.project = project
    return alignment


def module(kind="dit", encoder=None, weight=0.5, dropout=0.2, **options):
    """A module whose weights are always the same, every layer of them with an effect."""
    reseed("aligned")
    backbone = awake(BACKBONES[kind](num_classes=3, dropout=dropout, **options))
    how = partial(aligned, encoder=encoder or Means(), weight=weight)
    return DiffusionModule(
        Denoiser(backbone, RectifiedFlow(), Velocity(), 3),
        Objective(),
        optimizer=SGD,
        alignment=how,
        shards=2,
    )


def test_closed_forms_of_the_cosine():
    features = torch.randn(1, 16, 4, 4, generator=generator("features"))
    alignment = aligned(dit(), Fixed(features), project=nn.Identity())
    x0, tokens = torch.zeros(2, 3, 8, 8), features.flatten(2).transpose(1, 2).expand(2, -1, -1)
    for factor, cosine in ((1.0, 1.0), (-1.0, -1.0), (7.0, 1.0)):
        assert torch.allclose(alignment.cosine(factor * tokens, x0), torch.full((2,), cosine))
    half = torch.where(
        torch.arange(16)[:, None] < 8, tokens, -tokens
    )  # over the positions it is a mean
    assert torch.allclose(alignment.cosine(half, x0), torch.zeros(2), atol=1e-6)
    orthogonal = torch.cat([-tokens[..., 8:], tokens[..., :8]], dim=2)
    assert torch.allclose(alignment.cosine(orthogonal, x0), torch.zeros(2), atol=1e-6)
    assert torch.equal(
        alignment.cosine(tokens, x0),
        alignment.cosine(tokens.transpose(1, 2).unflatten(2, (4, 4)), x0),
    ), "a map"


@pytest.mark.parametrize("side", [2, 8])
def test_positions_are_matched(side):
    """Left and right of the picture are seen left and right, whatever the grid of the encoder."""
    sides = torch.tensor([[1.0, 0.0], [0.0, 1.0]])[
        None, :, None, :
    ]  # (1, 2, 1, 2): left is one axis, right the other
    seen = sides.repeat_interleave(side, 2).repeat_interleave(side // 2, 3)
    alignment = aligned(unet(), Fixed(seen), project=nn.Identity())
    inner, x0 = sides.repeat_interleave(4, 2).repeat_interleave(2, 3), torch.zeros(1, 3, 16, 16)
    assert alignment.cosine(inner, x0) > 0.97
    assert alignment.cosine(inner.flip(3), x0) < 0.3


@pytest.mark.parametrize("kind", ["dit", "unet"])
@pytest.mark.parametrize("recompute", [False, True])
def test_its_gradient_reaches_the_blocks_up_to_the_aligned_one_and_no_others(kind, recompute):
    backbone = awake(BACKBONES[kind](checkpoint=recompute))
    blocks = list(backbone.blocks) if kind == "dit" else [*backbone.encoder, *backbone.middle]
    for depth in range(1, len(blocks) + 1):
        alignment = aligned(backbone, depth=depth)
        x0 = batch(0)[0]
        with alignment.observe(backbone) as inner:
            backbone(x0, torch.full((8,), 0.5))
        assert len(inner) == 1
        alignment.cosine(*inner, x0).sum().backward()
        reached = [
            any(p.grad is not None and p.grad.any() for p in block.parameters()) for block in blocks
        ]
        assert reached == [n < depth for n in range(len(blocks))]
        assert backbone.stem.weight.grad.any()
        rest = [
            *backbone.out.parameters(),
            *(backbone.decoder.parameters() if kind == "unet" else ()),
        ]
        assert all(p.grad is None for p in rest)
        assert all(p.grad.any() for p in alignment.project.parameters())
        assert all(p.grad is None for p in alignment.encoder.parameters())
        assert len(inner) == 1, "what was recomputed was captured, too"
        backbone.zero_grad(set_to_none=True)


@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_recomputation_gives_the_same_bits(kind, tmp_path):
    (a, x), (b, y) = (
        (m := module(kind, checkpoint=recompute), fit(m, tmp_path / f"{recompute}")[1])
        for recompute in (False, True)
    )
    assert all(
        torch.equal(p[k], q[k])
        for p, q in zip(x, y, strict=True)
        for k in ("loss", "alignment", "grad_norm")
    )
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_one_step_is_the_gradient_of_both_terms(tmp_path):
    """Against plain autograd on the whole batch; ``train/loss`` is the objective's alone."""
    trained, reference = module(dropout=0.0, weight=0.3), module(dropout=0.0, weight=0.3)
    trained.clip = float("inf")
    _, (output,) = fit(trained, tmp_path, steps=1)
    x0, label, positions = batch(0)
    with reference.alignment.observe(reference.denoiser.backbone) as inner:
        loss = reference.objective(reference.denoiser, x0, label, Draws(0, positions)).mean()
    cosine = reference.alignment.cosine(*inner, x0).mean()
    assert torch.allclose(output["loss"], loss)
    assert torch.allclose(output["alignment"], cosine)
    (loss - 0.3 * cosine).backward()
    for p, q in zip(trained.trained(), reference.trained(), strict=True):
        assert torch.allclose(p, q if q.grad is None else q - 0.05 * q.grad, atol=1e-6)
    norm = torch.cat([p.grad.flatten() for p in reference.trained() if p.grad is not None]).norm()
    assert torch.allclose(output["grad_norm"], norm), (
        "the projection is clipped together with the rest"
    )


def test_weight_0_trains_the_same_denoiser_as_none(tmp_path):
    none, zero, half = module(), module(weight=0.0), module()
    none.alignment, none.clip, zero.clip = None, float("inf"), float("inf")
    outputs = [fit(m, tmp_path / str(i))[1] for i, m in enumerate((none, zero, half))]
    assert all(
        torch.equal(p, q)
        for p, q in zip(none.denoiser.parameters(), zero.denoiser.parameters(), strict=True)
    )
    assert not torch.equal(none.denoiser.backbone.stem.weight, half.denoiser.backbone.stem.weight)
    assert [list(o[0]) for o in outputs] == [
        ["loss", "grad_norm"],
        *[["loss", "alignment", "grad_norm"]] * 2,
    ]


def test_what_training_needs_is_in_the_checkpoint_and_what_sampling_needs_is_not_more(tmp_path):
    whole = module()
    _, outputs = fit(whole, tmp_path / "whole", steps=4)
    encoder = {k: v.clone() for k, v in whole.alignment.encoder.state_dict().items()}
    t, _ = fit(module(), tmp_path / "half", steps=2)
    path = save(t)
    state = load_state(path)
    projection = {
        f"alignment.project.{name}" for name, _ in whole.alignment.project.named_parameters()
    }
    encoders = {f"alignment.encoder.{name}" for name in encoder}
    assert {k for k in state["state_dict"] if k.startswith("alignment.")} == projection | encoders
    assert projection < set(state["optimizer_states"][0]["state"])
    assert not encoders & set(state["optimizer_states"][0]["state"])
    again = module(encoder=Means(gain=5.0))  # as one that another machine would make
    _, rest = fit(again, tmp_path / "half", steps=4, entry=path)
    assert torch.equal(rest[-1]["alignment"], outputs[-1]["alignment"])
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in whole.state_dict().items())
    assert all(
        torch.equal(v, encoder[k]) for k, v in whole.alignment.encoder.state_dict().items()
    ), "it was trained"
    other = module(encoder=Means(gain=5.0))
    fit(other, tmp_path / "other", steps=4)
    assert not torch.equal(
        other.denoiser.backbone.stem.weight, whole.denoiser.backbone.stem.weight
    ), "a control"
    plain = module()
    plain.alignment = None
    init_from(plain, find_source(str(path), tmp_path))
    assert torch.equal(
        plain.denoiser.backbone.stem.weight, state["state_dict"]["ema.model.backbone.stem.weight"]
    )


def test_mistakes_are_told():
    for backbone, n in ((dit(), 2), (unet(), 5)):
        for depth in (0, n + 1):
            with pytest.raises(ValueError, match=rf"depth={depth} is none of the blocks 1 to {n}"):
                aligned(backbone, depth=depth)
    with pytest.raises(ValueError, match="Backbone does not name its blocks"):
        aligned(unaligned().denoiser.backbone)
    with pytest.raises(ValueError, match=r"weight=-1"):
        aligned(dit(), weight=-1.0)
    wrong = Fixed(torch.zeros(1, 7, 2, 2))
    wrong.channels = 5
    with pytest.raises(ValueError, match=r"set encoder\.channels=7"):
        aligned(dit(), wrong).cosine(torch.zeros(1, 4, 16), torch.zeros(1, 3, 8, 8))


RUN = [
    *SMALL,
    "data.shards=2",
    "reduction=tree",
    "learning_rate.warmup=1",
    "optimizer.lr=4e-3",
    *ALIGNED,
]


@pytest.fixture(scope="module")
def tmp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where ``one`` ran undisturbed on one process."""
    tmp = tmp_path_factory.mktemp("alignment")
    finish(tmp, "one", 1, base=RUN)
    return tmp


def state(tmp: Path, name: str, step: int = 12) -> dict[str, torch.Tensor]:
    return load_state(Store(tmp / "runs" / name / "checkpoints").state(step))["state_dict"]


def test_the_alignment_is_recorded_and_grows(tmp: Path) -> None:
    with (tmp / "runs" / "one" / "metrics.csv").open(newline="") as file:
        found = [
            float(row["train/alignment"]) for row in csv.DictReader(file) if row["train/alignment"]
        ]
    assert len(found) == 12
    assert abs(found[0]) < 0.2
    assert sum(found[-4:]) / 4 > sum(found[:4]) / 4 + 0.05


def test_begun_on_two_killed_and_continued_without_the_cache_it_ends_in_the_same_bits(
    tmp: Path,
) -> None:
    World(tmp, "killed", 2, base=RUN).until(4).kill().wait()
    shutil.rmtree(tmp / "cache" / "evaluation")
    world = World(tmp, "killed", 1, base=RUN).until(8).kill()
    world.wait()
    assert "(bitwise" in world.output()
    world = finish(tmp, "killed", 2, base=RUN)
    assert "(bitwise" in world.output(0)
    assert world.output(1) == ""
    assert not (tmp / "cache" / "evaluation").exists(), "the encoder was made again"
    assert differences(tmp, "one", "killed") == []


def test_control_another_encoder_gives_other_bits(tmp: Path) -> None:
    finish(tmp, "other", 1, "alignment.encoder.seen=200", base=RUN)
    a, b = state(tmp, "one"), state(tmp, "other")
    assert not torch.equal(a["denoiser.backbone.stem.weight"], b["denoiser.backbone.stem.weight"])


def test_a_checkpoint_alone_rebuilds_it(tmp: Path) -> None:
    path = Store(tmp / "runs" / "one" / "checkpoints").state(12)
    rebuilt, saved = load_module(path).state_dict(), state(tmp, "one")
    assert rebuilt.keys() == saved.keys()
    assert all(torch.equal(v, saved[k]) for k, v in rebuilt.items())


def test_it_cannot_be_added_to_a_run_that_began_without(tmp: Path) -> None:
    base = [word for word in RUN if word not in ALIGNED]
    finish(tmp, "plain", 1, "trainer.max_steps=3", base=base)
    world = World(tmp, "plain", 1, "trainer.max_steps=6", "ckpt_path=last", base=RUN)
    assert world.wait() == [2]
    assert "is of a run that began without alignment" in world.output()
    assert "Traceback" not in world.output()
    path = Store(tmp / "runs" / "plain" / "checkpoints").state(3)
    config = load_state(path)
    assert config["config"]["alignment"] is None
    assert config["config"].pop("alignment", "kept") is None
    torch.save(config, tmp / "old.ckpt")
    assert load_module(tmp / "old.ckpt").alignment is None, "as of a time that knew no alignment"


@pytest.mark.slow
def test_it_can_be_given_up_on_purpose(tmp: Path) -> None:
    finish(tmp, "given-up", 1, "trainer.max_steps=3", base=RUN)
    base = [word for word in RUN if word not in ALIGNED]
    output = finish(tmp, "given-up", 1, "trainer.max_steps=6", "ckpt_path=last", base=base).output()
    assert "alignment" in output, "what changed is told"
    assert not any(k.startswith("alignment.") for k in state(tmp, "given-up", 6))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated
def test_a_network_from_a_file_and_its_absence(tmp: Path) -> None:
    torch.jit.trace(nn.Conv2d(3, 5, 4, 4), torch.rand(1, 3, 16, 16)).save(str(tmp / "net.pt"))
    file = ["alignment=torchscript", "alignment.encoder.size=16", "alignment.hidden=32"]
    base = [*SMALL, *file, f"alignment.encoder.path={tmp / 'net.pt'}"]
    world = World(tmp, "wrong", 1, base=base)
    assert world.wait() == [2]
    assert "set encoder.channels=5" in world.output()
    base.append("alignment.encoder.channels=5")
    finish(tmp, "file", 1, "trainer.max_steps=3", base=base)
    (tmp / "net.pt").rename(tmp / "moved.pt")
    world = World(tmp, "file", 1, "trainer.max_steps=6", base=base)
    assert world.wait() == [2]
    assert "net.pt is not there" in world.output()
    assert "Traceback" not in world.output()
    assert (
        load_module(Store(tmp / "runs" / "file" / "checkpoints").state(3)).alignment is not None
    ), "sampling needs it"
    moved = (f"alignment.encoder.path={tmp / 'moved.pt'}", "trainer.max_steps=6")
    assert "(bitwise" in finish(tmp, "file", 1, *moved, base=base).output()


@pytest.mark.slow
def test_fully_sharded_it_is_the_same_up_to_rounding(tmp: Path) -> None:
    World(tmp, "sharded", 2, "strategy=fsdp2", base=RUN).until(5).kill().wait()
    world = finish(tmp, "sharded", 2, "strategy=fsdp2", base=RUN)
    assert "(same samples" in world.output(0) or "(bitwise" in world.output(0)
    a, b = state(tmp, "one"), state(tmp, "sharded")
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[k], b[k], atol=2e-4) for k in a)
    assert all(torch.equal(a[k], b[k]) for k in a if k.startswith("alignment.encoder."))
