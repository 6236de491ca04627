"""Networks of diffusers as backbones: against diffusers itself, and their adapters."""

import pytest
import torch

pytest.importorskip("diffusers")

from exact_resume.randomness import Draws, reseed
from sturdy.diffusion import (
    Cosine,
    Denoiser,
    Noise,
    Preconditioned,
    RectifiedFlow,
    ScaledLinear,
    Shifted,
    Velocity,
)
from sturdy.diffusion.objective import Discrete
from sturdy.pretrained.borrowed import Borrowed, build_network
from sturdy.pretrained.unet2d import UNet2D
from tiny_networks import CLASSES, NETWORKS, write_base

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
STEPS = torch.tensor([0, 613])  # as diffusers counts them
T = (STEPS + 1) / 1000
LABEL = torch.tensor([1, CLASSES])
TEXT = torch.randn(2, 4, 12, generator=torch.Generator().manual_seed(2))
POOLED = torch.randn(2, 5, generator=torch.Generator().manual_seed(3))
SIZES = torch.tensor([[512.0, 511, 0, 0, 513, 512], [1024, 1023, 0, 7, 1024, 1024]])
# What the condition gives, and what diffusers is called with.
CONDITIONS = {
    "unconditional": ((None,), {}),
    "classes": ((LABEL,), {"class_labels": LABEL}),
    "text": ((TEXT,), {"encoder_hidden_states": TEXT}),
    "sdxl": (
        (TEXT, POOLED, SIZES),
        {
            "encoder_hidden_states": TEXT,
            "added_cond_kwargs": {"text_embeds": POOLED, "time_ids": SIZES},
        },
    ),
    "dit": ((LABEL,), {"class_labels": LABEL}),
}


def borrow(name, **options):
    kind, config = NETWORKS[name]
    reseed("weights")
    return Borrowed(network=kind, config=config, **options)


def adapted(tmp_path, name="text", dtype="float32", **lora):
    base = write_base(tmp_path, name) | {"dtype": dtype}
    backbone = borrow(name, base=base, lora={"rank": 2} | lora)
    backbone.load_base(fresh=True)
    return backbone


def randomise(backbone):
    """Move the adapter away from its beginning, where it does nothing."""
    reseed("moved")
    for name, parameter in backbone.named_parameters():
        if ".lora_" in name:
            parameter.data.normal_(std=0.2)


@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_the_network_of_diffusers_bit_for_bit(name):
    arguments, keywords = CONDITIONS[name]
    backbone = borrow(name).train()
    reseed("weights")
    expected = build_network(*NETWORKS[name]).eval()(X, STEPS, **keywords).sample
    assert torch.equal(backbone(X, T, *arguments), expected[:, :3]), "in training, too"


@pytest.mark.parametrize("name", NETWORKS)
def test_the_condition_matters(name):
    arguments, _ = CONDITIONS[name]
    backbone = borrow(name)
    for i, argument in enumerate(arguments):
        if argument is not None:
            other = [*arguments[:i], argument.flip(0), *arguments[i + 1 :]]
            assert not torch.equal(backbone(X, T, *arguments), backbone(X, T, *other))


def test_every_step_of_the_chain_is_a_whole_number_to_the_network():
    t = (torch.arange(1000) + 1) / 1000
    assert torch.equal(borrow("unconditional").timestep(t), torch.arange(1000.0))


def test_a_flow_tells_the_network_its_sigma():
    schedule = Shifted(RectifiedFlow(), image_size=64, base_size=32)
    backbone = Denoiser(borrow("unconditional"), schedule, Velocity()).backbone
    assert torch.allclose(backbone.timestep(torch.tensor([0.5])), torch.tensor([1000 * 2 / 3]))
    backbone = Denoiser(borrow("unconditional"), Cosine(), Noise()).backbone
    assert torch.equal(backbone.timestep(torch.tensor([0.5])), torch.tensor([499.0]))


def test_it_refuses_a_noise_level_for_a_time():
    with pytest.raises(ValueError, match="target=preconditioned"):
        Denoiser(borrow("unconditional"), ScaledLinear(), Preconditioned())


