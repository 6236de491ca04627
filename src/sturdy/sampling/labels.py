"""The labels of the images that are drawn, as functions of the image's number."""

import torch
from torch import Tensor

GOLDEN_RATIO = (5**0.5 - 1) / 2


def select_labels(
    label: str | int | None, classes: list[str], prior: list[float], n: int
) -> Tensor | None:
    """Return the label of each image ``(n,)`` for ``sample.label``; None for a run without classes.

    Args:
        label: the name of a class. Or its number, if no class has a number as its name. Or
            ``"prior"``: as often as in the data. Or None: all classes in turn.
        classes: their names.
        prior: how often each class is in the data; empty if unknown.
        n: number of images.

    Raises:
        ValueError: if there is no such class, with the classes there are.
    """
    if label is None:
        return torch.arange(n) % len(classes) if classes else None
    word = str(label)
    if word in classes:
        return torch.full((n,), classes.index(word))
    if word == "prior" and prior:
        return labels_from_prior(torch.tensor(prior), n)
    numbered = any(name.isdecimal() for name in classes)
    if word.isdecimal() and int(word) < len(classes) and not numbered:
        return torch.full((n,), int(word))
    choices = list(classes)
    if prior and "prior" not in classes:
        choices.append("prior")
    raise ValueError(
        f"sample.label={label} is no class of this run; there are: "
        f"{', '.join(choices) if classes else 'none'}"
    )


def labels_for(how: str, labels: Tensor | None, classes: int, n: int) -> Tensor | None:
    """Return the label of each image ``(n,)`` for ``evaluate.labels``; None for no labels.

    Args:
        how: ``prior``, as often as in ``labels``; ``even``, all alike; or ``none``.
        labels: those of the training images.
        classes: how many there are.
        n: number of images.
    """
    if how == "none" or not classes or labels is None:
        return None
    if how == "even":
        return torch.arange(n) % classes
    return labels_from_prior(torch.bincount(labels, minlength=classes), n)


def labels_from_prior(prior: Tensor, n: int) -> Tensor:
    """Return labels ``(n,)`` of which every prefix has nearly the frequencies ``prior``.

    A golden-ratio sequence in [0, 1) is mapped through the cumulative frequencies of the classes.
    """
    u = (0.5 + GOLDEN_RATIO * torch.arange(n, dtype=torch.float64)) % 1
    frequencies = prior.double() / prior.double().sum()
    labels = torch.searchsorted(frequencies.cumsum(0), u, right=True)
    return labels.clamp(max=len(prior) - 1)
