"""Which model a file holds is recognised by names and shapes; anything else is named."""

import pytest
import torch

from exact_resume.weights_file import WeightsFile, open_weights
from sturdy.pretrained.families import UnsupportedModelError, describe, recognise

UNET = "model.diffusion_model."
CLIP = "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight"
OPEN_CLIP = "cond_stage_model.model.token_embedding.weight"
VAE = "first_stage_model.encoder.conv_in.weight"


def tensors(names, **shapes):
    """Empty tensors of the given names, but for those with a shape."""
    return {name: torch.zeros(shapes.get(name, (1,))) for name in names}


def unet(channels=4, width=768, convolution=True):
    projection = (32, 32, 1, 1) if convolution else (32, 32)
    return {
        f"{UNET}input_blocks.0.0.weight": torch.zeros(32, channels, 3, 3),
        f"{UNET}input_blocks.2.1.proj_in.weight": torch.zeros(projection),
        f"{UNET}input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(32, width),
        f"{UNET}output_blocks.11.0.skip_connection.weight": torch.zeros(32, 64, 1, 1),
    }


def sd1(**options):
    return unet(**options) | tensors([VAE, CLIP])


def sd2(**options):
    return unet(width=1024, convolution=False, **options) | tensors([VAE, OPEN_CLIP])


def xl(encoders, **options):
    names = [VAE, f"{UNET}label_emb.0.0.weight", *encoders]
    return unet(width=2048, convolution=False, **options) | tensors(names)


def sdxl(**options):
    clip = "conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight"
    return xl([clip, "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"])


def refiner():
    return xl(["conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias"])


BASES = {"sd1": sd1, "sd2": sd2, "sdxl": sdxl}


def file_of(content, **metadata):
    names = {name.replace("__", "."): value for name, value in metadata.items()}
    return WeightsFile("model.safetensors", "safetensors", names, content)


@pytest.mark.parametrize("family", BASES)
def test_each_family_is_recognised(family):
    found = recognise(file_of(BASES[family]()))
    assert found.family == family
    assert found.prediction == (None if family == "sd2" else "noise")
    assert (found.zero_snr, found.has_ema) == (False, False)
    assert found.why.startswith("Stable Diffusion ")


@pytest.mark.parametrize("family", BASES)
@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_from_a_real_file_with_an_average(family, suffix, tmp_path):
    content = BASES[family]() | {"model_ema.diffusion_modelinput_blocks00weight": torch.zeros(1)}
    path = tmp_path / f"a.{suffix}"
    if suffix == "ckpt":
        torch.save({"state_dict": content, "global_step": 875000}, path)
    else:
        pytest.importorskip("safetensors.torch").save_file(content, path)
    found = recognise(open_weights(path))
    assert (found.family, found.has_ema) == (family, True)
    assert found.prediction == (None if family == "sd2" else "noise")  # the step tells nothing


def test_the_counters_of_an_average_are_no_average():
    counters = tensors(["model_ema.decay", "model_ema.num_updates"])
    assert not recognise(file_of(sd1() | counters)).has_ema


@pytest.mark.parametrize(("family", "convolution"), [("sd1", True), ("sd2", False)])
def test_without_a_text_encoder_the_unet_tells(family, convolution):
    found = recognise(file_of(unet(convolution=convolution)))
    assert found.family == family
    assert "proj_in" in found.why


@pytest.mark.parametrize(
    ("extra", "metadata", "expected", "zero_snr"),
    [
        (["v_pred"], {}, "v", False),
        (["v_pred", "ztsnr"], {}, "v", True),
        (["v_pred"], {"prediction_type": "epsilon"}, "v", False),
        ([], {"prediction_type": "v"}, "v", False),
        ([], {"prediction_type": "v_prediction"}, "v", False),
        ([], {"modelspec__prediction_type": "v"}, "v", False),
        ([], {"modelspec__prediction_type": "epsilon"}, "noise", False),
        ([], {"prediction_type": "Epsilon", "ss_zero_terminal_snr": "True"}, "noise", True),
        ([], {"ss_zero_terminal_snr": "False", "prediction_type": "v"}, "v", False),
        ([], {"modelspec__architecture": "stable-diffusion-v2-768-v"}, "v", False),
        ([], {"modelspec__architecture": "stable-diffusion-v2-512"}, "noise", False),
    ],
)
@pytest.mark.parametrize("family", BASES)
def test_what_is_predicted(family, extra, metadata, expected, zero_snr):
    content = BASES[family]() | {name: torch.tensor([]) for name in extra}
    found = recognise(file_of(content, **metadata))
    assert (found.prediction, found.zero_snr) == (expected, zero_snr)
    assert f"predicts {expected}" in found.why


