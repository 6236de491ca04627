"""What sample.py and evaluate.py share: a run that is loaded, and a job whose errors are one line.

The scripts change nothing that training wrote.
"""

import difflib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf

from exact_resume.checkpoint.store import NoValidCheckpointError
from exact_resume.fingerprint import content_hash
from exact_resume.resume import ResumePoint, ResumeRefusedError, read_resume_point
from exact_resume.system import available_cpus
from sturdy.errors import describe
from sturdy.training.build import SAMPLING_PARTS, load_module
from sturdy.training.captions import caption_option
from sturdy.training.fingerprint import CONDITION_KEY, SPACE_KEY
from sturdy.training.module import DiffusionModule
from sturdy.trust import Trust

MAX_DEPTH = 4  # of the folders below paths.runs in which runs are looked for
OLD_DEFAULTS = "sampling.yaml"  # in the run's directory
SHOWN_RUNS = 20  # in an error message
MOVABLE = ("base", "space", "condition")  # parts of a run whose files may have been moved


@dataclass(frozen=True)
class LoadedRun:
    """A run, and the module of one of its checkpoints.

    Attributes:
        directory: the run's, where the images and reports go.
        point: the checkpoint.
        module: in eval mode, on ``device``; it has no parts that only training needs.
        device: such as ``cuda``.
        trust: which code the files of the run may name.
        paths: where its files lie now, as of ``load_module``.
    """

    directory: Path
    point: ResumePoint
    module: DiffusionModule
    device: str
    trust: Trust
    paths: Mapping[str, str] = field(default_factory=dict)

    @property
    def config(self) -> Mapping[str, Any]:
        """The config that the run was trained with, as primitives."""
        return cast(Mapping[str, Any], self.module.config)


def run_job(job: Callable[[DictConfig], None], cfg: DictConfig) -> int:
    """Do ``job`` deterministically; return the exit code.

    An error that the user can mend is printed as one line.
    """
    try:
        prepare_torch(cfg)
        job(cfg)
    except torch.OutOfMemoryError:
        print(
            f"error: the memory of device={cfg.device} is too small for this batch_size",
            file=sys.stderr,
        )
        return 2
    except (
        ValueError,
        OSError,
        ResumeRefusedError,
        NoValidCheckpointError,
        InstantiationException,
    ) as error:
        print(f"error: {describe(error)}", file=sys.stderr)
        return 2
    return 0


def prepare_torch(cfg: DictConfig) -> None:
    """Compute deterministically, with ``threads`` threads.

    Raises:
        ValueError: ``threads`` is no number of threads.
    """
    # Before CUDA starts; without it cuBLAS is not deterministic.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if cfg.threads is not None:
        check_integers(cfg, {"threads": 1})
    torch.set_num_threads(cfg.threads or available_cpus())
    torch.use_deterministic_algorithms(True)


def open_run(cfg: DictConfig) -> LoadedRun:
    """Load the checkpoint that ``run`` and ``ckpt_path`` name.

    Raises:
        ValueError, OSError, ResumeRefusedError, NoValidCheckpointError: with what to do.
    """
    device = find_device(cfg.device)
    directory = find_run(Path(cfg.paths.runs), str(cfg.run), cfg.ckpt_path)
    trust = Trust(cfg.trust, cfg.paths.runs)
    point, content = read_resume_point(directory, cfg.ckpt_path)
    if (directory / OLD_DEFAULTS).exists():
        print(
            f"note: {directory / OLD_DEFAULTS} of an older version is not read any more: give its "
            f"settings as sampler.steps=..., guidance.scale=... and so on",
            flush=True,
        )
    check_files(point)
    paths = {}
    for key in MOVABLE:
        if (place := OmegaConf.select(cfg, f"{key}.path")) is not None:
            paths[key] = str(place)
    module = load_module(point.state, content, trust=trust, training=False, paths=paths)
    trained_with = point.manifest.get("fingerprint", {}).get("config", {})
    if point.manifest and module.space.key() != trained_with.get(SPACE_KEY, ""):
        raise ValueError("space: its weights are not those that the run was trained with")
    option = caption_option(module)
    if point.manifest and option and option.key() != trained_with.get(CONDITION_KEY):
        raise ValueError(
            f"condition: the text encoders of {option.path} are not those that the run was trained "
            f"with"
        )
    return LoadedRun(directory, point, module.to(device).eval(), device, trust, paths)


