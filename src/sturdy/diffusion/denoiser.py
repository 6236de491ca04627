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
        backbone: ``backbone(x_t (b, c, h, w), t (b,), label (b,) int64 or None) -> (b, c, h, w)``. With
            classes it embeds ``num_classes + 1`` labels: the last, ``num_classes``, is the null label of
            label drop and guidance.
        num_classes: 0 means no labels; the backbone is then handed None.

    Raises:
        ValueError: the target makes no sense with the schedule.
    """

    def __init__(self, backbone: nn.Module, schedule: Schedule, target: Target, num_classes: int = 0) -> None:
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

    def predict(self, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """What the backbone says, in the target's own terms, ``(b, c, h, w)``.

        Args:
            x_t: ``(b, c, h, w)``, float32; so is the result, also under autocast.
            t: ``(b,)`` in [0, 1].
            label: ``(b,)`` int64 in [0, num_classes]; None means the null label.

        Raises:
            ValueError: a label out of range (on the CPU) or of another shape, or a backbone that changes the shape.
        """
        prediction = self.backbone(x_t, t, self._labels(label, x_t))
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
            raise ValueError(f"label has shape {tuple(label.shape)}; {len(x_t)} images need ({len(x_t)},)")
        # Not on a GPU, where reading the answer would stall every call; there the embedding asserts on the device.
        if label.is_cpu and (wrong := label[(label < 0) | (label > self.num_classes)]).numel():
            raise ValueError(
                f"label {wrong[0].item()} is out of range: with num_classes={self.num_classes} classes are 0 "
                f"to {self.num_classes - 1}, then comes the null label; set num_classes to that of the data"
            )
        return label


class Guided(nn.Module):
    """Classifier-free guidance (Ho & Salimans 2022): D = D(null) + scale (D(label) - D(null)).

    A guided denoiser is a denoiser. The equation is the same for noise, v and velocity, all of them affine
    in x_0. Both estimates come from one call on the doubled batch.

    Args:
        scale: 1 + w of the paper's eq. 6. 0 is the unconditional and 1 the conditional estimate, both at the
            cost of a plain call; more follows the label more closely.

    Raises:
        ValueError: the denoiser knows no classes, and ``scale`` is not 1.
    """

    def __init__(self, denoiser: Denoiser, scale: float) -> None:
        super().__init__()
        if denoiser.num_classes == 0 and scale != 1:
            raise ValueError(f"guidance with scale={scale} needs labels, but num_classes=0; set scale=1")
        self.denoiser = denoiser
        self.schedule = denoiser.schedule
        self.num_classes = denoiser.num_classes
        self.scale = scale

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """The guided estimate of x_0, ``(b, c, h, w)``; with ``label=None`` the unconditional one."""
        if self.scale == 1 or label is None:
            return self.denoiser(x_t, t, label)
        if self.scale == 0:
            return self.denoiser(x_t, t, None)
        null = torch.full_like(label, self.num_classes)
        both = self.denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([label, null]))
        conditional, unconditional = both.chunk(2)
        return unconditional + self.scale * (conditional - unconditional)
