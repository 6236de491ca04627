"""From a config to a module, and from a checkpoint alone to the module it was saved from.

module = rebuild("runs/cars/checkpoints/step-00002000/state.ckpt")
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.utils import instantiate

from sturdy.diffusion.denoiser import Denoiser
from sturdy.randomness import reseed
from sturdy.resume.compare import misfits
from sturdy.resume.store import load_state
from sturdy.training.module import DiffusionModule
from sturdy.training.trusted import strangers

PARTS = ("backbone", "schedule", "target", "objective", "optimizer", "ema", "learning_rate", "alignment")
TRUSTED = (
    "sturdy.backbone.",
    "sturdy.diffusion.",
    "sturdy.training.ema.",
    "sturdy.training.optim.",
    "sturdy.training.alignment.",
    "sturdy.evaluation.encoders.",
    "torch.optim.",
)


def build(config: Mapping[str, Any]) -> DiffusionModule:
    """The module of a resolved config, with weights that are a function of its seed.

    Raises:
        ValueError: where the parts do not go together, with the reason and what to choose.
    """
    reseed(config["seed"], "weights")
    parts = {name: instantiate(config.get(name), _convert_="all") for name in PARTS}
    denoiser = Denoiser(parts["backbone"], parts["schedule"], parts["target"], config["num_classes"])
    return DiffusionModule(
        denoiser,
        parts["objective"],
        optimizer=parts["optimizer"],
        ema=parts["ema"],
        learning_rate=parts["learning_rate"],
        alignment=parts["alignment"],
        clip=config["clip"],
        seed=config["seed"],
        shards=config["data"]["shards"],
        config=config,
    )


def rebuild(path: str | Path) -> DiffusionModule:
    """The module in a ``state.ckpt``, with its weights and EMA; nothing beside the file is needed.

    Raises:
        ValueError: if the file holds no config of ours, or its weights are not those of the network that this code
            makes of it, or it names code that is not ours: a checkpoint must not choose what is executed. Then use
            ``DiffusionModule.load_from_checkpoint(path, **modules)``.
    """
    state = load_state(Path(path))
    config = state.get("config")
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no config; it was not written by this project")
    for name in PARTS:
        for stranger in strangers(config.get(name), TRUSTED):
            raise ValueError(
                f"{path} asks for {stranger} as its {name}, which is not code of this project and is not run. If you "
                f"trust it, build the modules and use DiffusionModule.load_from_checkpoint(path, **modules)"
            )
    module = build(config)
    if odd := misfits(module.state_dict(), state["state_dict"]):
        raise ValueError(
            f"{path} is of code that builds another network. Use that code, whose commit is in the run's "
            f"attempts/*/environment.json, or train anew. What differs: {odd}"
        )
    module.load_state_dict(state["state_dict"])
    return module
