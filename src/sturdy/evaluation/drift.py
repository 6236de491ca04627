"""Are new images like the old ones? By distances in the features of the evaluation.

    old       the images that the newest checkpoint was trained with
    new       what the folder has beside them; or else what came when they last changed

Held-out old images are the scale: they come from where the old ones come from, and the network of
the features has seen neither them nor the new ones.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from exact_resume.randomness import generator
from sturdy.data.cache import find_cache
from sturdy.data.changes import new_images
from sturdy.encoders.images import ImageSet, scaled
from sturdy.evaluation.distances import count_as_extreme, kid, own_neighbours
from sturdy.evaluation.features import Features
from sturdy.evaluation.figures import image_table
from sturdy.evaluation.memorisation import nearest
from sturdy.evaluation.reference import build_data, load_reference_images, open_data
from sturdy.evaluation.report import Report
from sturdy.sampling.loaded_run import LoadedRun, check_integers, open_run
from sturdy.sampling.output_folder import claim_folder

OUTPUT = "drift"  # in the run's directory
FEWEST = 8  # images of which a KID is computed
DIVISIONS = 1000
NO_ACCIDENT = 0.005  # share of divisions, in each of two tests
MOST = 2000  # images of each set that are divided
STRANGE = 0.99  # of the old held-out images, nearer than a strange one
SHOWN = 12  # strangest images, in the figure
NAMED = 3  # of them, on the console
NEIGHBOURS = 3

EXPLANATION = (
    "*KID* is how different two sets of images are; 0 is not at all, and ± is its standard error. "
    "Each set is compared with the old training images. An image is *strange* if it is farther "
    "from every old training image than 99 of 100 old held-out images are. A random *division* "
    "puts the new and the held-out images together, and draws as many of them in the place of the "
    "new ones. If new images are like the old ones, any number of divisions is as far apart."
)


@dataclass(frozen=True)
class Growth:
    """The images of a run before and after some came.

    Attributes:
        old: the data module, open on the images before.
        new: likewise after.
        indices: of the images in the cache of ``new`` whose content ``old`` does not have.
        when: such as ``not trained on yet``.
    """

    old: Any
    new: Any
    indices: list[int]
    when: str


@dataclass(frozen=True)
class Drift:
    """How far new images are from the old ones.

    Attributes:
        kid: of the new images against the old training images, and its standard error; None if
            there are too few images.
        floor: the same of the old held-out images.
        divisions: of the new and the old held-out images together, divided at random: how many
            divisions are as separate, and how many have as many strange images; None likewise.
        distances: of each new image to the nearest old training image, ``(n,)``, where 1 is the
            median of the old held-out images.
        strange: which of them are strange, bool ``(n,)``.
        expected: how many would be strange if they were like the old ones.
    """

    kid: tuple[float, float] | None
    floor: tuple[float, float] | None
    divisions: tuple[int, int] | None
    distances: Tensor
    strange: Tensor
    expected: float

    def describe(self) -> list[str]:
        """Say in a few lines how different the new images are."""
        n = len(self.distances)
        strange = int(self.strange.sum())
        strange_line = (
            f"strange: {strange:,} of {n:,} new images; of images like the old ones about "
            f"{self.expected:.0f} would be"
        )
        if not (self.kid and self.floor and self.divisions):
            few = f"too few images for a KID: it takes {FEWEST} new and {FEWEST} held-out ones"
            return [few, strange_line]
        separate, stranger = self.divisions
        differ = min(self.divisions) < NO_ACCIDENT * DIVISIONS
        return [
            f"drift: KID of the {n:,} new images against the old {_format(self.kid)}; of held-out "
            f"old images {_format(self.floor)}",
            strange_line,
            f"{'the new images differ from the old' if differ else 'no difference is seen'}: of "
            f"{DIVISIONS:,} random divisions of new and held-out images, {separate:,} are as "
            f"separate and {stranger:,} have as many strange ones (fewer than "
            f"{NO_ACCIDENT * DIVISIONS:.0f} of either are no accident)",
        ]


def write_drift(cfg: DictConfig) -> None:
    """Compare the new images of a run with the old ones; write a report and print its results.

    Raises:
        ValueError, OSError, ResumeRefusedError, NoValidCheckpointError, InstantiationException:
            with what to do; no report was written.
    """
    options = cfg.evaluate
    check_integers(options, {"most": FEWEST}, "evaluate.")
    features: Features = instantiate({"features": cfg.features})["features"]
    run = open_run(cfg)
    growth = find_growth(cfg, run)
    if growth is None:
        print(f"no image of {cfg.run} is new: there is nothing to compare")
        return
    reference = load_reference_images(growth.old, features, options.most, Path(cfg.paths.cache))
    indices = growth.indices[: options.most]
    names = [growth.new.cache.names[i] for i in indices]
    pixels = images_at(growth.new, indices)
    found = features.extract(pixels)
    drift = measure(reference.train.features, reference.held_out.features, found)

    how = {
        "old": growth.old.digest,
        "new": growth.new.digest,
        "most": options.most,
        "features": OmegaConf.to_container(cfg.features, resolve=True),
    }
    out = claim_folder("evaluate.out", options.out, run.directory / OUTPUT, how, ["report.*"])
    report = Report(out, f"{cfg.run}: new images against the old")
    report.introduction = (
        f"{len(names):,} new images, {growth.when}, against {len(reference.train):,} old training "
        f"images and {len(reference.held_out):,} old held-out images. Features: {features.name}."
    )
    report.verdicts = drift.describe()
    report.heading("What it means")
    report.text(EXPLANATION)
    folders_section(report, names, drift)
    strangest_section(report, names, pixels, found, drift, reference.train)
    report.numbers = {
        "run": cfg.run,
        "features": features.name,
        "kid": drift.kid,
        "floor": drift.floor,
        "divisions": drift.divisions,
        "strange": int(drift.strange.sum()),
        "distances": dict(zip(names, drift.distances.tolist(), strict=True)),
    }
    path = report.write()
    print(report.introduction, *report.verdicts, sep="\n")
    print(f"look at {out / 'strangest.png'}; the whole report is {path}")


def find_growth(cfg: DictConfig, run: LoadedRun) -> Growth | None:
    """Return the new images that are not trained on yet, or else those that came last.

    Raises:
        ValueError: the images before are not in the cache any more.
    """
    trained = open_data(cfg, run)
    today, _ = build_data(cfg, run)
    try:
        today.open()
    except (ValueError, OSError) as error:  # its images are in the cache all the same
        print(f"the source cannot be read: {error}", flush=True)
    else:
        if found := new_images(trained.cache, today.cache):
            return Growth(trained, today, found, "not trained on yet")
    for entry in reversed(run.point.manifest.get("trajectories", ())):
        digest = entry["data"]
        if digest is None:  # of a checkpoint from elsewhere
            continue
        before, _ = build_data(cfg, run)
        if find_cache(before.cache_root, digest) is None:
            raise ValueError(
                f"paths.cache={cfg.paths.cache} does not have the images before step "
                f"{entry['step']} any more, so there is nothing to compare with"
            )
        before.open(expected_digest=digest)
        if found := new_images(before.cache, trained.cache):
            return Growth(before, trained, found, f"trained on since step {entry['step']:,}")
    return None


def images_at(data: Any, indices: Sequence[int]) -> Tensor:
    """Return the images at ``indices`` of the cache, uint8 ``(n, 3, h, w)``."""
    images = data.val_dataloader().dataset
    index_at_place = images.split.indices(np.arange(len(data.cache)))
    place_of_index = np.argsort(index_at_place)
    pixels: Tensor = images[place_of_index[np.asarray(indices)]].image
    return pixels


def measure(train: Tensor, held_out: Tensor, new: Tensor) -> Drift:
    """Compare the features of new images with those of old ones, ``(n, d)`` each."""
    distances, _ = nearest(new, train)
    usual, _ = nearest(held_out, train)
    is_enough = min(len(new), len(held_out)) >= FEWEST
    return Drift(
        kid=kid(train, new) if is_enough else None,
        floor=kid(train, held_out) if is_enough else None,
        divisions=_divide(new, held_out, distances, usual) if is_enough else None,
        distances=distances / usual.median().clamp(min=1e-12),
        strange=distances > usual.quantile(STRANGE),
        expected=len(new) * max(1 - STRANGE, 1 / (len(held_out) + 1)),
    )


def _divide(new: Tensor, held_out: Tensor, distances: Tensor, usual: Tensor) -> tuple[int, int]:
    """Return how many random divisions are as separate, and have as many strange images."""
    draws = generator("drift")
    a = torch.randperm(len(new), generator=draws)[:MOST]
    b = torch.randperm(len(held_out), generator=draws)[:MOST]
    far = torch.cat([distances[a], usual[b]])

    def strange(part: Tensor) -> float:
        return (far[part] > far[~part].quantile(STRANGE)).sum().item()

    separate = own_neighbours(torch.cat([new[a], held_out[b]]))
    return (
        count_as_extreme(len(a), len(b), separate, divisions=DIVISIONS),
        count_as_extreme(len(a), len(b), strange, divisions=DIVISIONS),
    )


def folders_section(report: Report, names: Sequence[str], drift: Drift) -> None:
    """Add a table of the folders that new images lie in, the strangest first."""
    members = defaultdict(list)
    for i, name in enumerate(names):
        members[str(PurePosixPath(name).parent)].append(i)
    if len(members) < 2:
        return
    rows = []
    for folder, numbers in members.items():
        share = drift.strange[numbers].double().mean().item()
        rows.append((share, folder, len(numbers), drift.distances[numbers].median().item()))
    rows.sort(reverse=True)
    report.heading("By folder")
    cells = [[folder, str(n), f"{share:.0%}", f"{far:.2f}"] for share, folder, n, far in rows]
    report.table(["folder", "new images", "strange", "median distance"], cells)
    shown = ", ".join(f"{folder} {share:.0%} of {n:,}" for share, folder, n, _ in rows[:NAMED])
    report.verdicts.append(f"strange by folder: {shown}" + ", ..." * (len(rows) > NAMED))


def strangest_section(
    report: Report,
    names: Sequence[str],
    pixels: Tensor,
    features: Tensor,
    drift: Drift,
    train: ImageSet,
) -> None:
    """Add the new images that are farthest from the old ones, and the old ones next to them."""
    order = drift.distances.argsort(descending=True, stable=True)[:SHOWN]
    chosen = [names[i] for i in order.tolist()]
    far = drift.distances[order].tolist()
    first = ", ".join(f"{n} ({d:.1f})" for n, d in zip(chosen[:NAMED], far, strict=False))
    report.verdicts.append(f"the farthest, where 1 is usual: {first}")
    count = min(NEIGHBOURS, len(train))
    near = torch.cdist(features[order], train.features).topk(count, largest=False).indices
    columns = [pixels[order], *(train.pixels[near[:, k]] for k in range(count))]
    figure = image_table(
        scaled(torch.stack(columns, dim=1)),
        columns=["new", "nearest old", *["next"] * (count - 1)],
        rows=[f"{_shorten(n)}  {d:.1f}" for n, d in zip(chosen, far, strict=True)],
    )
    report.heading("The strangest")
    report.figure(
        "strangest.png",
        figure,
        "The new images that are farthest from the old ones, with the distance, where 1 is usual; "
        "beside each the nearest old images",
    )


def _shorten(name: str, most: int = 24) -> str:
    """Return the end of a long name."""
    return name if len(name) <= most else f"...{name[-most:]}"


def _format(value: tuple[float, float]) -> str:
    return f"{value[0]:.4f} ± {value[1]:.4f}"
