"""From a config to a module, and from a checkpoint alone to the module it was saved from.

module = rebuild("runs/cars/checkpoints/step-00002000/state.ckpt")
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

import sturdy.renames  # noqa: F401  (checkpoints of older versions are read by today's names)
from exact_resume.checkpoint.compare import shape_mismatches
from exact_resume.checkpoint.store import load_state
from exact_resume.randomness import reseed
from sturdy.diffusion.condition import ClassCondition
from sturdy.diffusion.denoiser import Denoiser
from sturdy.training.module import DiffusionModule
from sturdy.trust import Trust

SAMPLING = ("space", "condition", "backbone", "schedule", "target", "ema")
PARTS = (*SAMPLING, "objective", "optimizer", "learning_rate", "alignment")


def build_module(config: Mapping[str, Any], parts: Iterable[str] = PARTS) -> DiffusionModule:
    """The module of a resolved config, with weights that are a function of its seed.

    Args:
        parts: those to make; with ``SAMPLING`` it has averaged weights to draw with, and cannot be
            trained.

    Raises:
        ValueError: where the parts do not go together, with the reason and what to choose.
    """
    reseed(config["seed"], "weights")
    made: dict[str, Any] = dict.fromkeys(PARTS, _not_made) | {
        "alignment": None,
        "space": None,
        "condition": None,
    }
    made |= instantiate(
        {name: config.get(name) for name in parts}, _convert_="all"
    )  # at once: an error has the key
    denoiser = Denoiser(
        made["backbone"],
        made["schedule"],
        made["target"],
        config["num_classes"],
        make_condition=made["condition"] or ClassCondition,  # older configs have no condition
    )
    return DiffusionModule(
        denoiser,
        made["objective"],
        space=made["space"],
        optimizer=made["optimizer"],
        ema=made["ema"],
        learning_rate=made["learning_rate"],
        alignment=made["alignment"],
        clip=config["clip"],
        seed=config["seed"],
        shards=config["data"]["shards"],
        config=config,
    )


def _not_made(*args: Any, **options: Any) -> Any:
    raise RuntimeError(
        "this module was rebuilt to draw with; rebuild(path) makes what training needs, too"
    )


def load_module(
    path: str | Path,
    state: Mapping[str, Any] | None = None,
    *,
    trust: Trust | Iterable[str] = (),
    training: bool = True,
) -> DiffusionModule:
    """The module in a ``state.ckpt``, with its weights and EMA; nothing beside the file is needed.

    Args:
        state: what is in the file, where it was read already; else it is read here, and verified.
        trust: packages whose classes the file may name, such as ``["mypackage"]``.
            ``Trust(runs="runs")`` trusts what the runs there have named in their own training.
        training: whether it is to be trained. Else objective, optimizer, learning rate and
            alignment are left out: they need not be installed, nor be trusted.

    Raises:
        ValueError: if the file holds no config of ours, or its weights are not those of the network
            that this code
            makes of it, or a part cannot be made, or it names code that is not trusted: a
                checkpoint must not choose
            what is executed. ``DiffusionModule.load_from_checkpoint(path, **modules)`` asks the
            file for no code.
    """
    state = load_state(Path(path)) if state is None else state
    config = state.get("config")
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no config; it was not written by this project")
    parts = PARTS if training else SAMPLING
    (trust if isinstance(trust, Trust) else Trust(trust)).check(Path(path), config, parts)
    try:
        module = build_module(config, parts)
    except InstantiationException as error:
        raise ValueError(f"{path}: {' '.join(str(error.__cause__ or error).split())}") from error
    weights = state["state_dict"]
    if not training:
        weights = {
            name: value for name, value in weights.items() if name.startswith(("denoiser.", "ema."))
        }
    if odd := shape_mismatches(module.state_dict(), weights):
        raise ValueError(
            f"{path} is of code that builds another network. Use that code, whose commit is in the "
            f"run's "
            f"attempts/*/environment.json, or train anew. What differs: {odd}"
        )
    module.load_state_dict(weights)
    return module
