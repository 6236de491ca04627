"""How the pictures of a run are drawn: by which sampler, guidance and length of the EMA.

the command   before   runs/<name>/sampling.yaml, if there is one   before   the run's config
"""

from collections.abc import Mapping
from copy import deepcopy
from numbers import Real
from pathlib import Path
from typing import Any, cast

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from exact_resume.checkpoint.store import NoValidCheckpointError
from exact_resume.files import atomic_write
from exact_resume.resume import ResumePoint, ResumeRefusedError, read_resume_point
from sturdy.diffusion.denoiser import Denoiser, Guided
from sturdy.diffusion.sampler import Estimator, Sampler
from sturdy.training.build import load_module
from sturdy.training.ema_snapshots import posthoc_ema
from sturdy.training.module import DiffusionModule
from sturdy.trust import Trust

SAMPLING = "sampling.yaml"  # in the run's directory: its defaults, as tune.py found them
KINDS: dict[str, Any] = {"sampler": Mapping, "guidance": Mapping, "ema": Real | None}
GUIDANCE = ("scale", "interval", "rescale", "guide")
GOLDEN = (5**0.5 - 1) / 2
TRUST_NONE = Trust()


class SamplingConfig:
    """A sampler, a guidance and a length of the EMA, as primitives and as what they make.

    Args:
        given: the sampler's ``_target_`` and arguments.
        guidance: arguments of ``Guided``, its ``guide`` as a checkpoint or as the directory of a
            run.
        ema: None for the average that the run validates with.
        origin: where all this is from, for people.
        trust: what the guide's checkpoint may name; ``given`` is trusted.

    Raises:
        ValueError: with ``origin``, if this makes no sampler, or names a guide that is not there.
    """

    def __init__(
        self,
        given: Mapping[str, Any],
        guidance: Mapping[str, Any],
        ema: float | None = None,
        *,
        origin: str,
        trust: Trust = TRUST_NONE,
    ) -> None:
        self.given, self.guidance, self.ema, self.origin = dict(given), dict(guidance), ema, origin
        self.trust = trust
        try:
            made = instantiate(self.given)
        except (ValueError, InstantiationException) as error:
            raise ValueError(f"{error.__cause__ or error} (the recipe is {origin})") from None
        if not isinstance(made, Sampler):
            raise ValueError(
                f"{given.get('_target_', given)} is no sampler (the recipe is {origin})"
            )
        for name, value in (("guidance.scale", self.guidance.get("scale")), ("ema", ema or 0.0)):
            if not isinstance(value, Real):
                raise ValueError(f"{name}={value} must be a number (the recipe is {origin})")
        self.sampler: Sampler = made
        self.guide: ResumePoint | None = None
        if guide := self.guidance.pop("guide", None):
            try:
                self.guide = _guide(Path(str(guide)))
            except (ResumeRefusedError, NoValidCheckpointError) as error:
                raise ValueError(
                    f"guidance.guide={guide} {error} (the recipe is {origin})"
                ) from None
            self.guidance["guide"] = str(self.guide.state.parent)

    def varied(
        self, *, steps: int, scale: float | None, ema: float | None, origin: str
    ) -> "SamplingConfig":
        """The same but for these; ``scale`` None leaves the guidance."""
        guidance = self.guidance if scale is None else {**self.guidance, "scale": scale}
        return SamplingConfig(
            {**self.given, "steps": steps}, guidance, ema, origin=origin, trust=self.trust
        )

    def network(self, module: DiffusionModule, entry: ResumePoint) -> Denoiser:
        """The averaged weights of its length, where ``module`` was rebuilt from ``entry``.

        Raises:
            ValueError: with the origin, if the run has none of that length.
        """
        model = cast(Denoiser, module.ema.model)
        if self.ema is None:
            return model
        averages = entry.state.parent.parent.parent / "ema"
        try:
            weights = posthoc_ema(self.ema, module.ema, entry.step, averages)
        except ValueError as error:
            raise ValueError(f"{error} (the recipe is {self.origin})") from None
        model = deepcopy(model)
        model.load_state_dict(weights)
        return model

    def guides(self, labels: Tensor | None) -> bool:
        """Whether there is anything to guide by: labels, or a worse network."""
        return labels is not None or self.guide is not None

    def guided(
        self, denoiser: Denoiser, labels: Tensor | None, *, guide: Denoiser | None = None
    ) -> Estimator:
        """``denoiser``, guided if it can be; ``guide`` is in the place of the one that is read from
        its checkpoint.

        Raises:
            ValueError: with the origin, if the guidance is none.
        """
        if not self.guides(labels):
            return denoiser
        if self.guide and guide is None:
            module = load_module(self.guide.state, trust=self.trust, training=False)
            guide = cast(Denoiser, module.ema.model.to(next(denoiser.parameters()).device))
        try:
            return Guided(denoiser, **{**self.guidance, "guide": guide})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{error} (the recipe is {self.origin})") from None

    def primitives(self, labels: Tensor | None) -> dict[str, Any]:
        """All that pictures with these ``labels`` depend on."""
        return {
            "sampler": self.given,
            "guidance": self.guidance if self.guides(labels) else None,
            "ema": self.ema,
        }

    def how(self, labels: Tensor | None) -> str:
        """All of it in a few words."""
        guidance = f"guidance {self.guidance['scale']:g}" if self.guides(labels) else "no guidance"
        guidance += f" away from {self.guidance['guide']}" if self.guide else ""
        average = "the run's own EMA" if self.ema is None else f"an EMA of length {self.ema:g}"
        return f"{self}, {guidance}, {average}"

    def told(self, labels: Tensor | None) -> str:
        """All of it in a line, with the origin."""
        return f"drawn by {self.how(labels)}: {self.origin}"

    def __str__(self) -> str:
        told = ", ".join(f"{k} {v}" for k, v in self.given.items() if k != "_target_")
        return f"{self.given['_target_'].rsplit('.', 1)[-1]} ({told})"

    def write(self, run: Path, said: str) -> Path:
        """Make this the defaults of ``run``, durably, whole or not at all; ``said``, a line, goes
        on top.
        """
        what = {"sampler": self.given, "guidance": self.guidance, "ema": self.ema}
        with atomic_write(run / SAMPLING) as file:
            file.write(f"# {said}\n{OmegaConf.to_yaml(OmegaConf.create(what))}".encode())
        return run / SAMPLING


