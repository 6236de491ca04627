"""A base: the pretrained files that a fine-tuning run starts from, and what they decide.

    base=FILE|FOLDER  ->  backbone, space, condition and target of the config

The config records what was found, with a SHA-256 of each part. So a run is continued with the same
base, wherever it lies now, and with no other.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from exact_resume.checkpoint.writer import TRANSIENT_ERRNOS
from sturdy.data.buckets import Size, parse_buckets, size_text
from sturdy.errors import ConfigError
from sturdy.image_size import ImageSize, height_and_width
from sturdy.training.module import DiffusionModule

if TYPE_CHECKING:  # diffusers is imported by runs that have a base
    from sturdy.pretrained.base import Base

TARGETS = {"noise": "sturdy.diffusion.target.Noise", "v": "sturdy.diffusion.target.V"}
FAMILIES = {"sd1": "Stable Diffusion 1", "sd2": "Stable Diffusion 2", "sdxl": "Stable Diffusion XL"}


def resolve_base(cfg: DictConfig) -> list[str]:
    """Write into ``cfg`` what the files of ``base.path`` decide; nothing without that key.

    Args:
        cfg: is changed.

    Returns:
        What was found, for people.

    Raises:
        ConfigError: the files cannot be used, or do not go with the rest of the config.
    """
    path = OmegaConf.select(cfg, "base.path")
    if path is None:
        if OmegaConf.select(cfg, "target") is None:
            raise ConfigError("target must be chosen: target=noise, v, velocity, ...")
        return []
    from sturdy.pretrained.base import open_base

    try:
        base = open_base(path)
        check_image_size(base, cfg.data.image_size)
        if buckets := cfg.data.get("buckets"):
            check_buckets(base, parse_buckets(buckets, cfg.data.image_size))
        network = base.config("unet")
        hashes = {part: base.sha256(part) for part in base.parts}
    except (ImportError, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in TRANSIENT_ERRNOS:
            raise  # the disk may be back when the run is started again
        raise ConfigError(_with_key(str(error), path)) from None
    cfg.backbone.network = "UNet2DConditionModel"
    network.pop("sample_size", None)  # files differ in it, and no number depends on it
    cfg.backbone.config = network
    cfg.backbone.base.sha256 = hashes["unet"]
    if "path" in cfg.space and cfg.space.path == path:
        cfg.space.sha256 = hashes["vae"]
    if "path" in cfg.condition and cfg.condition.path == path:
        encoders = [hashes[part] for part in base.parts if part.startswith("text_encoder")]
        cfg.condition.sha256 = "+".join(encoders)
    if cfg.backbone.lora.rank is None:
        for key, default in (("alpha", None), ("dropout", 0)):
            if (given := cfg.backbone.lora[key]) != default:
                raise ConfigError(f"lora.{key}={given} needs lora.rank, such as lora.rank=16")
        cfg.backbone.lora = None
    if base.zero_snr:
        raise ConfigError(
            f"base={path} was trained on a schedule that ends in pure noise (zero terminal SNR), "
            f"which schedule=scaled_linear does not: such a base is not supported yet"
        )
    resolve_target(cfg, base)
    family = FAMILIES.get(base.family, base.family)
    prediction = cfg.target._target_.rpartition(".")[2].lower()
    found = f"base: {family}, {base.path} (SHA-256 {hashes['unet'][:12]}), target {prediction}"
    return ["\n    ".join([found, *base.notes])]


def resolve_target(cfg: DictConfig, base: "Base") -> None:
    """Fill in ``target`` from the base, or check the one that was given.

    Raises:
        ConfigError: the base does not say what it predicts, or says something else.
    """
    given = OmegaConf.select(cfg, "target._target_")
    expected = TARGETS.get(base.prediction or "")
    if given is None and expected is None:
        raise ConfigError(
            f"base={base.path} does not say what its network predicts. Add target=v (the models of "
            f"Stable Diffusion 2 for 768 pixels) or target=noise (those for 512 pixels)"
        )
    if given is None:
        OmegaConf.update(cfg, "target", {"_target_": expected}, force_add=True)
    elif expected is not None and given != expected:
        raise ConfigError(
            f"target={given.rpartition('.')[2].lower()}: base={base.path} predicts "
            f"{base.prediction}. Leave target out"
        )


def check_image_size(base: "Base", size: ImageSize) -> None:
    """Check that network and autoencoder can halve images of ``size`` as often as they do.

    Raises:
        ValueError: they cannot; the message names the next sizes.
    """
    unit = unit_of(base)
    for side in height_and_width(size):
        if side % unit:
            below = side // unit * unit
            nearest = f"{below} or {below + unit}" if below else str(unit)
            raise ValueError(
                f"data.image_size={side} is no multiple of {unit}, as this base needs: choose "
                f"{nearest}"
            )


def check_buckets(base: "Base", sizes: Sequence[Size]) -> None:
    """Check the same of the heights and widths of buckets.

    Raises:
        ValueError: a side cannot be halved so often.
    """
    unit = unit_of(base)
    for size in sizes:
        if any(side % unit for side in size):
            raise ValueError(
                f"data.buckets: the sides of {size_text(size)} must be multiples of {unit}, as "
                f"this base needs"
            )


def unit_of(base: "Base") -> int:
    """Return the number of pixels that become one position of the smallest level."""
    levels = len(base.config("unet").get("block_out_channels", ())) or 1
    reductions = len(base.config("vae").get("block_out_channels", ())) or 1
    return int(2 ** (levels - 1 + reductions - 1))


def describe_trained(module: DiffusionModule) -> str:
    """Say how many of the weights of a network are trained."""
    total = sum(p.numel() for p in module.denoiser.parameters())
    trained = sum(p.numel() for p in module.trained())
    if trained == total:
        return f"all {total:,} weights are trained"
    return f"an adapter of {trained:,} weights is trained beside {total - trained:,} frozen ones"


def _with_key(message: str, path: Any) -> str:
    """Put ``base=`` in front, unless ``message`` begins with a key of its own."""
    return message if message.startswith(("data.", "base=")) else f"base={path}: {message}"
