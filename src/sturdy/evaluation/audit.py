"""Is everything generated as often as it should be? Attributes of samples, read by classifiers.

    share of samples that are classified as an option   against   its share in truth

Classifiers err, too: their shares of held-out images, whose attributes are known, are beside every
number. And the border between two options is ambiguous: several classifiers are trained from
different weights, and the share is their mean, with their spread.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from sturdy.encoders.cached import cached
from sturdy.encoders.images import ImageSet
from sturdy.encoders.network import VERSION, Network, Tell, answer, fit
from sturdy.evaluation.report import Report, percent

Answers = Mapping[str, Tensor]


@dataclass(frozen=True)
class Frequency:
    """One option of one attribute, as shares of images.

    Attributes:
        attribute: its name.
        option: its name.
        truth: of the training images; for the class, of the labels that were asked for.
        samples: of the samples, by the classifiers, on average.
        read: of the held-out images, by the classifiers.
        known: of the held-out images, in truth.
        spread: between the classifiers with the largest and the smallest share of the samples.
    """

    attribute: str
    option: str
    truth: float
    samples: float
    read: float
    known: float
    spread: float

    @property
    def difference(self) -> float:
        """The difference of samples and truth, in percentage points."""
        return 100 * (self.samples - self.truth)

    @property
    def ratio(self) -> float:
        """The ratio of samples to truth; NaN if the truth is 0."""
        return self.samples / self.truth if self.truth else float("nan")


def frequencies(
    options: Mapping[str, Sequence[str]],
    truth: Answers,
    samples: Answers,
    read: Answers,
    known: Answers,
) -> list[Frequency]:
    """Return the frequencies of all options.

    Args:
        options: names of the options of each attribute.
        truth: index of the option of each training image, ``(n,)`` by attribute.
        samples: of each sample, by each classifier, ``(classifiers, n)``.
        read: of each held-out image, by each classifier, ``(classifiers, n)``.
        known: of each held-out image, in truth, ``(n,)``.
    """
    found = []
    for attribute, names in options.items():
        by_classifier = shares(samples[attribute], len(names))
        spread = by_classifier.amax(0) - by_classifier.amin(0)
        columns = [
            shares(answers[attribute], len(names)).mean(0).tolist()
            for answers in (truth, samples, read, known)
        ]
        for row in zip(names, *columns, spread.tolist(), strict=True):
            found.append(Frequency(attribute, *row))
    return found


def shares(answers: Tensor, options: int) -> Tensor:
    """Return the share of each option, ``(classifiers, options)`` in float64.

    Args:
        answers: ``(n,)`` or ``(classifiers, n)``.
        options: how many there are.
    """
    return F.one_hot(torch.atleast_2d(answers), options).double().mean(1)


def accuracy(answers: Tensor, truth: Tensor) -> float:
    """Return the share of ``answers``, ``(n,)`` or ``(classifiers, n)``, that are right."""
    return (answers == truth).double().mean().item()


def share_by_class(hits: Tensor, labels: Tensor, classes: int) -> list[float]:
    """Return the share of ``hits`` in each class; NaN for a class without images.

    Args:
        hits: bool ``(n,)`` or ``(classifiers, n)``.
        labels: ``(n,)``.
        classes: how many there are.
    """
    return [hits[..., labels == k].double().mean().item() for k in range(classes)]


def train_classifiers(
    train: ImageSet,
    options: Mapping[str, Sequence[str]],
    *,
    count: int,
    seen: int,
    data: tuple[object, ...],
    folder: Path,
    tell: Tell,
) -> list[Network]:
    """Train classifiers of the attributes, or read them from ``folder``.

    Args:
        train: the training images with their attributes.
        options: names of the options of each attribute.
        count: number of classifiers.
        seen: images that each is trained on, repetitions counted.
        data: primitives that identify the training images.
        folder: for the classifiers.
        tell: called with ``(done, total)``.
    """
    questions = {name: (train.answers[name], len(names)) for name, names in options.items()}

    def train_one(seed: int) -> Network:
        network = Network(
            min(train.pixels.shape[2:]), {name: len(o) for name, o in options.items()}
        )

        def progress(done: int, total: int) -> None:
            tell(seed * total + done, count * total)

        def compute() -> dict[str, Tensor]:
            trained = fit(
                train.pixels, questions, contrast=False, seen=seen, seed=seed, tell=progress
            )
            return trained.state_dict()

        depends = (VERSION, seen, sorted(questions), *data)
        network.load_state_dict(cached(folder, f"audit-network-{seed}", depends, compute))
        return network.eval()

    return [train_one(seed) for seed in range(count)]


def classify(classifiers: Sequence[Network], images: ImageSet) -> dict[str, Tensor]:
    """Return the answers of all classifiers for all images, ``(classifiers, n)`` by attribute."""
    answers = [answer(classifier, images.pixels) for classifier in classifiers]
    return {name: torch.stack([one[name] for one in answers]) for name in answers[0]}


def audit_section(
    report: Report,
    classifiers: Sequence[Network],
    samples: ImageSet,
    train: ImageSet,
    held_out: ImageSet,
    options: Mapping[str, Sequence[str]],
    class_attribute: str | None,
) -> None:
    """Add how often each option occurs, and whether samples are of the class asked for.

    Args:
        report: gets the section.
        classifiers: as of ``train_classifiers``.
        samples: the images that were drawn.
        train: the training images.
        held_out: the held-out images.
        options: names of the options of each attribute.
        class_attribute: the attribute that is the class; None if none is.
    """
    read = classify(classifiers, held_out)
    sampled = classify(classifiers, samples)
    correct = {name: accuracy(read[name], held_out.answers[name]) for name in options}
    report.numbers["classifier_accuracy"] = correct
    report.heading("Audit")
    correct_text = ", ".join(f"{name} {percent(share)}" for name, share in correct.items())
    report.text(
        f"The attributes of the samples, as {len(classifiers)} classifiers that were trained on "
        f"the training images read them, on average. Of {len(held_out):,} held-out images they "
        f"get right: {correct_text}."
    )
    truth = dict(train.answers)
    verdicts = []
    if class_attribute and samples.labels is not None:
        truth[class_attribute] = samples.labels
        all_right = _class_accuracy(
            report, options[class_attribute], class_attribute, sampled, samples, read, held_out
        )
        verdicts.append(
            f"class accuracy {percent(all_right)} of {len(samples):,} samples (held-out images: "
            f"{percent(correct[class_attribute])})"
        )
    found = frequencies(options, truth, sampled, read, held_out.answers)
    _frequency_table(report, found, len(samples))
    worst = max(found, key=lambda f: abs(f.difference))
    rarest = min((f for f in found if f.truth), key=lambda f: f.truth)
    verdicts.append(
        f"worst frequency: {worst.attribute} {worst.option}, {worst.difference:+.1f} points "
        f"(spread of the classifiers: {100 * worst.spread:.1f})"
    )
    verdicts.append(
        f"rarest: {rarest.attribute} {rarest.option}, {rarest.ratio:.2f} times the truth"
    )
    report.verdicts.append("; ".join(verdicts))


def _class_accuracy(
    report: Report,
    classes: Sequence[str],
    attribute: str,
    sampled: Answers,
    samples: ImageSet,
    read: Answers,
    held_out: ImageSet,
) -> float:
    """Add a table of the accuracy by class; return that of all samples."""
    labels = samples.labels
    assert labels is not None
    known = held_out.answers[attribute]
    right = sampled[attribute] == labels
    by_class = share_by_class(right, labels, len(classes))
    baseline = share_by_class(read[attribute] == known, known, len(classes))
    counts = torch.bincount(labels, minlength=len(classes)).tolist()
    all_right = right.double().mean().item()
    accuracies = dict(zip(classes, by_class, strict=True))
    report.numbers["class_accuracy"] = {"all": all_right, **accuracies}
    rows = []
    for name, count, share, usual in zip(classes, counts, by_class, baseline, strict=True):
        rows.append([name, str(count), percent(share), percent(usual)])
    report.table([attribute, "asked for", "samples read as it", "held-out read as it"], rows)
    return all_right


def _frequency_table(report: Report, found: Sequence[Frequency], n: int) -> None:
    report.numbers["frequencies"] = [asdict(f) | {"ratio": f.ratio} for f in found]
    chance = 100 * math.sqrt(0.25 * 0.75 / n)
    report.text(
        "How often each attribute occurs. *Difference* (in points) and *ratio* compare the samples "
        "with the truth. *Spread* (in points) is between the classifiers that read it most and "
        "least often. For a perfect model, a share of a quarter would be off by "
        f"{chance:.1f} points with {n:,} images, by chance (standard error)."
    )
    rows = []
    for f in found:
        row = [f.attribute, f.option, percent(f.truth), percent(f.samples)]
        row += [f"{f.difference:+.1f}", f"{100 * f.spread:.1f}", f"{f.ratio:.2f}"]
        rows.append([*row, percent(f.read), percent(f.known)])
    head = ["attribute", "option", "truth", "samples", "difference", "spread", "ratio"]
    report.table([*head, "held-out read", "held-out truth"], rows)