def resolve_sampling(
    cfg: DictConfig,
    config: Mapping[str, Any],
    run: Path | None,
    ema: float | None = None,
    *,
    state: Path = Path("the checkpoint"),
    trust: Trust = TRUST_NONE,
) -> SamplingConfig:
    """What a command draws by.

    Args:
        cfg: the command's ``sampler`` and ``guidance``, where null is what was not given.
        config: of the run.
        run: its directory, or None to leave ``sampling.yaml`` aside.
        ema: the length that the command gives.
        state: the checkpoint that ``config`` was read from.
        trust: what that and ``sampling.yaml`` may name.

    Raises:
        ValueError: naming the file or the key.
    """
    command: dict[str, Any] = {
        "sampler": non_null(cfg.get("sampler")),
        "guidance": non_null(cfg.get("guidance")),
    }
    base = {"sampler": config["sampler"], "guidance": config["guidance"], "ema": None}
    origin, written = "the run's config", {}
    if run is not None and (run / SAMPLING).is_file():
        written = read(run / SAMPLING)
        base, origin = merge(base, written), str(run / SAMPLING)
    if "_target_" not in command["sampler"]:  # else none of theirs is used
        if run is not None and written:
            trust.check_recipe(run / SAMPLING, written, ["sampler"])
        if "_target_" not in written.get("sampler", {}):
            trust.check(state, config, ["sampler"])
    named = [n for n, part in command.items() if "_target_" in part]
    named += [f"{n}.{k}" for n, part in command.items() if n not in named for k in part]
    command["ema"] = ema
    named += ["the EMA"] if ema is not None else []
    origin = f"from {origin}" + (f", but for {', '.join(named)}" if named else "")
    found = merge(base, command)
    return SamplingConfig(
        found["sampler"], found["guidance"], found["ema"], origin=origin, trust=trust
    )


def _guide(path: Path) -> ResumePoint:
    """The checkpoint at ``path``, or the last of the run there."""
    if not path.exists():
        raise ResumeRefusedError(
            "is not there; give the directory of a run, of one of its checkpoints, or a state.ckpt"
        )
    return read_resume_point(path, "last" if (path / "checkpoints").is_dir() else str(path))[0]


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes`` that are not None, part by part; another ``_target_`` replaces the
    whole part.
    """
    out = dict(base)
    for name, value in changes.items():
        if isinstance(value, Mapping) and "_target_" not in value:
            value = {**base[name], **{k: v for k, v in value.items() if v is not None}}
        if value is not None:
            out[name] = value
    return out


def read(file: Path) -> dict[str, Any]:
    """What a ``sampling.yaml`` says.

    Raises:
        ValueError: naming the file and the key.
    """
    way = "mend it, delete it to draw as the run's config says, or make it again with tune.py"
    try:
        found: Any = OmegaConf.to_container(OmegaConf.load(file))
    except Exception as error:  # a broken YAML raises whatever it likes
        raise ValueError(f"{file} cannot be read ({' '.join(str(error).split())}): {way}") from None
    if not isinstance(found, dict) or found.keys() - KINDS.keys():
        raise ValueError(f"{file} must say sampler, guidance and ema, and nothing else: {way}")
    for name, value in found.items():
        if not isinstance(value, KINDS[name]):
            raise ValueError(f"{file}: {name}={value} makes no sense: {way}")
    if odd := [k for k in found.get("guidance", {}) if k not in GUIDANCE]:
        raise ValueError(f"{file}: guidance.{odd[0]} is none of {', '.join(GUIDANCE)}: {way}")
    return found


def non_null(node: Any) -> dict[str, Any]:
    part: Any = OmegaConf.to_container(node) if node else {}
    return {k: v for k, v in part.items() if v is not None}


def labels_for(how: str, labels: Tensor | None, classes: int, n: int) -> Tensor | None:
    """The label of each picture ``(n,)``, a function of its number and the frequencies in
    ``labels``; None for none.
    """
    if how == "none" or not classes or labels is None:
        return None
    if how == "even":
        return torch.arange(n) % classes
    return labels_from_prior(torch.bincount(labels, minlength=classes), n)


def labels_from_prior(prior: Tensor, n: int) -> Tensor:
    """The label of each picture ``(n,)``, as often as ``prior`` ``(classes,)`` says, very nearly in
    any first ``n``.

    Numbers are spread by the golden ratio over [0, 1), which is cut in the proportions of the
    classes.
    """
    u = (0.5 + GOLDEN * torch.arange(n, dtype=torch.float64)) % 1
    shares = prior.double() / prior.double().sum()
    return torch.searchsorted(shares.cumsum(0), u, right=True).clamp(max=len(prior) - 1)