def check_files(point: ResumePoint) -> None:
    """Check that the files that the network reads are those that the run was trained with.

    Raises:
        ValueError: a file is gone, or its content changed; the message names the config key.
    """
    then = point.manifest.get("fingerprint", {})
    for key, sha256 in then.get("files", {}).items():
        path = then.get("config", {}).get(key)
        if key.partition(".")[0] not in SAMPLING_PARTS or path is None:
            continue
        found = content_hash(Path(path).expanduser())
        if found is None:
            raise ValueError(f"{key}: {path}, which the run was trained with, is not there")
        if found != sha256:
            raise ValueError(f"{key}: the content of {path} is not what the run was trained with")


def find_run(runs: Path, word: str, ckpt_path: str | int | None = "last") -> Path:
    """Return the directory of the run ``word``: its name under ``runs``, or a path.

    A checkpoint that is given by its path needs no run. The result is then the directory that the
    run would have.

    Raises:
        ValueError: if there is no such run, with the runs there are, those with a similar name
            first.
    """
    if (runs / word).is_dir():
        return runs / word
    if (Path(word) / "checkpoints").is_dir():
        return Path(word)
    if ckpt_path is not None and Path(str(ckpt_path)).exists():
        return runs / word
    missing = f"run={word} is not there; paths.runs={runs.absolute()} has"
    existing = list(runs_under(runs))
    if not existing:
        raise ValueError(f"{missing} no runs. Give paths.runs=...")
    similar = difflib.get_close_matches(Path(word).name, existing, n=5, cutoff=0.6)
    names = similar + [name for name in existing if name not in similar]
    more = f" and {len(names) - SHOWN_RUNS} more" if len(names) > SHOWN_RUNS else ""
    raise ValueError(f"{missing} {', '.join(names[:SHOWN_RUNS])}{more}")


def runs_under(runs: Path) -> Iterator[str]:
    """Yield the names of the runs under ``runs``, in order; those of a sweep are in a folder."""
    for folder, names, _ in os.walk(runs):
        path = Path(folder).relative_to(runs)
        if "checkpoints" in names and path.parts:
            yield str(path)
            names.clear()
        elif len(path.parts) >= MAX_DEPTH:
            names.clear()
        names.sort()


def find_device(word: object) -> str:
    """Return the torch device for ``device=word``.

    ``auto`` is a GPU if there is one, and ``gpu`` is CUDA's.

    Raises:
        ValueError: if there is no such device, with those there are.
    """
    devices = []
    if torch.cuda.is_available():
        devices += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append("mps")
    devices.append("cpu")
    kinds = [device.partition(":")[0] for device in devices]
    name = str(word).replace("gpu", "cuda")
    if name == "auto":
        return kinds[0]
    if name in devices or name in kinds:
        return name
    raise ValueError(
        f"device={word} is not there; torch finds {', '.join(devices)}. device=auto takes the first"
    )


def check_integers(
    options: Mapping[Any, Any], minimums: Mapping[str, int | None], prefix: str = ""
) -> None:
    """Check that options are integers.

    Args:
        options: all of them; those without a minimum are not checked.
        minimums: the smallest value of each option; None for no bound.
        prefix: of the options' names in the message, such as ``sample.``.

    Raises:
        ValueError: naming the option.
    """
    for name in options.keys() & minimums.keys():
        value = options[name]
        minimum = minimums[name]
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        if not is_integer or (minimum is not None and value < minimum):
            bound = "" if minimum is None else f" of at least {minimum}"
            raise ValueError(f"{prefix}{name}={value} must be a whole number{bound}")
