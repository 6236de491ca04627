"""A backbone that has learned a target under a schedule, seen as an estimate of the picture.

D(x_t, t) = target.x0(backbone(x_t, t), x_t) = E[x_0 | x_t]
"""

import torch
from torch import Tensor, nn

from sturdy.diffusion.schedule import Schedule
from sturdy.diffusion.target import Target


class Denoiser(nn.Module):
    """``denoiser(x_t, t, label) -> x0``. Its state is the backbone's, and nothing else.

    Args:
        backbone: ``backbone(x_t (b, c, h, w), t (b,), label (b,) int64 or None) -> (b, c, h, w)``,
            where x_t and t are as ``target.inputs`` makes them. With classes it embeds
            ``num_classes + 1`` labels: the last, ``num_classes``, is the null label of label drop
            and guidance.
        num_classes: 0 means no labels; the backbone is then handed None.

    Raises:
        ValueError: the target makes no sense with the schedule.
    """

    def __init__(
        self, backbone: nn.Module, schedule: Schedule, target: Target, num_classes: int = 0
    ) -> None:
        super().__init__()
        target.check(schedule)
        self.backbone = backbone
        self.schedule = schedule
        self.target = target
        self.num_classes = num_classes

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """The estimate of x_0, ``(b, c, h, w)``; arguments and errors as in ``predict``."""
        prediction = self.predict(x_t, t, label)
        alpha, sigma = (coefficient[:, None, None, None] for coefficient in self.schedule(t))
        return self.target.x0(prediction, x_t, alpha, sigma)

    def predict(
        self, x_t: Tensor, t: Tensor, label: Tensor | None = None, condition: Tensor | None = None
    ) -> Tensor:
        """What the backbone says, in the target's own terms, ``(b, c, h, w)``.

        Args:
            x_t: ``(b, c, h, w)``, float32; so is the result, also under autocast.
            t: ``(b,)`` in [0, 1].
            label: ``(b,)`` int64 in [0, num_classes]; None means the null label.
            condition: what else the backbone takes, ``(b, k)``; None, as in sampling, is not handed
                on.

        Raises:
            ValueError: a label out of range (on the CPU) or of another shape, or a backbone that
                changes the shape.
        """
        told = () if condition is None else (condition,)
        prediction = self.backbone(
            *self.target.inputs(x_t, t, self.schedule), self._labels(label, x_t), *told
        )
        if prediction.shape != x_t.shape:
            raise ValueError(
                f"the backbone turned {tuple(x_t.shape)} into {tuple(prediction.shape)}, "
                "but must keep the shape; set its channels to those of the images"
            )
        return prediction.to(x_t.dtype)

    def _labels(self, label: Tensor | None, x_t: Tensor) -> Tensor | None:
        if self.num_classes == 0:
            return None
        if label is None:
            return torch.full(x_t.shape[:1], self.num_classes, dtype=torch.int64, device=x_t.device)
        if label.shape != x_t.shape[:1]:
            raise ValueError(
                f"label has shape {tuple(label.shape)}; {len(x_t)} images need ({len(x_t)},)"
            )
        # Not on a GPU, where reading the answer would stall every call; there the embedding asserts
        # on the device.
        if label.is_cpu and (wrong := label[(label < 0) | (label > self.num_classes)]).numel():
            raise ValueError(
                f"label {wrong[0].item()} is out of range: with num_classes={self.num_classes} "
                f"classes are 0 "
                f"to {self.num_classes - 1}, then comes the null label; set num_classes to that of "
                f"the data"
            )
        return label


