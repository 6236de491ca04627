"""Is everything generated as often as it should be? Attributes of samples, as classifiers of real
images read them.

    share of samples that are read as an option   against   its share in truth

Classifiers err too: what they make of held-out images, whose attributes are known, stands beside
    every figure. And
between two options no real image tells where one ends: there several readers differ, who were
    trained from other
weights, so a share is their mean, with how far apart they are.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from sturdy.encoders.cached import cached
from sturdy.encoders.network import VERSION, Network, Tell, answer, fit
from sturdy.encoders.pictures import ImageSet
from sturdy.evaluation.report import Report, percent

Answers = Mapping[str, Tensor]


@dataclass(frozen=True)
class Frequency:
    """One option of one attribute, as shares of pictures.

    Attributes:
        truth: of the training images; of a class, what was asked for.
        samples: read off the samples by the classifiers, on average.
        read, known: of the held-out images, by the classifiers and in truth.
        apart: between the classifier that reads it off the samples most often and the one that does
            so least often.
    """

    attribute: str
    option: str
    truth: float
    samples: float
    read: float
    known: float
    apart: float

    @property
    def difference(self) -> float:
        """In points of a hundred, of samples to the truth."""
        return 100 * (self.samples - self.truth)

    @property
    def ratio(self) -> float:
        """Of samples to the truth; NaN where the truth is none."""
        return self.samples / self.truth if self.truth else float("nan")


def frequencies(
    options: Mapping[str, Sequence[str]],
    truth: Answers,
    samples: Answers,
    read: Answers,
    known: Answers,
) -> list[Frequency]:
    """Every option's. ``truth`` and ``known`` are ``(n,)`` an attribute, counted in its
    ``options``; what was read,
    ``samples`` and ``read``, is ``(readers, n)``."""
    rows = []
    for name, names in options.items():
        each = shares(samples[name], len(names))
        apart = (each.amax(0) - each.amin(0)).tolist()
        means = [
            shares(those[name], len(names)).mean(0).tolist()
            for those in (truth, samples, read, known)
        ]
        rows += [Frequency(name, *row) for row in zip(names, *means, apart, strict=True)]
    return rows


def shares(answers: Tensor, options: int) -> Tensor:
    """Of each option among ``answers`` ``(n,)`` or ``(readers, n)``: ``(readers, options)`` in
    float64.
    """
    return F.one_hot(torch.atleast_2d(answers), options).double().mean(1)


def accuracy(answers: Tensor, right: Tensor) -> float:
    """Share of answers, ``(n,)`` or ``(readers, n)``, that are right."""
    return (answers == right).double().mean().item()


def by_class(hits: Tensor, labels: Tensor, classes: int) -> list[float]:
    """The share of ``hits`` ``(n,)`` or ``(readers, n)`` in each class; NaN for a class without
    pictures.
    """
    return [hits[..., labels == k].double().mean().item() for k in range(classes)]


def classifiers(
    train: ImageSet,
    options: Mapping[str, Sequence[str]],
    *,
    count: int,
    seen: int,
    data: tuple[object, ...],
    folder: Path,
    tell: Tell,
) -> list[Network]:
    """``count`` of them, trained to read ``options`` off the training images; arguments as of
    ``Features.prepare``.
    """
    questions = {name: (train.answers[name], len(names)) for name, names in options.items()}

    def trained(seed: int) -> Network:
        network = Network(
            train.pixels.shape[-1], {name: n for name, (_, n) in questions.items()}
        ).eval()

        def so_far(done: int, total: int) -> None:
            tell(seed * total + done, count * total)

        def make() -> dict[str, Tensor]:
            return fit(
                train.pixels, questions, contrast=False, seen=seen, seed=seed, tell=so_far
            ).state_dict()

        depends = (VERSION, seen, sorted(questions), *data)
        network.load_state_dict(cached(folder, f"audit-network-{seed}", depends, make))
        return network

    return [trained(seed) for seed in range(count)]


def audit(
    report: Report,
    readers: Sequence[Network],
    samples: ImageSet,
    train: ImageSet,
    held_out: ImageSet,
    options: Mapping[str, Sequence[str]],
    labelled: str | None,
) -> str:
    """How often each option comes, and whether samples are of the class asked for; returns the
    verdict.

    Args:
        readers: as of ``classifiers``.
        options: names of the answers of each attribute.
        labelled: the attribute that is the class.
    """
    read, sampled, asked = answers(readers, held_out), answers(readers, samples), samples.labels
    trust = {name: accuracy(read[name], held_out.answers[name]) for name in options}
    report.heading("Audit")
    report.text(
        f"What classifiers trained on the training images ({len(readers)}) read off the samples, "
        f"on average. Of "
        f"{len(held_out):,} held-out images they get right: "
        + ", ".join(f"{name} {percent(right)}" for name, right in trust.items())
        + "."
    )
    report.numbers["classifier_accuracy"] = trust
    verdicts, truth = [], dict(train.answers)
    if labelled and asked is not None:
        truth[labelled], names = asked, options[labelled]
        right = accuracy(sampled[labelled], asked)
        each = by_class(sampled[labelled] == asked, asked, len(names))
        usual = by_class(
            read[labelled] == held_out.answers[labelled], held_out.answers[labelled], len(names)
        )
        counts = torch.bincount(asked, minlength=len(names)).tolist()
        report.numbers["class_accuracy"] = {"all": right, **dict(zip(names, each, strict=True))}
        verdicts.append(
            f"class accuracy {percent(right)} of {len(samples):,} samples (held-out images: "
            f"{percent(trust[labelled])})"
        )
        rows = zip(names, counts, each, usual, strict=True)
        report.table(
            [labelled, "asked for", "samples read as it", "held-out read as it"],
            [[name, str(count), percent(e), percent(u)] for name, count, e, u in rows],
        )
    found = frequencies(options, truth, sampled, read, held_out.answers)
    report.numbers["frequencies"] = [asdict(f) | {"ratio": f.ratio} for f in found]
    report.text(
        "How often each attribute comes; *difference* (in points) and *ratio* are of samples to "
        "the truth, and *apart* "
        "(in points) are the two classifiers that read it most and least often. Of a perfect "
        "model, a quarter would be "
        f"off by {100 * math.sqrt(0.25 * 0.75 / len(samples)):.1f} points with {len(samples):,} "
        f"pictures, by "
        "chance (standard error)."
    )
    head = (
        "attribute, option, truth, samples, difference, apart, ratio, held-out read, held-out truth"
    )
    report.table(head.split(", "), [_row(f) for f in found])
    worst = max(found, key=lambda f: abs(f.difference))
    rarest = min((f for f in found if f.truth), key=lambda f: f.truth)
    differs = f"{worst.difference:+.1f} points (classifiers {100 * worst.apart:.1f} apart)"
    verdicts.append(f"worst frequency: {worst.attribute} {worst.option}, {differs}")
    verdicts.append(
        f"rarest: {rarest.attribute} {rarest.option}, {rarest.ratio:.2f} times the truth"
    )
    return "; ".join(verdicts)


def answers(readers: Sequence[Network], pictures: ImageSet) -> dict[str, Tensor]:
    """Of all readers about all pictures, ``(readers, n)`` a question."""
    each = [answer(reader, pictures.pixels) for reader in readers]
    return {name: torch.stack([one[name] for one in each]) for name in each[0]}


def _row(f: Frequency) -> list[str]:
    truth, samples, read, known = (
        percent(share) for share in (f.truth, f.samples, f.read, f.known)
    )
    points = f"{f.difference:+.1f}", f"{100 * f.apart:.1f}"
    return [f.attribute, f.option, truth, samples, *points, f"{f.ratio:.2f}", read, known]
