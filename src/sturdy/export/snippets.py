"""The lines of a card that load an export and draw images, to be run in its folder."""

import json
from collections.abc import Sequence

TO_PNG = """pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
Image.fromarray(torch.cat(list(pixels), 1).squeeze(2).numpy()).save("drawn.png")"""

OWN_LOOP = """how = json.load(open("config.json"))
{condition}
x = how["sigma"][0] * torch.randn(n, *how["shape"])
for i in range(len(how["t"]) - 1):
    t = torch.full((n,), how["t"][i])
    x0 = {estimate}
{guide}{clip}    noise = (x - how["alpha"][i] * x0) / how["sigma"][i]
    x = how["alpha"][i + 1] * x0 + how["sigma"][i + 1] * noise
image = {image}
{png}"""

GUIDE = """    weak = {weak}
    x0 = weak + how["guidance"] * (x0 - weak)
"""

CLIP = """    if how["clip"]:
        x0 = x0.clamp(*how["clip"])
"""


def text_to_image(prompt: str, guidance: float) -> str:
    """Load a pipeline of Stable Diffusion and draw for a prompt."""
    return f"""import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(".")
pipe.to("cuda" if torch.cuda.is_available() else "cpu")
drawn = pipe({_text(prompt)}, num_inference_steps=30, guidance_scale={guidance:g})
drawn.images[0].save("drawn.png")"""


def adapter(file: str, is_xl: bool, prompt: str, guidance: float) -> str:
    """Load an adapter into a pipeline of its base."""
    return f"""import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("BASE")  # the folder of the base
pipe.load_lora_weights(".", weight_name="{file}")
pipe.to("cuda" if torch.cuda.is_available() else "cpu")
drawn = pipe({_text(prompt)}, num_inference_steps=30, guidance_scale={guidance:g})
drawn.images[0].save("drawn.png")"""


def diffusers_loop(
    pipeline: str, shape: tuple[int, int, int], *, classes: Sequence[str], decoder: bool
) -> str:
    """Load a network and a scheduler of diffusers, and draw four images."""
    label = ""
    called = "pipe.unet(x, t)"
    if classes:
        label = f"label = torch.arange(4) % {len(classes)}  # {', '.join(classes)}\n"
        called = "pipe.unet(x, t, class_labels=label)"
    is_ddim = pipeline == "DDIMPipeline"
    options = ", use_clipped_model_output=True" if is_ddim else ""
    lines = ["import torch"]
    image = "x"
    load = ""
    if decoder:
        lines.append("from diffusers import AutoencoderKL, DiffusionPipeline")
        load = 'vae = AutoencoderKL.from_pretrained("vae")\n'
        image = "vae.decode(x / vae.config.scaling_factor).sample"
    else:
        lines.append("from diffusers import DiffusionPipeline")
    lines.append("from PIL import Image")
    return (
        "\n".join(lines)
        + f"""

pipe = DiffusionPipeline.from_pretrained(".")
{load}{label}x = torch.randn(4, {", ".join(map(str, shape))})
pipe.scheduler.set_timesteps(50)
with torch.no_grad():
    for t in pipe.scheduler.timesteps:
        x = pipe.scheduler.step({called}.sample, t, x{options}).prev_sample
    image = {image}
{TO_PNG}"""
    )


def network(kind: str) -> str:
    """Load one network of diffusers."""
    return f"""from diffusers import {kind}

network = {kind}.from_pretrained(".")"""


def own_network(*, guided: bool) -> str:
    """Load a network of this project, which must be installed, and draw four images."""
    loop = _loop("denoiser(x, t, label)", "x", classes=True, guided=guided)
    return f"""import json
import torch
from hydra.utils import instantiate
from PIL import Image
from safetensors.torch import load_file
from sturdy.diffusion.denoiser import Denoiser

how = json.load(open("config.json"))
names = ("backbone", "schedule", "target")
parts = instantiate({{name: how[name] for name in names}}, _convert_="all")
denoiser = Denoiser(**parts, num_classes=len(how["classes"])).eval()
denoiser.backbone.load_state_dict(load_file("model.safetensors"))
torch.set_grad_enabled(False)
{loop}"""


def program(
    reader: str, *, classes: bool, text: Sequence[Sequence[int]], guided: bool, decoder: bool
) -> str:
    """Load programs and draw four images.

    Args:
        reader: ``torch_export`` or ``onnx``.
        classes: whether the network knows classes.
        text: the shapes of the inputs that a text becomes, without the number of samples.
        guided: whether to guide by the null label.
        decoder: whether latents must be decoded.
    """
    if reader == "torch_export":
        load = "def load(file):\n    return torch.export.load(file).module()"
        imports = "import json\nimport torch\nfrom PIL import Image"
    else:
        load = (
            "def load(file):\n"
            "    session = onnxruntime.InferenceSession(file)\n"
            "    names = [put.name for put in session.get_inputs()]\n"
            "    return lambda *x: torch.from_numpy(\n"
            "        session.run(None, dict(zip(names, (one.numpy() for one in x))))[0])"
        )
        imports = "import json\nimport onnxruntime\nimport torch\nfrom PIL import Image"
    suffix = ".pt2" if reader == "torch_export" else ".onnx"
    calls = [f'denoiser = load("denoiser{suffix}")']
    if decoder:
        calls.append(f'decoder = load("decoder{suffix}")')
    loads = "\n".join(calls)
    arguments = "x, t"
    arguments += ", label" if classes else "".join(f", text[{i}]" for i in range(len(text)))
    image = "decoder(x)" if decoder else "x"
    loop = _loop(f"denoiser({arguments})", image, classes=classes, guided=guided, text=text)
    return f"{imports}\n\n{load}\n\n\n{loads}\ntorch.set_grad_enabled(False)\n{loop}"


def _loop(
    estimate: str,
    image: str,
    *,
    classes: bool,
    guided: bool,
    text: Sequence[Sequence[int]] = (),
) -> str:
    condition = ["n = 4"]
    guide = ""
    if classes:
        condition.append('label = torch.arange(n) % max(1, len(how["classes"]))')
    if guided:
        condition.append('null = torch.full((n,), len(how["classes"]))')
        guide = GUIDE.format(weak=estimate.replace("label", "null"))
    if text:
        shapes = ", ".join(f"torch.zeros(n, {', '.join(map(str, shape))})" for shape in text)
        condition.append(f"text = [{shapes}]  # put what the base's text encoders give")
    return OWN_LOOP.format(
        condition="\n".join(condition),
        estimate=estimate,
        guide=guide,
        clip=CLIP,
        image=image,
        png=TO_PNG,
    )


def _text(prompt: str) -> str:
    return json.dumps(prompt, ensure_ascii=False)
