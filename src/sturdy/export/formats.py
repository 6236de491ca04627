"""The formats: what each writes, who reads it back, and the lines of the card that use it."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from exact_resume.files import open_durable
from sturdy.diffusion.denoiser import Denoiser
from sturdy.diffusion.target import Velocity
from sturdy.export import snippets
from sturdy.export.hashes import tensor_hashes
from sturdy.export.path import sampling_times
from sturdy.export.programs import check_onnx, trace, trace_decoder, write_program
from sturdy.image_size import ImageSize, height_and_width
from sturdy.pretrained.base import open_base
from sturdy.pretrained.borrowed import Borrowed
from sturdy.pretrained.latents import Latents
from sturdy.pretrained.merge import has_adapter, merge_adapter
from sturdy.pretrained.schedulers import make_scheduler
from sturdy.pretrained.write_pipeline import (
    silence,
    write_autoencoder,
    write_stable_diffusion,
    write_unconditional,
)
from sturdy.pretrained.write_weights import (
    save_tensors,
    write_kohya_lora,
    write_lora,
    write_single_file,
)
from sturdy.sampling.loaded_run import LoadedRun
from sturdy.training.captions import caption_option

CARD_STEPS = 50  # of the sampler in a card
CONFIG = "config.json"
OWN = (
    "is a network of this project, and diffusers has no class for it: train with backbone=unet2d "
    "for a folder of diffusers, or use to=torch_export, to=onnx or to=safetensors"
)


@dataclass(frozen=True)
class Subject:
    """What is exported.

    Attributes:
        run: the run.
        denoiser: its network, in float32 on the CPU.
        arguments: the condition of the samples that are compared, as the backbone gets it.
        text: that the first of them was encoded from; None without captions.
    """

    run: LoadedRun
    denoiser: Denoiser
    arguments: tuple[Tensor | None, ...]
    text: str | None

    @property
    def backbone(self) -> Any:
        """The network."""
        return self.denoiser.backbone

    @property
    def name(self) -> str:
        """The name of the run's directory."""
        return self.run.directory.name

    @property
    def size(self) -> ImageSize:
        """Height and width of the images; one number for squares."""
        size: ImageSize = self.run.config["data"]["image_size"]
        return size

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape ``(c, h, w)`` of x_0."""
        return self.run.module.space.shape_of(*height_and_width(self.size))


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        ask: who reads it back, with arguments.
        code: of the card.
        notes: sentences for the card.
        library: for the head of the card, as the hub names it.
    """

    ask: dict[str, Any]
    code: str
    notes: list[str] = field(default_factory=list)
    library: str = ""


class UnsuitableFormatError(ValueError):
    """A run cannot be written in a format; the message says which can be used."""


Expected = Mapping[str, Tensor]
Writer = Callable[[Subject, Path, Path, Expected], Written]


def write_diffusers(subject: Subject, folder: Path, check: Path, expected: Expected) -> Written:
    """Write a pipeline of diffusers; an adapter is merged into its network."""
    backbone = _borrowed(subject)
    module = subject.run.module
    silence()
    kind = backbone.kind
    if kind == "DiTTransformer2DModel":
        raise UnsuitableFormatError(
            f"to=diffusers: {kind} has no pipeline here; use to=safetensors"
        )
    scheduler = _scheduler(subject)
    network = merge_adapter(backbone)
    _, height, width = subject.shape
    network.register_to_config(sample_size=height if height == width else (height, width))
    captions = caption_option(module)
    ask: dict[str, Any] = {"reader": "pipeline", "text": subject.text}
    if captions is not None:
        if not isinstance(module.space, Latents):
            raise UnsuitableFormatError(
                "to=diffusers: a pipeline of Stable Diffusion needs space=latents; use "
                "to=safetensors"
            )
        write_stable_diffusion(folder, network, scheduler, module.space, captions)
        guidance = subject.run.config["guidance"]["scale"]
        code = snippets.text_to_image(subject.text or "", guidance)
        return Written(ask, code, library="diffusers")
    pipeline = write_unconditional(folder, network, scheduler)
    if isinstance(module.space, Latents):
        write_autoencoder(folder / "vae", module.space)
    code = snippets.diffusers_loop(
        pipeline,
        (network.config.in_channels, height, width),
        classes=list(subject.run.config["classes"]),
        decoder=isinstance(module.space, Latents),
    )
    return Written(ask, code, library="diffusers")


def write_adapter(subject: Subject, folder: Path, check: Path, expected: Expected) -> Written:
    """Write an adapter as diffusers does."""
    backbone = _adapter(subject, "lora")
    path = write_lora(folder, backbone)
    return _asked_of_base(subject, check, path.name, ["alpha / rank is multiplied into B"])


def write_kohya(subject: Subject, folder: Path, check: Path, expected: Expected) -> Written:
    """Write a single file for the programs that read those of kohya or the authors."""
    backbone = _borrowed(subject)
    if backbone.base is None:
        raise UnsuitableFormatError("to=kohya is for Stable Diffusion: use to=diffusers")
    file = f"{subject.name}.safetensors"
    if has_adapter(backbone):
        write_kohya_lora(folder / file, backbone)
        return _asked_of_base(subject, check, file, [])
    write_single_file(folder / file, backbone)
    _write_json(check / "unet" / CONFIG, open_base(backbone.base.path).config("unet"))
    ask = {"reader": "single_file", "file": file}
    return Written(ask, "", ["the whole model in one file, with the names of its authors"])


