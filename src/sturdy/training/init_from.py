"""Begin a run from the weights of another one: find them, see what fits, and say so.

The weights count by their content and not by their path: their SHA-256 goes into every checkpoint.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exact_resume.checkpoint.store import (
    MANIFEST,
    STATE,
    CorruptCheckpointError,
    Store,
    load_state,
    verify_checkpoint,
)
from exact_resume.fingerprint import content_hash, flatten
from exact_resume.weights_file import open_weights
from sturdy.training.match_weights import Config, backbone_changes, class_change, match, shorten
from sturdy.training.module import DiffusionModule

if TYPE_CHECKING:  # diffusers is imported where it is needed
    from sturdy.pretrained.base import Base

NETWORK = "backbone.network."  # of diffusers, in a denoiser
FOLDER_FILES = ("model_index.json", "config.json")  # of a folder of diffusers
AVERAGE = "ema.model."  # the average that validates and samples, whichever kind of EMA it is
# Settings that give the same weights another meaning.
MEANING = {
    "target": "the output layer must be learned anew",
    "schedule": "the same time is another level of noise",
    "data.image_size": "the same shape has another size in pixels",
    "backbone.base.sha256": "an adapter was learned for other weights",
}


@dataclass(frozen=True)
class Source:
    """A verified checkpoint that another run begins from.

    Attributes:
        word: what the user called it.
        state: path of its ``state.ckpt``.
        sha256: of that file; of its U-Net's tensors where it is no checkpoint of this project.
        pretrained: the base that the file or folder is, if it is no checkpoint of this project.
    """

    word: str
    state: Path
    sha256: str | None
    pretrained: "Base | None" = None


def find_source(word: str, runs: Path) -> Source:
    """Find the checkpoint that ``init_from=word`` means, and verify it; nothing is changed.

    Args:
        word: a ``state.ckpt``, a checkpoint's directory, a run's directory or the name of a run. A
            run means its newest checkpoint that verifies. Or a file or folder of a pretrained
            network.
        runs: the directory of all runs.

    Raises:
        ValueError: there is none, or it does not verify.
    """
    place = _locate(word, runs)
    if isinstance(place, Path):
        pretrained = None if _is_checkpoint(place) else _open_pretrained(place, word)
        sha256 = pretrained.sha256("unet") if pretrained else _verified_hash(place, word)
        return Source(word, place, sha256, pretrained)
    if place is None:
        checkpoints = [path for path in runs.glob("*/checkpoints") if Store(path).steps()]
        names = sorted(path.parent.name for path in checkpoints)
        raise ValueError(
            f"init_from={word} is not there. Give a run, its directory, a checkpoint's directory "
            f"or its {STATE}; runs in {runs}: {shorten(names, 20) or 'none'}"
        )
    for step in reversed(place.steps()):
        try:
            manifest = place.verify(step)
        except CorruptCheckpointError:
            continue  # use the next older one; a reader leaves the corrupt one in its place
        return Source(word, place.state(step), manifest["files"][STATE]["sha256"])
    raise ValueError(f"init_from={word}: no checkpoint in {place.directory} verifies")


def init_from(module: DiffusionModule, source: Source) -> str:
    """Start ``module`` and its averages from the averaged weights in ``source``.

    Returns:
        What was taken, for people.

    Raises:
        ValueError: they are of another network; the message names the config keys that differ.
        CheckpointLoadError: the file holds more than tensors and primitives.
    """
    if source.pretrained:
        return _init_from_pretrained(module, source, source.pretrained)
    state = load_state(source.state)
    given = {}
    for name, tensor in state.get("state_dict", {}).items():
        if name.startswith(AVERAGE):
            given[name.removeprefix(AVERAGE)] = tensor
    if not given:
        raise ValueError(
            f"init_from={source.word}: {source.state} holds no averaged weights ({AVERAGE}*)"
        )
    then = state.get("config") or {}
    now = module.config or {}
    theirs = _backbone_class(then)
    ours = _backbone_class(now)
    if theirs and ours and theirs != ours:
        raise ValueError(
            f"init_from={source.word} is of another backbone, {theirs}; this run's is {ours}"
        )
    found = match(module.denoiser, given, then, now)
    if found.odd:
        keys = backbone_changes(then, now)
        reason = shorten(keys) if keys else f"its code builds other weights: {shorten(found.odd)}"
        raise ValueError(f"init_from={source.word} holds another network: {reason}")
    for network in (module.denoiser, *module.ema.networks()):
        network.load_state_dict(found.weights)
    module.initial = {"path": str(source.state), "sha256": source.sha256}

    total = len(found.weights)
    taken = total - len(found.new)
    count = "all" if taken == total else f"{taken} of"
    step = state.get("global_step", "?")
    lines = [
        f"init_from={source.word} (step {step}, EMA weights): {count} {total} tensors taken",
        class_change(then, now),
    ]
    if found.new:
        lines.append(f"new here: {shorten(found.new)}")
    if left := [name for name in found.left if name not in found.new]:
        lines.append(f"not taken: {shorten(left)}")
    lines += _meaning_changes(then, now)
    return "\n    ".join(line for line in lines if line)


def differing_weights(
    began: Mapping[str, Any] | None, word: str | None, before: str | None, runs: Path
) -> str | None:
    """Return why a run that began from ``began`` is not one with ``init_from=word``, or None.

    The file may have been moved, may be gone, or may no longer be asked for. A run that is named
    may have gone on since.

    Args:
        began: ``init_from`` of the checkpoint that is continued; None if it has none.
        word: ``init_from`` of this start.
        before: ``init_from`` of the config when that checkpoint was written.
        runs: the directory of all runs.
    """
    # Older versions did not record what they took.
    if word is None or (began is None and word == before):
        return None
    if began is None:
        return (
            f"init_from={word}, but this run did not begin from it: give the new run a name of its "
            f"own (name=...)"
        )
    place = _locate(word, runs)
    if place is None:
        return None
    if isinstance(place, Store):
        states = [place.state(step) for step in place.steps()]
        is_same = word == before or not states or began["sha256"] in map(_recorded_hash, states)
    elif _is_checkpoint(place):
        is_same = began["sha256"] == _recorded_hash(place)
    else:
        is_same = began["sha256"] == _open_pretrained(place, word).sha256("unet")
    if is_same:
        return None
    return (
        f"init_from={word} holds other weights than this run began from, which were those of "
        f"{began['path']} (SHA-256 {began['sha256'][:12]})"
    )


def _init_from_pretrained(module: DiffusionModule, source: Source, base: "Base") -> str:
    """Take from the U-Net of ``base`` each tensor whose name and shape are those of this network.

    Raises:
        ValueError: there is none.
    """
    networks = [module.denoiser, *module.ema.networks()]
    given = {f"{NETWORK}{name}": tensor for name, tensor in base.weights("unet").items()}
    own = networks[0].state_dict()
    fitting = [name for name in own if name in given and own[name].shape == given[name].shape]
    if module.base_names:
        raise ValueError(
            f"init_from={source.word} is a whole network, and this run trains an adapter: give "
            f"a run of an adapter, or that network as base={source.word}"
        )
    if not fitting:
        backbone = type(module.denoiser.backbone).__name__
        raise ValueError(
            f"init_from={source.word} holds a U-Net of Stable Diffusion, and no "
            f"tensor of it fits this run's backbone, {backbone}. To train that network: "
            f"experiment=finetune base={source.word}"
        )
    for network in networks:
        network.load_state_dict(own | {name: given[name] for name in fitting})
    module.initial = {"path": str(source.state), "sha256": source.sha256}
    reshaped = [name for name in own if name in given and name not in fitting]
    count = "all" if len(fitting) == len(own) else f"{len(fitting)} of"
    lines = [f"init_from={source.word}: {count} {len(own)} tensors taken"]
    if reshaped:
        shapes = [f"{n} {tuple(given[n].shape)}, here {tuple(own[n].shape)}" for n in reshaped]
        lines.append(f"of another shape: {shorten(shapes)}")
    if new := [name for name in own if name not in given]:
        lines.append(f"new here: {shorten(new)}")
    if left := [name for name in given if name not in own]:
        lines.append(f"not taken: {shorten(left)}")
    target = type(module.denoiser.target).__name__.lower()
    if base.prediction not in (None, target):
        lines.append(f"its target is {base.prediction}, here {target}: {MEANING['target']}")
    return "\n    ".join(lines)


def _is_checkpoint(path: Path) -> bool:
    """Return whether ``path`` is a file that this project wrote, or a part of one."""
    if path.name == STATE or (path.parent / MANIFEST).exists():
        return True
    if path.is_dir():
        return False
    tensors = open_weights(path).tensors
    return any(name.startswith(AVERAGE) for name in tensors)


def _open_pretrained(path: Path, word: str) -> "Base":
    from sturdy.pretrained.base import open_base

    try:
        return open_base(path)
    except ValueError as error:
        raise ValueError(f"init_from={word}: {error}") from None


def _locate(word: str, runs: Path) -> Path | Store | None:
    """Return the ``state.ckpt`` or the store that ``word`` names; None if there is neither."""
    for path in (Path(word).expanduser(), runs / word):
        if path.is_file() or any((path / name).is_file() for name in FOLDER_FILES):
            return path
        if (path / STATE).is_file():
            return path / STATE
        store = Store(path / "checkpoints")
        if store.steps():
            return store
    return None


def _verified_hash(state: Path, word: str) -> str | None:
    """Return the SHA-256 of ``state``, checked against the manifest beside it if there is one."""
    if not (state.parent / MANIFEST).exists():
        return content_hash(state)
    try:
        return verify_checkpoint(state.parent)["files"][state.name]["sha256"]
    except CorruptCheckpointError as error:
        raise ValueError(
            f"init_from={word} does not verify: {error}. Choose another checkpoint"
        ) from None
    except KeyError:
        raise ValueError(f"init_from={word}: {state.name} is not in its {MANIFEST}") from None


def _recorded_hash(state: Path) -> str | None:
    """Return the SHA-256 of ``state`` from its manifest, or else computed; None if unreadable."""
    try:
        manifest = json.loads((state.parent / MANIFEST).read_bytes())
        return manifest["files"][state.name]["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return content_hash(state)


def _backbone_class(config: Config) -> str:
    return str(config.get("backbone", {}).get("_target_", "")).rpartition(".")[2]


def _meaning_changes(then: Config, now: Config) -> Iterator[str]:
    """Yield a line for each setting that gives the weights another meaning."""
    for key, meaning in MEANING.items():
        theirs = _select(then, key)
        ours = _select(now, key)
        if theirs is not None and ours is not None and theirs != ours:
            before = _describe_part(theirs)
            yield f"its {key} is {before}, here {_describe_part(ours)}: {meaning}"


def _select(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config.get(part) if isinstance(config, Mapping) else None
    return config


def _describe_part(value: Any) -> str:
    """Return a config node as ``shifted(shift=3.0)``, in the words of the config groups."""
    if not isinstance(value, Mapping):
        return str(value)
    class_name = str(value.get("_target_", "")).rpartition(".")[2]
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", class_name).lower()
    options = {k: v for k, v in flatten(value).items() if k != "_target_"}
    arguments = ", ".join(f"{k}={v}" for k, v in options.items())
    return f"{name}({arguments})" if options else name