def test_times_of_the_chain_are_those_of_diffusers():
    from diffusers import DDPMScheduler

    chain = DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear")
    t = Discrete(steps=1000)(Draws(0, range(500)), ScaledLinear())
    steps = borrow("unconditional").timestep(t).long()
    alpha, sigma = ScaledLinear()(t)
    expected = chain.alphas_cumprod[steps]
    # diffusers multiplies up to 1000 factors in float32
    assert torch.allclose(alpha**2, expected, rtol=1e-4)
    assert torch.allclose(sigma**2, 1 - expected, rtol=1e-4)
    off = chain.alphas_cumprod[(steps + 1).clamp(max=999)]
    assert not torch.allclose(alpha**2, off, rtol=1e-4), "control: the next step is seen"


def test_an_adapter_begins_as_the_base_and_is_all_that_is_trained(tmp_path):
    backbone = adapted(tmp_path)
    base = type(backbone.network).from_pretrained(tmp_path / "unet")
    expected = base(X, STEPS, TEXT).sample
    assert torch.equal(backbone(X, T, TEXT), expected)
    backbone(X, T, TEXT).square().mean().backward()
    trained = [name for name, p in backbone.named_parameters() if p.requires_grad]
    assert trained
    assert all(".lora_" in name for name in trained)
    assert [name for name, p in backbone.named_parameters() if p.grad is not None] == trained
    assert set(backbone.state_dict()) == set(trained)
    assert len(trained) == 2 * 4 * 2 * 4, "A and B of 4 layers in 2 attentions in 4 blocks"
    randomise(backbone)
    assert not torch.allclose(backbone(X, T, TEXT), expected)


def test_an_adapter_in_float32_learns_on_a_base_in_bfloat16(tmp_path):
    backbone = adapted(tmp_path, dtype="bfloat16", rank=3)
    randomise(backbone)
    dtypes = {p.requires_grad: p.dtype for p in backbone.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    full = adapted(tmp_path, rank=3)
    randomise(full)
    output = backbone(X, T, TEXT)
    assert output.dtype == torch.float32
    assert torch.allclose(output, full(X, T, TEXT), atol=0.1)
    assert not torch.equal(output, full(X, T, TEXT))
    output.mean().backward()
    grads = {p.grad.dtype for p in backbone.parameters() if p.requires_grad}
    assert grads == {torch.float32}


def test_the_weights_of_an_adapter_depend_on_the_generator_alone(tmp_path):
    a, b = adapted(tmp_path).state_dict(), adapted(tmp_path).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    backbone = adapted(tmp_path, alpha=1.0)
    layers = [m for m in backbone.modules() if hasattr(m, "lora_A")]
    assert {m.scaling["default"] for m in layers} == {0.5}, "alpha / rank"
    assert {m.scaling["default"] for m in adapted(tmp_path).modules() if hasattr(m, "lora_A")} == {
        1
    }


def test_its_state_is_loaded_strictly(tmp_path):
    backbone, other = adapted(tmp_path), adapted(tmp_path)
    randomise(backbone)
    state = backbone.state_dict()
    other.load_state_dict(state)
    assert torch.equal(other(X, T, TEXT), backbone(X, T, TEXT))
    name = min(state)
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({k: v for k, v in state.items() if k != name})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        other.load_state_dict(state | {"network.more": state[name]})


@pytest.mark.parametrize("name", ["text", "classes", "dit"])
def test_checkpointing_changes_no_gradient(tmp_path, name):
    gradients = []
    for checkpoint in (False, True):
        base = write_base(tmp_path, name)
        lora = {"rank": 2, "dropout": 0.3}
        backbone = borrow(name, base=base, lora=lora, checkpoint=checkpoint).train()
        backbone.load_base(fresh=True)
        randomise(backbone)
        reseed("dropout")
        backbone(X, T, *CONDITIONS[name][0]).square().mean().backward()
        gradients.append([p.grad for p in backbone.parameters() if p.requires_grad])
        assert all(g is not None for g in gradients[-1])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_whole_network_takes_the_weights_of_its_base(tmp_path):
    base = write_base(tmp_path, "dit")
    backbone = borrow("dit", base=base)
    before = backbone.state_dict()["network.proj_out_2.weight"].clone()
    backbone.load_base(fresh=False)
    assert torch.equal(backbone.network.proj_out_2.weight, before), "a checkpoint follows"
    backbone.load_base(fresh=True)
    expected = type(backbone.network).from_pretrained(tmp_path / "unet").state_dict()
    own = backbone.network.state_dict()
    assert own.keys() == expected.keys()
    assert all(torch.equal(own[name], expected[name]) for name in own)
    assert all(p.requires_grad for p in backbone.parameters())
    assert len(backbone.state_dict()) == len(expected)


def test_a_base_that_changed_is_gone_or_is_another_network_is_refused(tmp_path):
    base = write_base(tmp_path / "a")
    other = write_base(tmp_path / "b", seed=1)
    assert other["sha256"] != base["sha256"]
    backbone = borrow("unconditional", base=other | {"sha256": base["sha256"]})
    with pytest.raises(ValueError, match=r"have changed") as refusal:
        backbone.load_base(fresh=True)
    for word in (other["path"], base["sha256"], other["sha256"]):
        assert word in str(refusal.value)
    with pytest.raises(ValueError, match=rf"{tmp_path / 'c'} is not there"):
        borrow("unconditional", base=base | {"path": str(tmp_path / "c")}).load_base(fresh=True)
    with pytest.raises(ValueError, match=r"another network.*class_embedding\.weight"):
        borrow("classes", base=base).load_base(fresh=True)


def test_without_its_base_an_adapter_does_not_run(tmp_path):
    backbone = borrow("text", base=write_base(tmp_path, "text"), lora={"rank": 2})
    with pytest.raises(RuntimeError, match="load_base"):
        backbone(X, T, TEXT)


BASE = {"path": "x", "sha256": "y"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora": {"rank": 0}, "base": BASE}, r"lora\.rank=0 must"),
        ({"lora": {"rank": 1.5}, "base": BASE}, r"lora\.rank=1\.5 must"),
        ({"lora": {"rank": 2, "alpha": 0}, "base": BASE}, r"lora\.alpha=0 must"),
        ({"lora": {"rank": 2, "dropout": 1}, "base": BASE}, r"lora\.dropout=1 must"),
        ({"lora": {"rank": 2, "targets": []}, "base": BASE}, r"lora\.targets=\[\] must"),
        (
            {"lora": {"rank": 2, "targets": ["to_q", "query"]}, "base": BASE},
            r"called query; .*(conv_in|time_embedding\.linear_1)",
        ),
        ({"lora": {"rank": 2}}, r"needs a base"),
        ({"base": BASE | {"dtype": "bfloat16"}}, r"trainer\.precision=bf16-mixed"),
        ({"lora": {"rank": 2}, "base": BASE | {"dtype": "int8"}}, r"base\.dtype=int8 must"),
    ],
)
def test_what_does_not_go_together_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        borrow("unconditional", **options)


