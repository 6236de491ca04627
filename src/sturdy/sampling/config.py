"""How images are drawn: the sampler, its guidance and the length of the EMA.

A setting comes from the command line, or else from the config that the run was trained with.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, cast

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from exact_resume.checkpoint.store import NoValidCheckpointError
from exact_resume.resume import ResumeRefusedError, read_resume_point
from sturdy.diffusion.condition import Condition
from sturdy.diffusion.denoiser import Denoiser, Guided
from sturdy.diffusion.sampler import Estimator, Sampler
from sturdy.errors import describe
from sturdy.sampling.loaded_run import LoadedRun
from sturdy.training.build import load_module
from sturdy.training.captions import caption_option
from sturdy.training.ema_snapshots import posthoc_ema
from sturdy.trust import Trust


@dataclass(frozen=True)
class SamplingConfig:
    """The settings of sampling, as primitives, and the objects they make.

    Attributes:
        sampler: ``_target_`` and arguments of a ``Sampler``.
        guidance: arguments of ``Guided``; ``guide`` is the ``state.ckpt`` of a weaker one.
        ema: length of the EMA; None for the average that the run validates with.
        origin: where the settings are from, for people.
    """

    sampler: Mapping[str, Any]
    guidance: Mapping[str, Any]
    ema: float | None = None
    origin: str = "the run's config"

    def make_sampler(self) -> Sampler:
        """Build the sampler.

        Raises:
            ValueError: naming the key, if the settings make none.
        """
        try:
            sampler = instantiate({"sampler": self.sampler})["sampler"]
        except (ValueError, InstantiationException) as error:
            raise ValueError(describe(error)) from None
        if not isinstance(sampler, Sampler):
            raise ValueError(f"sampler={self.sampler.get('_target_', self.sampler)} is no sampler")
        return sampler

    def load_network(self, run: LoadedRun) -> Denoiser:
        """Return the averaged network of length ``ema``.

        Raises:
            ValueError: if the run has no average of that length.
        """
        network = cast(Denoiser, run.module.ema.model)
        if self.ema is None:
            return network
        snapshots = run.point.state.parent.parent.parent / "ema"
        weights = posthoc_ema(self.ema, run.module.ema, run.point.step, snapshots)
        network = deepcopy(network)
        network.load_state_dict(weights)
        return network

    def load_guide(self, run: LoadedRun) -> Denoiser | None:
        """Return the weaker network of ``guidance.guide``; None if none is configured.

        It reads the captions that ``run`` reads, which must be prepared.

        Raises:
            ValueError: it reads captions through other text encoders, or none.
        """
        guide = self.guidance.get("guide")
        if guide is None:
            return None
        module = load_module(Path(guide), trust=run.trust, training=False, paths=run.paths)
        ours = caption_option(run.module)
        theirs = caption_option(module)
        if (ours and ours.key()) != (theirs and theirs.key()):
            raise ValueError(
                f"guidance.guide={guide} reads captions otherwise than the run: choose a guide "
                f"with the same condition"
            )
        if ours and theirs:
            theirs.table = ours.table
        return cast(Denoiser, module.ema.model.to(run.device))

    def add_guidance(
        self, network: Denoiser, cond: Condition | Tensor | None, guide: Denoiser | None
    ) -> Estimator:
        """Wrap ``network`` in guidance, if there is a condition or a weaker network ``guide``.

        Raises:
            ValueError: naming the key, if the settings make no guidance.
        """
        if not self.is_guided(cond):
            return network
        try:
            return Guided(network, **{**self.guidance, "guide": guide})
        except (TypeError, ValueError) as error:
            message = str(error)
            raise ValueError(
                message if message.startswith("guidance") else f"guidance.{message}"
            ) from None

    def is_guided(self, cond: Condition | Tensor | None) -> bool:
        """Whether there is a condition or a weaker network to guide by."""
        return cond is not None or self.guidance.get("guide") is not None

    def primitives(self, cond: Condition | Tensor | None) -> dict[str, Any]:
        """Return the settings that images with the condition ``cond`` depend on."""
        guidance = self.guidance if self.is_guided(cond) else None
        return {"sampler": self.sampler, "guidance": guidance, "ema": self.ema}

    def describe(self, cond: Condition | Tensor | None) -> str:
        """Return the settings, and where they are from, in one line."""
        name = self.sampler["_target_"].rsplit(".", 1)[-1]
        arguments = ", ".join(f"{k} {v}" for k, v in self.sampler.items() if k != "_target_")
        guidance = "no guidance"
        if self.is_guided(cond):
            guidance = f"guidance {self.guidance['scale']:g}"
        if self.guidance.get("guide") is not None:
            guidance += f" away from {self.guidance['guide']}"
        average = "the run's own EMA" if self.ema is None else f"an EMA of length {self.ema:g}"
        return f"drawn by {name} ({arguments}), {guidance}, {average}: {self.origin}"


def resolve_sampling(
    cfg: DictConfig,
    config: Mapping[str, Any],
    ema: float | None = None,
    *,
    state: Path = Path("the checkpoint"),
    trust: Trust | None = None,
) -> SamplingConfig:
    """Take each setting from the command line, or else from the run.

    Args:
        cfg: the config of the command. Keys of its ``sampler`` and ``guidance`` that the user did
            not give are null.
        config: the config of the run.
        ema: the length of the EMA on the command line.
        state: the checkpoint that ``config`` was read from.
        trust: which code ``config`` may name.

    Raises:
        ValueError: naming the key, if a setting makes no sense or names code that is not trusted.
    """
    given = {name: non_null(cfg.get(name)) for name in ("sampler", "guidance")}
    if "_target_" not in given["sampler"]:
        (trust or Trust()).check(state, config, ["sampler"])
    guidance = merge(config["guidance"], given["guidance"])
    if guidance.get("guide") is not None:
        guidance["guide"] = str(_guide_state(guidance["guide"]))
    for name, number in (("guidance.scale", guidance.get("scale")), ("ema", ema or 0.0)):
        if not isinstance(number, Real):
            raise ValueError(f"{name}={number} must be a number")
    sampler = merge(config["sampler"], given["sampler"])
    return SamplingConfig(sampler, guidance, ema, _origin(given, ema))


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` with ``changes``; another ``_target_`` replaces all of ``base``."""
    return dict(changes) if "_target_" in changes else {**base, **changes}


def non_null(node: Any) -> dict[str, Any]:
    """Return a config node as primitives, without keys that are null."""
    values: Any = OmegaConf.to_container(node) if node else {}
    return {key: value for key, value in values.items() if value is not None}


def _origin(given: Mapping[str, Mapping[str, Any]], ema: float | None) -> str:
    names = []
    for part, values in given.items():
        names += [part] if "_target_" in values else [f"{part}.{key}" for key in values]
    if ema is not None:
        names.append("the EMA")
    return "from the run's config" + (f", but for {', '.join(names)}" if names else "")


def _guide_state(guide: object) -> Path:
    """Return the ``state.ckpt`` of a checkpoint, or of the last one of a run."""
    path = Path(str(guide))
    if not path.exists():
        raise ValueError(
            f"guidance.guide={guide} is not there; give the directory of a run, of one of its "
            f"checkpoints, or a state.ckpt"
        )
    ckpt_path = "last" if (path / "checkpoints").is_dir() else str(path)
    try:
        point, _ = read_resume_point(path, ckpt_path)
    except (ResumeRefusedError, NoValidCheckpointError) as error:
        raise ValueError(f"guidance.guide={guide} {error}") from None
    return point.state