def test_empty_tensors_survive_a_real_file(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    words = {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}
    save_file(sdxl() | words, tmp_path / "a.safetensors")
    found = recognise(open_weights(tmp_path / "a.safetensors"))
    assert (found.prediction, found.zero_snr) == ("v", True)


def lora(unet, down):
    return tensors([f"{unet}_attn1_to_q.{down}.weight", f"{unet}_attn1_to_q.alpha"])


OTHERS = {
    "inpainting": (sd1(channels=9), "is an inpainting model (9 input channels), not supported yet"),
    "inpainting 2": (sd2(channels=9), "is an inpainting model"),
    "pix2pix": (sd1(channels=8), "is an InstructPix2Pix model"),
    "depth": (sd2(channels=5), "is a depth-to-image model"),
    "upscaler": (sd2(channels=7), "is an upscaler"),
    "refiner": (refiner(), "is the refiner of Stable Diffusion XL"),
    "unclip": (sd2() | tensors([f"{UNET}label_emb.0.0.weight"]), "is Stable Diffusion 2 unCLIP"),
    "playground": (sdxl() | tensors(["edm_mean", "edm_std"]), "is an EDM model"),
    "controlnet": (
        sd1() | tensors(["control_model.time_embed.0.weight"]),
        "is a ControlNet, which is not supported yet",
    ),
    "controlnet of diffusers": (
        tensors(["controlnet_cond_embedding.conv_in.weight", "down_blocks.0.attentions.0.x"]),
        "is a ControlNet",
    ),
    "sd3": (
        tensors([f"{UNET}joint_blocks.0.context_block.adaLN_modulation.1.bias", VAE]),
        "is Stable Diffusion 3, not supported yet",
    ),
    "flux": (tensors(["double_blocks.0.img_attn.norm.key_norm.scale"]), "is a Flux model"),
    "flux of diffusers": (
        tensors(["transformer_blocks.0.attn.to_q.weight", "single_transformer_blocks.0.x"]),
        "is a Flux model",
    ),
    "lora": (lora("lora_unet_down_blocks_0", "lora_down"), "is a LoRA alone"),
    "lora of diffusers": (
        tensors(["unet.down_blocks.0.attentions.0.to_q.lora.down.weight"]),
        "is a LoRA alone",
    ),
    "lora of peft": (
        tensors(["transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"]),
        "is a LoRA alone",
    ),
    "lycoris": (tensors(["lora_unet_x.hada_w1_a", "lora_unet_x.hada_w1_b"]), "is a LoRA alone"),
    "vae": (tensors(["encoder.conv_in.weight", "decoder.conv_in.weight"]), "is an autoencoder"),
    "vae with prefix": (tensors([VAE]), "is an autoencoder alone"),
    "text encoder": (
        tensors(["text_model.embeddings.token_embedding.weight", "text_model.encoder.layers.0.x"]),
        "is a text encoder alone",
    ),
    "newer text encoder": (
        tensors(["embeddings.token_embedding.weight", "encoder.layers.0.x"]),
        "is a text encoder alone",
    ),
    "text encoder with prefix": (tensors([OPEN_CLIP]), "is a text encoder alone"),
    "unet of diffusers": (
        tensors(["conv_in.weight", "down_blocks.0.attentions.0.proj_in.weight"]),
        "is the U-Net of a folder alone",
    ),
    "unet": (tensors(["input_blocks.0.0.weight"]), "is a U-Net alone"),
    "embedding": (tensors(["emb_params"]), "is a textual inversion"),
    "own run": (
        tensors(["denoiser.backbone.stem.weight", "ema.model.backbone.stem.weight"]),
        "is a checkpoint of a run of this project",
    ),
    "classifier": (tensors(["layer1.0.conv1.weight", "fc.bias"]), "no model known here (it has fc"),
    "another text encoder": (
        unet() | tensors(["cond_stage_model.roberta.embeddings.weight"]),
        "has a text encoder that no Stable Diffusion has",
    ),
    "no attention": (
        {f"{UNET}input_blocks.0.0.weight": torch.zeros(32, 4, 3, 3)},
        "has a U-Net without attention to a text",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_everything_else_is_named(kind):
    content, what = OTHERS[kind]
    with pytest.raises(UnsupportedModelError) as refused:
        recognise(file_of(content))
    message = str(refused.value)
    assert message.startswith("model.safetensors ")
    assert what in message
    assert message.endswith(
        "; give a text-to-image model of Stable Diffusion 1, 2 or XL, in one file or as a folder"
    )
    (line,) = describe(file_of(content))
    assert what in line
    assert "; give" not in line


def test_another_prediction_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"predicts sample \(prediction_type\)"):
        recognise(file_of(sd1(), prediction_type="sample"))


def test_description():
    assert describe(file_of(sd1())) == [
        "family      sd1: Stable Diffusion 1, because its text encoder is CLIP "
        "(cond_stage_model.transformer.*); it predicts noise, as this family does if nothing says "
        "otherwise",
        "predicts    noise",
    ]
    assert describe(file_of(sd2()))[1] == "predicts    unknown: give target=v or target=noise"
    zero = describe(file_of(sdxl() | tensors(["v_pred", "ztsnr"])))
    assert zero[1:] == [
        "predicts    v",
        "schedule    rescaled, so that it ends without any signal (zero SNR)",
    ]


@pytest.mark.parametrize(
    ("content", "theirs"),
    [
        (sd1(), "v1"),
        (sd2(), "v2"),
        (sdxl(), "xl_base"),
        (refiner(), "xl_refiner"),
        (sd1(channels=9), "inpainting"),
        (sd2(channels=9), "inpainting_v2"),
        (OTHERS["playground"][0], "playground-v2-5"),
        (OTHERS["controlnet of diffusers"][0], "controlnet"),
    ],
)
def test_diffusers_recognises_these_files_likewise(content, theirs):
    """So the names and shapes above are those that diffusers looks at in the real files."""
    pytest.importorskip("diffusers")
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    assert infer_diffusers_model_type(content) == theirs
    if theirs in ("v1", "v2", "xl_base"):
        assert recognise(file_of(content)).family == {"v1": "sd1", "v2": "sd2"}.get(theirs, "sdxl")
    else:
        with pytest.raises(UnsupportedModelError):
            recognise(file_of(content))