def test_no_other_class_and_no_broken_config_is_built():
    with pytest.raises(ValueError, match="network=StableDiffusionPipeline must be one of"):
        Borrowed(network="StableDiffusionPipeline", config={"a": 1})
    with pytest.raises(ValueError, match="config: give the arguments"):
        Borrowed(network="UNet2DModel", config=None)
    with pytest.raises(ValueError, match="config: UNet2DModel cannot be built"):
        Borrowed(network="UNet2DModel", config={"block_out_channels": [8]})


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("text", (LABEL,), "condition=captions"),
        ("text", (None,), "condition=captions"),
        ("classes", (LABEL, POOLED), "augmented"),
        ("dit", (None,), "no classes.*num_embeds_ada_norm"),
        ("classes", (None,), "no classes.*num_class_embeds"),
        ("unconditional", (LABEL,), "have classes.*num_class_embeds"),
    ],
)
def test_a_condition_that_it_cannot_take_is_refused(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        borrow(name)(X, T, *arguments)


def test_unet2d_is_what_diffusers_writes_and_reads(tmp_path):
    from diffusers import UNet2DModel

    options = {"width": 8, "multipliers": [1, 3], "attention": [False, True], "head_dim": 8}
    backbone = UNet2D(num_classes=CLASSES, blocks=1, **options).eval()
    backbone.network.save_pretrained(tmp_path)
    read = UNet2DModel.from_pretrained(tmp_path)
    assert torch.equal(read(X, STEPS, LABEL).sample, backbone(X, T, LABEL))
    assert UNet2D(**options).eval()(X, T, None).shape == X.shape
    with pytest.raises(ValueError, match=r"multipliers=\[1, 3\] and attention=\[True\]"):
        UNet2D(**options | {"attention": [True]})
    with pytest.raises(ValueError, match="augmented"):
        UNet2D(**options, conditions=2)
