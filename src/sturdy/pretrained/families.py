"""Recognise which Stable Diffusion a single file holds, by the names and shapes of its tensors.

The names are those of the files that CompVis and Stability AI published:

    model.diffusion_model.*              the U-Net
    model_ema.*                          its average (EMA)
    first_stage_model.*                  the autoencoder
    cond_stage_model.*, conditioner.*    the text encoders

The widths do not count, so that a small model with the same names is recognised, too.

What the network predicts is in few files. The sources, in this order:

    tensors    empty ones, named ``v_pred`` and ``ztsnr``: a habit of SDXL models that predict v
    metadata   ``prediction_type``, or Stability AI's https://github.com/Stability-AI/ModelSpec
    family     Stable Diffusion 1 and XL predict the noise. Of 2 there are both kinds
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from exact_resume.weights_file import WeightsFile

Family = Literal["sd1", "sd2", "sdxl"]
Prediction = Literal["noise", "v"]

FAMILIES: dict[Family, str] = {
    "sd1": "Stable Diffusion 1",
    "sd2": "Stable Diffusion 2",
    "sdxl": "Stable Diffusion XL",
}
TEXT_ENCODERS: dict[str, tuple[Family, str]] = {
    "cond_stage_model.transformer.": ("sd1", "CLIP"),
    "cond_stage_model.model.": ("sd2", "OpenCLIP"),
}
UNET = "model.diffusion_model."
AVERAGED_UNET = "model_ema.diffusion_model"  # then the name without its dots
WANTED = "give a text-to-image model of Stable Diffusion 1, 2 or XL, in one file or as a folder"

ADAPTER = re.compile(r"lora_(down|up|A|B)\b|\.lora\.|\.hada_w1|\.lokr_w1")
# What else a file may hold: the first pattern that the start of a name matches says it.
OTHERS = {
    r"control_model\.|controlnet_cond_embedding\.": "is a ControlNet, which is not supported yet",
    r"(model\.diffusion_model\.)?joint_blocks\.": "is Stable Diffusion 3, not supported yet",
    r"(model\.diffusion_model\.)?double_blocks\.": "is a Flux model, not supported yet",
    r"single_transformer_blocks\.": "is a Flux model, not supported yet",
    r"edm_": "is an EDM model, such as Playground 2.5 or CosXL, not supported yet",
    r"denoiser\.backbone\.": "is a checkpoint of a run of this project, not a base: init_from=FILE",
}
# What it may hold alone, where there is no U-Net of a single file.
ALONE = {
    r"(down_blocks\.\d+\.attentions|mid_block\.attentions)\.": "is the U-Net of a folder alone",
    r"(model\.)?(diffusion_model\.)?input_blocks\.": "is a U-Net alone, with its prefix lost",
    r"(first_stage_model\.)?(encoder\.conv_in|decoder\.conv_in)\.": "is an autoencoder alone",
    r"(cond_stage_model|conditioner)\.": "is a text encoder alone",
    r"(text_model\.)?embeddings\.token_embedding\.": "is a text encoder alone",
    r"(emb_params|string_to_param|clip_g|clip_l)\b": "is a textual inversion, words and no model",
}
CHANNELS = {
    5: "a depth-to-image model",
    7: "an upscaler",
    8: "an InstructPix2Pix model",
    9: "an inpainting model",
}
PREDICTIONS: dict[str, Prediction] = {
    "v": "v",
    "v_prediction": "v",
    "epsilon": "noise",
    "eps": "noise",
    "noise": "noise",
}
ARCHITECTURES: dict[str, Prediction] = {
    "stable-diffusion-v2-768-v": "v",
    "stable-diffusion-v2-512": "noise",
}
PREDICTION_KEYS = ("prediction_type", "modelspec.prediction_type")
ZERO_SNR_KEYS = ("ztsnr", "zero_snr", "rescale_betas_zero_snr", "ss_zero_terminal_snr")


class UnsupportedModelError(ValueError):
    """A file holds no model that can be fine-tuned here; the message says what it is instead."""


@dataclass(frozen=True)
class Recognised:
    """Which model a file holds.

    Attributes:
        family: of its U-Net and text encoders.
        prediction: what the U-Net predicts; None if nothing tells.
        zero_snr: whether it was trained with a schedule that ends without any signal.
        has_ema: whether the averaged U-Net is in the file, too.
        why: how all this was recognised, for people.
    """

    family: Family
    prediction: Prediction | None
    zero_snr: bool
    has_ema: bool
    why: str


def recognise(file: WeightsFile) -> Recognised:
    """Return which Stable Diffusion ``file`` holds.

    Raises:
        UnsupportedModelError: it holds something else, naming it.
    """
    if reason := _name_other(file):
        raise UnsupportedModelError(f"{file.path} {reason}; {WANTED}")
    family, evidence = _find_family(file)
    prediction, source = _find_prediction(file, family)
    return Recognised(
        family=family,
        prediction=prediction,
        zero_snr=_is_zero_snr(file),
        has_ema=any(name.startswith(AVERAGED_UNET) for name in file.tensors),
        why=f"{FAMILIES[family]}, because {evidence}; {source}",
    )


def describe(file: WeightsFile) -> list[str]:
    """Return what ``file`` is, in lines for ``python -m exact_resume show``."""
    try:
        found = recognise(file)
    except UnsupportedModelError as error:
        reason = str(error).removeprefix(f"{file.path} ").removesuffix(f"; {WANTED}")
        return [f"family      none: it {reason}"]
    lines = [
        f"family      {found.family}: {found.why}",
        f"predicts    {found.prediction or 'unknown: give target=v or target=noise'}",
    ]
    if found.zero_snr:
        lines.append("schedule    rescaled, so that it ends without any signal (zero SNR)")
    return lines


def _name_other(file: WeightsFile) -> str:
    """Return what ``file`` holds instead of a Stable Diffusion; '' if it may hold one."""
    names = file.tensors.keys()
    first = file.tensors.get(f"{UNET}input_blocks.0.0.weight")
    if first is None and any(ADAPTER.search(name) for name in names):
        return "is a LoRA alone, which needs the model that it was trained on"
    if what := _match(OTHERS, names):
        return what
    if first is None:
        modules = sorted({name.partition(".")[0] for name in names})
        return _match(ALONE, names) or f"is no model known here (it has {', '.join(modules[:5])})"
    channels = first.shape[1] if first.ndim == 4 else 0
    if channels != 4:
        kind = CHANNELS.get(channels, "a model of another kind")
        return f"is {kind} ({channels} input channels), not supported yet"
    return ""


def _match(patterns: dict[str, str], names: Iterable[str]) -> str:
    """Return the text of the first pattern that the start of one of ``names`` matches, or ''."""
    for pattern, text in patterns.items():
        if any(re.match(pattern, name) for name in names):
            return text
    return ""


def _find_family(file: WeightsFile) -> tuple[Family, str]:
    """Return the family, and what shows it.

    Raises:
        UnsupportedModelError: it is of none.
    """
    names = file.tensors.keys()
    if f"{UNET}label_emb.0.0.weight" in names:  # the network takes a vector beside the text
        if any(name.startswith("cond_stage_model.") for name in names):
            raise _unsupported(file, "is Stable Diffusion 2 unCLIP, not supported yet")
        deep = f"{UNET}input_blocks.9.0.in_layers.0.weight" in names
        if deep or any(name.startswith("conditioner.embedders.0.model.") for name in names):
            raise _unsupported(file, "is the refiner of Stable Diffusion XL, not supported yet")
        return "sdxl", "its U-Net takes a vector beside the text (label_emb)"
    for prefix, (family, encoder) in TEXT_ENCODERS.items():
        if any(name.startswith(prefix) for name in names):
            return family, f"its text encoder is {encoder} ({prefix}*)"
    if any(name.startswith("cond_stage_model.") for name in names):
        raise _unsupported(file, "has a text encoder that no Stable Diffusion has")
    for name, tensor in file.tensors.items():
        if name.startswith(f"{UNET}input_blocks.") and name.endswith(".proj_in.weight"):
            if tensor.ndim == 4:
                return "sd1", "the attention of its U-Net begins with convolutions (proj_in)"
            return "sd2", "the attention of its U-Net begins with linear layers (proj_in)"
    raise _unsupported(file, "has a U-Net without attention to a text")


def _unsupported(file: WeightsFile, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{file.path} {reason}; {WANTED}")


def _find_prediction(file: WeightsFile, family: Family) -> tuple[Prediction | None, str]:
    """Return what the network predicts, and what says so.

    Raises:
        UnsupportedModelError: it predicts something else.
    """
    if "v_pred" in file.tensors:
        return "v", "it predicts v, as its tensor v_pred says"
    for key in PREDICTION_KEYS:
        word = file.metadata.get(key, "").strip().lower()
        if word in PREDICTIONS:
            prediction = PREDICTIONS[word]
            return prediction, f"it predicts {prediction}, as its metadata says ({key})"
        if word:
            raise _unsupported(file, f"predicts {word} ({key}), not supported yet")
    architecture = file.metadata.get("modelspec.architecture", "")
    if architecture in ARCHITECTURES:
        prediction = ARCHITECTURES[architecture]
        return prediction, f"it predicts {prediction}, as its metadata says ({architecture})"
    if family == "sd2":
        return None, "nothing in it says whether it predicts v or noise"
    return "noise", "it predicts noise, as this family does if nothing says otherwise"


def _is_zero_snr(file: WeightsFile) -> bool:
    words = [file.metadata.get(key, "").lower() for key in ZERO_SNR_KEYS]
    return "ztsnr" in file.tensors or "true" in words or "1" in words
