"""Read an export with the libraries that others will use, and compare what it computes.

    python -I read_back.py FOLDER CHECK

It runs in a process of its own and imports nothing of this project. CHECK holds ``ask.json``, which
says what FOLDER is, and ``expected.safetensors``, which the run computed:

    x           states of a path from noise to x_0, (steps, b, c, h, w)
    next        the states one step later
    t, timestep (steps, b), the times of this project and those of diffusers
    prediction  of the network at x
    x0          the estimate of x_0 at x
    label, embeddings, pooled, sizes    of the b samples
    latent, image                       a latent and what it is decoded to

The last line of the output is JSON: by name, the largest difference and the largest number.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PROJECT = ("sturdy", "exact_resume", "examples")
Ask = Mapping[str, Any]
Tensors = dict[str, Tensor]
Found = tuple[Any, Tensors]  # the library, and what it computed

CONDITION = ("label", "embeddings", "pooled", "sizes")


def main(folder: Path, check: Path) -> None:
    """Compare, and print the answer."""
    from safetensors.torch import load_file

    ask = json.loads((check / "ask.json").read_text())
    torch.set_num_threads(ask["threads"])
    given = load_file(check / "expected.safetensors")
    with torch.no_grad():
        library, found = READERS[ask["reader"]](folder, check, ask, given)
    differences = {}
    for name, tensor in found.items():
        expected = given[name].double()
        if tensor.shape != expected.shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, not {tuple(expected.shape)}")
        difference = (tensor.double() - expected).abs().max().item()
        differences[name] = [difference, expected.abs().max().item()]
    name = f"{library.__name__} {library.__version__}"
    print(json.dumps({"library": name, "differences": differences}))


def read_pipeline(folder: Path, check: Path, ask: Ask, given: Tensors) -> Found:
    """Read a pipeline: every part of it is compared."""
    import diffusers

    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    found = follow(pipe.unet, pipe.scheduler, given)
    if hasattr(pipe, "encode_prompt"):
        found |= encode(pipe, ask)
    vae = getattr(pipe, "vae", None)
    if vae is None and (folder / "vae").is_dir():
        vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
    if vae is not None and "latent" in given:
        latent = given["latent"] / vae.config.scaling_factor + (vae.config.shift_factor or 0)
        found["image"] = vae.decode(latent).sample.clamp(-1, 1)
    return diffusers, found


def read_network(folder: Path, check: Path, ask: Ask, given: Tensors) -> Found:
    """Read one network of diffusers."""
    import diffusers

    network = getattr(diffusers, ask["class"]).from_pretrained(folder, local_files_only=True)
    return diffusers, {"prediction": predict(network, given)}


def read_single_file(folder: Path, check: Path, ask: Ask, given: Tensors) -> Found:
    """Read the U-Net of a single file; its config lies beside what was expected."""
    import diffusers

    network = diffusers.UNet2DConditionModel.from_single_file(
        str(folder / ask["file"]), config=str(check), subfolder="unet", local_files_only=True
    )
    return diffusers, {"prediction": predict(network, given)}


def read_adapter(folder: Path, check: Path, ask: Ask, given: Tensors) -> Found:
    """Read an adapter into a pipeline of the base, whose U-Net lies beside what was expected."""
    import diffusers

    unet = diffusers.UNet2DConditionModel.from_pretrained(check / "unet", local_files_only=True)
    names = ["vae", "text_encoder", "tokenizer"]
    pipe: Any
    if ask["is_xl"]:
        names += ["text_encoder_2", "tokenizer_2"]
        pipe = diffusers.StableDiffusionXLPipeline(
            **dict.fromkeys(names), unet=unet, scheduler=None
        )
    else:
        names += ["safety_checker", "feature_extractor"]
        pipe = diffusers.StableDiffusionPipeline(
            **dict.fromkeys(names), unet=unet, scheduler=None, requires_safety_checker=False
        )
    pipe.load_lora_weights(folder, weight_name=ask["file"], local_files_only=True)
    return diffusers, {"prediction": predict(pipe.unet.eval(), given)}


def read_tensors(folder: Path, check: Path, ask: Ask, given: Tensors) -> Found:
    """Read a file of tensors, and count those with other bytes than expected."""
    import safetensors
    from safetensors.torch import load_file

    tensors = load_file(folder / ask["file"])
    wrong = len(tensors.keys() ^ ask["sha256"].keys())
    for name, tensor in tensors.items():
        content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
        described = f"{tensor.dtype} {list(tensor.shape)}".encode()
        wrong += hashlib.sha256(described + content).hexdigest() != ask["sha256"].get(name)
    return safetensors, {"differing_tensors": torch.tensor([wrong])}


def read_torch_export(folder: Path, check: Path, ask: Ask, given: Tensors) -> Found:
    """Read programs of torch.export, and call them with another number of samples."""
    program = torch.export.load(folder / ask["file"]).module()
    found = {"x0": run_program(program, given)}
    if "latent" in given:
        found["image"] = torch.export.load(folder / ask["decoder"]).module()(given["latent"])
    return torch, found


def read_onnx(folder: Path, check: Path, ask: Ask, given: Tensors) -> Found:
    """Read programs of ONNX, and call them with another number of samples."""
    import onnxruntime

    def load(file: str) -> Callable[..., Tensor]:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = ask["threads"]
        session = onnxruntime.InferenceSession(
            str(folder / file), options, providers=["CPUExecutionProvider"]
        )
        names = [put.name for put in session.get_inputs()]

        def run(*tensors: Tensor) -> Tensor:
            arrays = [tensor.numpy() for tensor in tensors]
            return torch.from_numpy(session.run(None, dict(zip(names, arrays, strict=True)))[0])

        return run

    found = {"x0": run_program(load(ask["file"]), given)}
    if "latent" in given:
        found["image"] = load(ask["decoder"])(given["latent"])
    return onnxruntime, found


def follow(unet: Any, scheduler: Any, given: Tensors) -> Tensors:
    """Take each step of the path from where the run was, with the scheduler."""
    steps = len(given["x"])
    if type(scheduler).__name__ == "DDIMScheduler":
        scheduler.set_timesteps(steps)
        options = {"use_clipped_model_output": scheduler.config.clip_sample}
    else:
        scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
        options = {}
    timestep = scheduler.timesteps[:, None].expand(given["timestep"].shape)
    predictions = predict(unet, given | {"timestep": timestep})
    states = []
    for x, t, prediction in zip(given["x"], scheduler.timesteps, predictions, strict=True):
        states.append(scheduler.step(prediction, t, x, **options).prev_sample)

    return {"prediction": predictions, "next": torch.stack(states)}


def predict(network: Any, given: Tensors) -> Tensor:
    """Return what a network of diffusers predicts along the path."""
    condition: dict[str, Any] = {}
    if "embeddings" in given:
        condition["encoder_hidden_states"] = given["embeddings"]
        if "pooled" in given:
            condition["added_cond_kwargs"] = {
                "text_embeds": given["pooled"],
                "time_ids": given["sizes"],
            }
    elif "label" in given:
        condition["class_labels"] = given["label"]
    predictions = []
    for x, timestep in zip(given["x"], given["timestep"], strict=True):
        predictions.append(network(x, timestep, **condition).sample[:, : x.shape[1]])
    return torch.stack(predictions)


def encode(pipe: Any, ask: Ask) -> Tensors:
    """Return the embeddings of the text that the run encoded, and of the empty one."""
    embeddings = []
    pooled = []
    for text in (ask["text"], ""):
        if hasattr(pipe, "text_encoder_2"):
            first, _, second, _ = pipe.encode_prompt(
                text, device="cpu", do_classifier_free_guidance=False
            )
            if not text:  # as the pipeline does for an empty negative prompt
                first, second = torch.zeros_like(first), torch.zeros_like(second)
            pooled.append(second)
        else:
            first, _ = pipe.encode_prompt(text, "cpu", 1, False)
        embeddings.append(first)
    found = {"embeddings": torch.cat(embeddings)}
    return found | ({"pooled": torch.cat(pooled)} if pooled else {})


def run_program(program: Callable[..., Tensor], given: Tensors) -> Tensor:
    """Return the estimates of a program along the path, all in one call."""
    x = given["x"]
    steps, b = x.shape[:2]
    arguments = []
    for name in CONDITION:
        if name in given:
            tensor = given[name]
            arguments.append(tensor.repeat(steps, *(1 for _ in tensor.shape[1:])))
    x0 = program(x.flatten(0, 1), given["t"].flatten(), *arguments)
    return x0.unflatten(0, (steps, b))


READERS: dict[str, Callable[[Path, Path, Ask, Tensors], Found]] = {
    "pipeline": read_pipeline,
    "network": read_network,
    "single_file": read_single_file,
    "adapter": read_adapter,
    "tensors": read_tensors,
    "torch_export": read_torch_export,
    "onnx": read_onnx,
}

if __name__ == "__main__":
    for package in PROJECT:
        sys.modules[package] = None  # type: ignore[assignment]  # also where it is installed
    main(Path(sys.argv[1]), Path(sys.argv[2]))
