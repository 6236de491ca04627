"""Is everything generated as often as it should be? Attributes of samples, as a classifier of real images reads them.

    share of samples that are read as an option   against   its share in truth

The classifier errs too: what it makes of held-out images, whose attributes are known, stands beside every figure.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from sturdy.evaluation.cached import cached
from sturdy.evaluation.network import VERSION, Network, Tell, answer, fit
from sturdy.evaluation.pictures import Pictures
from sturdy.evaluation.report import Report, percent


@dataclass(frozen=True)
class Frequency:
    """One option of one attribute, as shares of pictures.

    Attributes:
        truth: of the training images; of a class, what was asked for.
        samples: read off the samples by the classifier.
        read, known: of the held-out images, by the classifier and in truth.
    """

    attribute: str
    option: str
    truth: float
    samples: float
    read: float
    known: float

    @property
    def difference(self) -> float:
        """In points of a hundred, of samples to the truth."""
        return 100 * (self.samples - self.truth)

    @property
    def ratio(self) -> float:
        """Of samples to the truth; NaN where the truth is none."""
        return self.samples / self.truth if self.truth else float("nan")


def frequencies(options: Mapping[str, Sequence[str]], *answers: Mapping[str, Tensor]) -> list[Frequency]:
    """Every option's; ``answers`` are the four of ``Frequency``, ``(n,)`` an attribute, counted in its ``options``."""
    rows = []
    for name, names in options.items():
        counts = [torch.bincount(those[name], minlength=len(names)).double() for those in answers]
        shares = [(count / count.sum()).tolist() for count in counts]
        rows += [Frequency(name, option, *each) for option, *each in zip(names, *shares, strict=True)]
    return rows


def accuracy(answers: Tensor, right: Tensor) -> float:
    """Share of answers that are right."""
    return (answers == right).double().mean().item()


def by_class(hits: Tensor, labels: Tensor, classes: int) -> list[float]:
    """The share of ``hits`` ``(n,)`` in each class; NaN for a class without pictures."""
    return [hits[labels == k].double().mean().item() for k in range(classes)]


def classifier(
    train: Pictures,
    options: Mapping[str, Sequence[str]],
    *,
    seen: int,
    data: tuple[object, ...],
    folder: Path,
    tell: Tell,
) -> Network:
    """Trained to read ``options`` off the training images; arguments as of ``Features.prepare``."""
    questions = {name: (train.answers[name], len(names)) for name, names in options.items()}
    network = Network(train.pixels.shape[-1], {name: n for name, (_, n) in questions.items()}).eval()
    depends = (VERSION, seen, sorted(questions), *data)
    network.load_state_dict(
        cached(
            folder,
            "audit-network",
            depends,
            lambda: fit(train.pixels, questions, contrast=False, seen=seen, tell=tell).state_dict(),
        )
    )
    return network


def audit(
    report: Report,
    network: Network,
    samples: Pictures,
    train: Pictures,
    held_out: Pictures,
    options: Mapping[str, Sequence[str]],
    labelled: str | None,
) -> str:
    """How often each option comes, and whether samples are of the class asked for; returns the verdict.

    Args:
        network: as of ``classifier``.
        options: names of the answers of each attribute.
        labelled: the attribute that is the class.
    """
    read, sampled, asked = answer(network, held_out.pixels), answer(network, samples.pixels), samples.labels
    trust = {name: accuracy(read[name], held_out.answers[name]) for name in options}
    report.heading("Audit")
    report.text(
        f"What a classifier trained on the training images reads off the samples. Of {len(held_out):,} held-out images "
        f"it gets right: " + ", ".join(f"{name} {percent(right)}" for name, right in trust.items()) + "."
    )
    report.numbers["classifier_accuracy"] = trust
    verdicts, truth = [], dict(train.answers)
    if labelled and asked is not None:
        truth[labelled], names = asked, options[labelled]
        right = accuracy(sampled[labelled], asked)
        each = by_class(sampled[labelled] == asked, asked, len(names))
        usual = by_class(read[labelled] == held_out.answers[labelled], held_out.answers[labelled], len(names))
        counts = torch.bincount(asked, minlength=len(names)).tolist()
        report.numbers["class_accuracy"] = {"all": right, **dict(zip(names, each, strict=True))}
        verdicts.append(
            f"class accuracy {percent(right)} of {len(samples):,} samples (held-out images: {percent(trust[labelled])})"
        )
        rows = zip(names, counts, each, usual, strict=True)
        report.table(
            [labelled, "asked for", "samples read as it", "held-out read as it"],
            [[name, str(count), percent(e), percent(u)] for name, count, e, u in rows],
        )
    found = frequencies(options, truth, sampled, read, held_out.answers)
    report.numbers["frequencies"] = [asdict(f) | {"ratio": f.ratio} for f in found]
    report.text("How often each attribute comes; *difference* (in points) and *ratio* are of samples to the truth.")
    head = ["attribute", "option", "truth", "samples", "difference", "ratio", "held-out read", "held-out truth"]
    report.table(head, [_row(f) for f in found])
    worst = max(found, key=lambda f: abs(f.difference))
    rarest = min((f for f in found if f.truth), key=lambda f: f.truth)
    verdicts.append(f"worst frequency: {worst.attribute} {worst.option}, {worst.difference:+.1f} points")
    verdicts.append(f"rarest: {rarest.attribute} {rarest.option}, {rarest.ratio:.2f} times the truth")
    return "; ".join(verdicts)


def _row(f: Frequency) -> list[str]:
    shares = [percent(share) for share in (f.truth, f.samples)]
    return [f.attribute, f.option, *shares, f"{f.difference:+.1f}", f"{f.ratio:.2f}", percent(f.read), percent(f.known)]