class Guided(nn.Module):
    """Guidance: D = W + scale (D(label) - W), away from a weaker estimate W. A guided denoiser is a
    denoiser.

    W is the same denoiser without the label, from one call on the doubled batch (classifier-free
    guidance, Ho & Salimans 2022), or else another, worse denoiser (autoguidance, Karras et al.
    2024), which needs no labels. The equation is the same for noise, v, velocity and EDM's F, all
    of them affine in x_0.

    Args:
        scale: 1 + w of Ho & Salimans' eq. 6. 1 is the plain estimate, at its cost; more moves
            further away from W.
        guide: the worse denoiser: smaller, or less trained, or both.
        interval: the times [low, high] in which to guide; outside, the plain estimate at its cost
            (Kynkäänniemi et al. 2024). Their noise levels are ``schedule.time(sigma)``.
        rescale: share to which the guided estimate gets the plain one's standard deviation back, by
            picture, against the too strong contrasts of large scales (Lin et al. 2024, sec. 3.4,
            there on the network's output).

    Raises:
        ValueError: the denoiser knows no classes, there is no guide and ``scale`` is not 1; the
            guide does not fit the denoiser; ``interval`` or ``rescale`` is none.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        scale: float,
        *,
        guide: Denoiser | None = None,
        interval: tuple[float, float] = (0.0, 1.0),
        rescale: float = 0.0,
    ) -> None:
        super().__init__()
        if guide is None and denoiser.num_classes == 0 and scale != 1:
            raise ValueError(
                f"guidance with scale={scale} needs labels, but num_classes=0; set scale=1 or a "
                f"guide"
            )
        low, high = interval
        if not 0 <= low < high <= 1:
            raise ValueError(
                f"guidance.interval=[{low}, {high}] must be two rising times in [0, 1]; all is [0, "
                f"1]"
            )
        if not 0 <= rescale <= 1:
            raise ValueError(f"guidance.rescale={rescale} is not a share; set it between 0 and 1")
        if guide is not None:
            check_guide(denoiser, guide)
        self.denoiser = denoiser
        self.guide = guide
        self.schedule = denoiser.schedule
        self.num_classes = denoiser.num_classes
        self.scale = scale
        self.interval = (low, high)
        self.rescale = rescale

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """The guided estimate of x_0, ``(b, c, h, w)``; without ``guide``, ``label=None`` is not
        guided.
        """
        low, high = self.interval
        everywhere = low == 0 and high == 1
        inside = (low <= t) & (t <= high)
        if (
            self.scale == 1
            or (self.guide is None and label is None)
            or not (everywhere or inside.any())
        ):
            return self.denoiser(x_t, t, label)
        if self.scale == 0 and self.guide is None and everywhere and not self.rescale:
            return self.denoiser(x_t, t, None)
        plain, weak = self._estimates(x_t, t, label)
        guided = weak + self.scale * (plain - weak)
        if self.rescale:
            back = plain.std((1, 2, 3), keepdim=True) / guided.std((1, 2, 3), keepdim=True)
            guided = guided * (1 + self.rescale * (back - 1))
        return guided if everywhere else torch.where(inside[:, None, None, None], guided, plain)

    def _estimates(self, x_t: Tensor, t: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.guide is not None:
            return self.denoiser(x_t, t, label), self.guide(x_t, t, label)
        assert label is not None
        labels = torch.cat([label, torch.full_like(label, self.num_classes)])
        plain, weak = self.denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), labels).chunk(2)
        return plain, weak


def check_guide(denoiser: Denoiser, guide: Denoiser) -> None:
    """Raises ValueError where the two do not mean the same by (x_t, t, label)."""
    t = torch.linspace(0, 1, 9, dtype=torch.float64, device="cpu")
    ours, theirs = torch.stack(denoiser.schedule(t)), torch.stack(guide.schedule(t))
    if not torch.allclose(ours, theirs, atol=1e-6):
        raise ValueError(
            "the guide was trained on another schedule; its x_t and t mean something else"
        )
    if guide.num_classes not in (0, denoiser.num_classes):
        raise ValueError(
            f"the guide knows {guide.num_classes} classes and the denoiser {denoiser.num_classes}; "
            "choose a guide of the same classes, or of none"
        )
