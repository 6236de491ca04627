"""From a config to a module, and from a checkpoint alone to the module that it was saved from.

module = load_module("runs/cars/checkpoints/step-00002000/state.ckpt")
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

import sturdy.renames  # noqa: F401  (older checkpoints are read under today's names)
from exact_resume.checkpoint.compare import shape_mismatches
from exact_resume.checkpoint.store import load_state
from exact_resume.randomness import reseed
from sturdy.diffusion.condition import ClassCondition
from sturdy.diffusion.denoiser import Denoiser
from sturdy.training.frozen import load_base, move_files
from sturdy.training.module import DiffusionModule
from sturdy.trust import Trust

SAMPLING_PARTS = ("space", "condition", "backbone", "schedule", "target", "ema")
PARTS = (*SAMPLING_PARTS, "objective", "optimizer", "learning_rate", "alignment")


def build_module(
    config: Mapping[str, Any], parts: Iterable[str] = PARTS, *, fresh: bool = True
) -> DiffusionModule:
    """Build the module of a resolved config, with weights that are a function of its seed.

    Args:
        config: the resolved config, nested primitives.
        parts: which parts to build. With ``SAMPLING_PARTS`` the module can sample and not train.
        fresh: whether no checkpoint will be loaded; if one will be, a base is read for what the
            checkpoint lacks only.

    Raises:
        ValueError: the parts do not go together; the message says what to choose.
    """
    reseed(config["seed"], "weights")
    nodes = {name: config.get(name) for name in parts}
    built: dict[str, Any] = dict.fromkeys(PARTS, _not_built)
    built |= {"alignment": None, "space": None, "condition": None}
    built |= instantiate(nodes, _convert_="all")  # in one call, so that an error has the key
    denoiser = Denoiser(
        built["backbone"],
        built["schedule"],
        built["target"],
        config["num_classes"],
        make_condition=built["condition"] or ClassCondition,  # older configs have no condition
    )
    load_base(denoiser, fresh=fresh)
    return DiffusionModule(
        denoiser,
        built["objective"],
        space=built["space"],
        optimizer=built["optimizer"],
        ema=built["ema"],
        learning_rate=built["learning_rate"],
        alignment=built["alignment"],
        clip=config["clip"],
        seed=config["seed"],
        shards=config["data"]["shards"],
        config=config,
    )


def load_module(
    path: str | Path,
    state: Mapping[str, Any] | None = None,
    *,
    trust: Trust | Iterable[str] = (),
    training: bool = True,
    paths: Mapping[str, str] | None = None,
) -> DiffusionModule:
    """Load the module in a ``state.ckpt``, with its weights and EMA, from that file alone.

    Args:
        path: the ``state.ckpt``.
        state: its content, if it was read already; otherwise it is read and verified here.
        trust: packages whose classes the file may name, such as ``["mypackage"]``.
            ``Trust(runs="runs")`` trusts what the runs there have named in their own training.
        training: whether the module will be trained. Otherwise objective, optimizer, learning rate
            and alignment are left out: they need neither be installed nor trusted.
        paths: where files that were moved lie now, by key: ``base``, ``space`` or ``condition``.

    Raises:
        ValueError: the file holds no config of this project, its weights are of another network
            than this code builds, a part cannot be built, or it names code that is not trusted.
            ``DiffusionModule.load_from_checkpoint(path, **modules)`` runs no code that it names.
    """
    if state is None:
        state = load_state(Path(path))
    config = state.get("config")
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no config; it was not written by this project")
    parts = PARTS if training else SAMPLING_PARTS
    trusted = trust if isinstance(trust, Trust) else Trust(trust)
    trusted.check(Path(path), config, parts)
    for key, place in (paths or {}).items():
        config = move_files(config, key, place)
    try:
        module = build_module(config, parts, fresh=False)
    except InstantiationException as error:
        message = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"{path}: {message}") from error
    weights = state["state_dict"]
    if not training:
        weights = {k: v for k, v in weights.items() if k.startswith(("denoiser.", "ema."))}
    if mismatches := shape_mismatches(module.state_dict(), weights):
        raise ValueError(
            f"{path} is of code that builds another network. Use that code, whose commit is in the "
            f"run's attempts/*/environment.json, or train anew. What differs: {mismatches}"
        )
    module.load_state_dict(weights)
    return module


def _not_built(*args: Any, **options: Any) -> Any:
    raise RuntimeError(
        "this module was loaded for sampling; load_module(path) builds what training needs, too"
    )