def write_safetensors(subject: Subject, folder: Path, check: Path, expected: Expected) -> Written:
    """Write the weights of the network and what it is."""
    if isinstance(subject.backbone, Borrowed):
        network = merge_adapter(subject.backbone)
        network.save_pretrained(folder)
        kind = subject.backbone.kind
        return Written({"reader": "network", "class": kind}, snippets.network(kind))
    state = subject.backbone.state_dict()
    save_tensors(folder / "model.safetensors", state)
    describe(subject, folder)
    ask = {"reader": "tensors", "file": "model.safetensors", "sha256": tensor_hashes(state)}
    return Written(ask, snippets.own_network(guided=_is_guided(subject)))


def write_torch_export(subject: Subject, folder: Path, check: Path, expected: Expected) -> Written:
    """Write programs of torch.export."""
    return _write_programs(subject, folder, expected, "torch_export", ".pt2")


def write_onnx(subject: Subject, folder: Path, check: Path, expected: Expected) -> Written:
    """Write programs of ONNX."""
    check_onnx()
    return _write_programs(subject, folder, expected, "onnx", ".onnx")


FORMATS: dict[str, Writer] = {
    "diffusers": write_diffusers,
    "lora": write_adapter,
    "kohya": write_kohya,
    "safetensors": write_safetensors,
    "torch_export": write_torch_export,
    "onnx": write_onnx,
}


def describe(subject: Subject, folder: Path) -> None:
    """Write what the network is and how it is sampled as ``config.json``."""
    config, module = subject.run.config, subject.run.module
    spacing = config["sampler"].get("spacing", "time")
    clip = module.space.clip
    _write_json(
        folder / CONFIG,
        {
            "backbone": config["backbone"],
            "schedule": config["schedule"],
            "target": config["target"],
            "shape": list(subject.shape),
            "clip": None if clip is None else list(clip),
            "classes": list(config["classes"]),
            "guidance": config["guidance"]["scale"],
            **sampling_times(subject.denoiser, CARD_STEPS, spacing),
        },
    )


def _write_programs(
    subject: Subject, folder: Path, expected: Expected, reader: str, suffix: str
) -> Written:
    if isinstance(subject.backbone, Borrowed):
        merge_adapter(subject.backbone)
    ask: dict[str, Any] = {"reader": reader, "file": f"denoiser{suffix}"}
    arguments = [argument for argument in subject.arguments if argument is not None]
    inputs = [expected["x"][0], expected["t"][0], *arguments]
    write_program(trace(subject.denoiser, inputs), folder / ask["file"])
    space = subject.run.module.space
    if isinstance(space, Latents):
        ask["decoder"] = f"decoder{suffix}"
        program = trace_decoder(space, expected["latent"])
        write_program(program, folder / ask["decoder"])
    describe(subject, folder)
    code = snippets.program(
        reader,
        classes=subject.denoiser.num_classes > 0 and subject.text is None,
        guided=_is_guided(subject),
        text=[list(argument.shape[1:]) for argument in arguments]
        if subject.text is not None
        else [],
        decoder=isinstance(space, Latents),
    )
    return Written(ask, code)


def _borrowed(subject: Subject) -> Borrowed:
    if not isinstance(subject.backbone, Borrowed):
        raise UnsuitableFormatError(f"{type(subject.backbone).__name__} {OWN}")
    return subject.backbone


def _adapter(subject: Subject, to: str) -> Borrowed:
    backbone = subject.backbone
    if not isinstance(backbone, Borrowed) or not has_adapter(backbone):
        raise UnsuitableFormatError(
            f"to={to}: this run trained all weights of its network, and no adapter: use "
            f"to=diffusers, or to=safetensors"
        )
    return backbone


def _scheduler(subject: Subject) -> Any:
    denoiser = subject.denoiser
    clip = subject.run.module.space.clip is not None
    return make_scheduler(denoiser.schedule, denoiser.target, clip=clip)


def _asked_of_base(subject: Subject, check: Path, file: str, notes: list[str]) -> Written:
    """Ask for an adapter to be read beside the U-Net of its base."""
    silence()
    backbone = subject.backbone
    base = open_base(backbone.base.path)
    unet: Any = base.build("unet")
    unet.save_pretrained(check / "unet")
    ask = {"reader": "adapter", "file": file, "is_xl": base.family == "sdxl"}
    scale = subject.run.config["guidance"]["scale"]
    code = snippets.adapter(file, base.family == "sdxl", subject.text or "", scale)
    return Written(ask, code, notes, library="diffusers")


def _is_guided(subject: Subject) -> bool:
    """Whether the lines of a card guide by the null label."""
    scale = subject.run.config["guidance"]["scale"]
    return bool(subject.denoiser.num_classes) and subject.text is None and scale != 1


def is_flow(denoiser: Denoiser) -> bool:
    """Whether diffusers samples the network as a flow, whose estimates it does not clip."""
    return type(denoiser.target) is Velocity


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    with open_durable(path) as file:
        file.write(f"{json.dumps(content, indent=1)}\n".encode())
