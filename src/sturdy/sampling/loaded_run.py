"""How the scripts that read a run begin: the run, its checkpoint, the device, and a folder that is
theirs alone.

sample.py, evaluate.py and tune.py change nothing that training wrote, and overwrite nothing that
another command made.
"""

import difflib
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from omegaconf import DictConfig

from exact_resume.checkpoint.store import NoValidCheckpointError
from exact_resume.fingerprint import flatten
from exact_resume.resume import ResumePoint, ResumeRefusedError, read_resume_point
from exact_resume.system import available_cpus
from sturdy.training.build import load_module
from sturdy.training.fingerprint import sampling_code
from sturdy.training.module import DiffusionModule
from sturdy.trust import Trust

PROVENANCE = "how.json"  # in a folder: what its files were made by
DEEPEST = 4  # folders below paths.runs in which runs are looked for


def run_job(job: Callable[[DictConfig], None], cfg: DictConfig) -> int:
    """Do ``job``, deterministically, with what the user can mend told in a line; returns the exit
    code.
    """
    os.environ.setdefault(
        "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
    )  # before CUDA starts; else cuBLAS is not deterministic
    try:
        if cfg.threads is not None:
            check_integers(cfg, {"threads": 1})
        torch.set_num_threads(cfg.threads or available_cpus())
        torch.use_deterministic_algorithms(True)
        job(cfg)
    except (
        ValueError,
        OSError,
        ResumeRefusedError,
        NoValidCheckpointError,
        InstantiationException,
    ) as error:
        print(f"error: {error.__cause__ or error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError:
        print(
            f"error: the memory of device={cfg.device} is too small for this batch_size",
            file=sys.stderr,
        )
        return 2
    return 0


def open_run(cfg: DictConfig) -> tuple[Path, ResumePoint, DiffusionModule, str]:
    """Read the checkpoint that ``run`` and ``ckpt_path`` name.

    Returns:
        the directory of the run, the checkpoint, the module in it, and the device that the module
        is on.

    Raises:
        ValueError, OSError, ResumeRefusedError, NoValidCheckpointError: with what to do.
    """
    device = find_device(cfg.device)
    run = find_run(Path(cfg.paths.runs), str(cfg.run), cfg.ckpt_path)
    entry, content = read_resume_point(run, cfg.ckpt_path)
    module = load_module(
        entry.state, content, trust=Trust(cfg.trust, cfg.paths.runs), training=False
    )
    return run, entry, module.to(device).eval(), device


def find_run(runs: Path, word: str, ckpt_path: str | int | None = "last") -> Path:
    """Find the directory of the run that ``word`` names: its name under ``runs``, or a path.

    A checkpoint that is named by its path needs no run; what is made of it then lies where the run
    would be.

    Raises:
        ValueError: naming the runs there are, those with nearly this name first.
    """
    if (runs / word).is_dir():
        return runs / word
    if (Path(word) / "checkpoints").is_dir():
        return Path(word)
    if ckpt_path is not None and Path(str(ckpt_path)).exists():
        return runs / word
    there = list(runs_under(runs))
    if not there:
        raise ValueError(
            f"run={word} is not there; paths.runs={runs.absolute()} has no runs. Give "
            f"paths.runs=..."
        )
    near = difflib.get_close_matches(Path(word).name, there, n=5, cutoff=0.6)
    names = [*near, *(name for name in there if name not in near)]
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    raise ValueError(
        f"run={word} is not there; paths.runs={runs.absolute()} has {', '.join(names[:20])}{more}"
    )


def runs_under(runs: Path) -> Iterator[str]:
    """Yield the name of each run under ``runs``, in order; the runs of a sweep lie in a folder of
    theirs.
    """
    for folder, names, _ in os.walk(runs):
        path = Path(folder).relative_to(runs)
        if "checkpoints" in names and path.parts:
            yield str(path)
            names.clear()
        elif len(path.parts) >= DEEPEST:
            names.clear()
        names.sort()


def find_device(word: object) -> str:
    """Find the device that ``device=word`` means: ``auto`` is a GPU if there is one, ``gpu`` is
    CUDA's.

    Raises:
        ValueError: if it is not there, with those that are.
    """
    there = (
        [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    there += ["mps"] if torch.backends.mps.is_available() else []
    there += ["cpu"]
    name = str(word).replace("gpu", "cuda")
    if name == "auto":
        return there[0].partition(":")[0]
    if name in (*there, *(full.partition(":")[0] for full in there)):
        return name
    raise ValueError(
        f"device={word} is not there; torch finds {', '.join(there)}. device=auto takes the first"
    )


def check_integers(
    options: Mapping[Any, Any], least: Mapping[str, int | None], name: str = ""
) -> None:
    """Raise ValueError for an option that is no whole number, or below its ``least``, where None is
    any.

    Args:
        name: what stands before the options' names in the message.
    """
    for k in options.keys() & least.keys():
        value, lowest = options[k], least[k]
        if (
            not isinstance(value, int)
            or isinstance(value, bool)
            or (lowest is not None and value < lowest)
        ):
            of = "" if lowest is None else f" of at least {lowest}"
            raise ValueError(f"{name}{k}={value} must be a whole number{of}")


def provenance(
    entry: ResumePoint, device: str, config: Mapping[str, Any], sampler: Mapping[str, Any]
) -> dict[str, Any]:
    """What all images drawn from ``entry`` on ``device`` depend on, as primitives: the checkpoint
    and the code.

    Args:
        config: of the run.
        sampler: the config of the sampler that draws them.
    """
    if entry.manifest:
        sha256 = entry.manifest["files"][entry.state.name]["sha256"]
    else:
        with entry.state.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "checkpoint": {"step": entry.step, "sha256": sha256},
        "device": device.partition(":")[0],
        "code": hashlib.sha256(repr(sampling_code(config, sampler)).encode()).hexdigest()[:16],
    }


def own_folder(
    key: str, given: object, default: Path, how: Mapping[str, Any], made: Sequence[str]
) -> Path:
    """Make or find the folder for what a command makes; it holds the files of one command only.

    Its ``how.json`` says what they were made by. The same command comes back to the folder, and
    another one gets
    another: where none is ``given``, the first of ``default``, ``default-2``, ... that is free or
        its own.

    Args:
        key: the option that gives a folder, for the messages.
        how: primitives; what files of the same name depend on.
        made: patterns of the files that the command writes. A folder that has any and no
            ``how.json`` is not free.

    Raises:
        ValueError: naming the key, if the folder cannot be made or written in, or holds another
            command's files.
    """
    numbered = (default.with_name(f"{default.name}-{i}") for i in count(2))
    for folder in [Path(str(given))] if given is not None else chain([default], numbered):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            other = _claim(folder, how, made)
            if not os.access(folder, os.W_OK):
                raise PermissionError(0, "Permission denied")
        except OSError as error:
            raise ValueError(
                f"{key}={folder} cannot be written in: {error.strerror}. Give another folder"
            ) from None
        if other is None:
            return folder
    raise ValueError(
        f"{key}={given} holds what another command made ({other}): give another folder, or delete "
        f"it"
    )


def _claim(folder: Path, how: Mapping[str, Any], made: Sequence[str]) -> str | None:
    """Say in ``folder`` that it is for files made by ``how``; returns what is different if it is
    for others.
    """
    note = folder / PROVENANCE
    if not note.exists():
        if any(any(folder.glob(pattern)) for pattern in made):
            return f"there is no {PROVENANCE} beside it"
        aside = folder / f".{PROVENANCE}.{os.getpid()}"
        aside.write_text(json.dumps(how, indent=1) + "\n")
        try:
            os.link(aside, note)  # of two commands at the same time one is first
        except FileExistsError:
            pass
        finally:
            aside.unlink()
    try:
        then, now = flatten(json.loads(note.read_text())), flatten(json.loads(json.dumps(how)))
    except ValueError:
        return f"its {PROVENANCE} cannot be read"
    changed = [k for k in {**then, **now} if then.get(k, ...) != now.get(k, ...)]
    lines = [f"{k}: {then.get(k, 'nothing')} -> {now.get(k, 'nothing')}" for k in changed]
    return ", ".join(lines[:5]) or None
