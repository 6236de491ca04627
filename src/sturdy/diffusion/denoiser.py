"""The denoiser: a backbone that has learned a target under a schedule, as an estimate of x_0.

D(x_t, t) = target.x0(backbone(x_t, t), x_t) = E[x_0 | x_t]
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sturdy.diffusion.condition import ClassCondition, Condition
from sturdy.diffusion.schedule import Schedule
from sturdy.diffusion.target import Target


class Denoiser(nn.Module):
    """``denoiser(x_t, t, cond) -> x0``. Its state is that of the backbone, and nothing else.

    Args:
        backbone: ``backbone(x_t (b, c, h, w), t (b,), *cond.arguments()) -> (b, c, h, w)``, where
            x_t and t are as ``target.inputs`` makes them. For classes the argument is ``label``,
            ``(b,)`` int64 or None, of which it embeds ``num_classes + 1``: the last,
            ``num_classes``, is the null label of label drop and guidance. A backbone that must know
            more than t has a method ``set_schedule(schedule, target)``.
        num_classes: number of labels; with 0 the backbone gets None for them.
        make_condition: ``make_condition(label, num_classes, augmentation) -> Condition``: the
            meaning of labels. For a text condition a label is the number of a caption, and
            ``num_classes`` that of the empty one.

    Raises:
        ValueError: the target makes no sense with the schedule.
    """

    def __init__(
        self,
        backbone: nn.Module,
        schedule: Schedule,
        target: Target,
        num_classes: int = 0,
        *,
        make_condition: Callable[..., Condition] = ClassCondition,
    ) -> None:
        super().__init__()
        target.check(schedule)
        if hasattr(backbone, "set_schedule"):
            backbone.set_schedule(schedule, target)  # type: ignore[operator]
        self.backbone = backbone
        self.schedule = schedule
        self.target = target
        self.num_classes = num_classes
        self.make_condition = make_condition

    def forward(self, x_t: Tensor, t: Tensor, cond: Condition | Tensor | None = None) -> Tensor:
        """Return the estimate of x_0, ``(b, c, h, w)``; arguments and errors as of ``predict``."""
        prediction = self.predict(x_t, t, cond)
        alpha, sigma = (coefficient[:, None, None, None] for coefficient in self.schedule(t))
        return self.target.x0(prediction, x_t, alpha, sigma)

    def predict(self, x_t: Tensor, t: Tensor, cond: Condition | Tensor | None = None) -> Tensor:
        """Return the prediction of the target, ``(b, c, h, w)``.

        Args:
            x_t: ``(b, c, h, w)``, float32; so is the result, also under autocast.
            t: ``(b,)`` in [0, 1].
            cond: a condition of ``b`` samples; or labels ``(b,)``; or None, the null condition.

        Raises:
            ValueError: a label out of range (on the CPU), a condition of another number of
                samples, or a backbone that changes the shape.
        """
        arguments = self.condition(x_t, cond).arguments()
        prediction = self.backbone(*self.target.inputs(x_t, t, self.schedule), *arguments)
        if prediction.shape != x_t.shape:
            raise ValueError(
                f"the backbone turned {tuple(x_t.shape)} into {tuple(prediction.shape)}, "
                "but must keep the shape; set its channels to those of the images"
            )
        return prediction.to(x_t.dtype)

    def condition(
        self,
        x: Tensor,
        cond: Condition | Tensor | None = None,
        augmentation: Tensor | None = None,
    ) -> Condition:
        """Return ``cond`` as a condition of the samples ``x``.

        Args:
            x: only its length and device are used.
            cond: as of ``predict``.
            augmentation: ``(b, k)``, which goes with labels; None as in sampling.

        Raises:
            ValueError: ``cond`` is for another number of samples, or a label is out of range.
        """
        if cond is None:
            cond = torch.full(x.shape[:1], self.num_classes, dtype=torch.int64, device=x.device)
        if isinstance(cond, Condition):
            if len(cond) != len(x):
                raise ValueError(f"the condition of {len(cond)} images does not fit {len(x)}")
            return cond
        if cond.shape != x.shape[:1]:
            raise ValueError(
                f"label has shape {tuple(cond.shape)}; {len(x)} images need ({len(x)},)"
            )
        return self.make_condition(cond, self.num_classes, augmentation)


class Guided(nn.Module):
    """Guidance: D = W + scale (D(cond) - W), away from a weaker estimate W.

    W is the same denoiser under the null condition, from one call on the doubled batch
    (classifier-free guidance, Ho & Salimans 2022), or another, worse denoiser (autoguidance, Karras
    et al. 2024), which needs no condition. The equation is the same for noise, v, velocity and
    EDM's F, as all of them are affine in x_0. A guided denoiser is used like a denoiser.

    Args:
        scale: 1 + w of Ho & Salimans' eq. 6. 1 is the plain estimate, at its cost; more moves
            further away from W.
        guide: the worse denoiser: smaller, or less trained, or both.
        interval: the times [low, high] in which to guide; outside, the plain estimate at its cost
            (Kynkäänniemi et al. 2024). Their noise levels are ``schedule.time(sigma)``.
        rescale: share to which the guided estimate gets the plain one's standard deviation back, by
            image, against the too strong contrasts of large scales (Lin et al. 2024, sec. 3.4,
            there on the network's output).

    Raises:
        ValueError: the denoiser knows no classes, there is no guide and ``scale`` is not 1; the
            guide does not fit the denoiser; ``interval`` or ``rescale`` is out of range.
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
                f"scale={scale} needs labels, but num_classes=0; set scale=1 or a guide"
            )
        low, high = interval
        if not 0 <= low < high <= 1:
            raise ValueError(
                f"interval=[{low}, {high}] must be two rising times in [0, 1]; all is [0, 1]"
            )
        if not 0 <= rescale <= 1:
            raise ValueError(f"rescale={rescale} is no share; set it between 0 and 1")
        if guide is not None:
            check_guide(denoiser, guide)
        self.denoiser = denoiser
        self.guide = guide
        self.schedule = denoiser.schedule
        self.num_classes = denoiser.num_classes
        self.scale = scale
        self.interval = (low, high)
        self.rescale = rescale

    def forward(self, x_t: Tensor, t: Tensor, cond: Condition | Tensor | None = None) -> Tensor:
        """Return the guided estimate of x_0, ``(b, c, h, w)``.

        Without ``guide``, ``cond=None`` is not guided.
        """
        low, high = self.interval
        everywhere = low == 0 and high == 1
        inside = (low <= t) & (t <= high)
        no_guidance = self.scale == 1 or (self.guide is None and cond is None)
        if no_guidance or not (everywhere or inside.any()):
            return self.denoiser(x_t, t, cond)
        if self.scale == 0 and self.guide is None and everywhere and not self.rescale:
            return self.denoiser(x_t, t, self.denoiser.condition(x_t, cond).null())
        plain, weak = self._estimates(x_t, t, cond)
        guided = weak + self.scale * (plain - weak)
        if self.rescale:
            ratio = plain.std((1, 2, 3), keepdim=True) / guided.std((1, 2, 3), keepdim=True)
            guided = guided * (1 + self.rescale * (ratio - 1))
        return guided if everywhere else torch.where(inside[:, None, None, None], guided, plain)

    def _estimates(
        self, x_t: Tensor, t: Tensor, cond: Condition | Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the plain and the weak estimate, ``(b, c, h, w)`` each."""
        if self.guide is not None:
            weak_cond = cond if self.guide.num_classes else None
            return self.denoiser(x_t, t, cond), self.guide(x_t, t, weak_cond)
        cond = self.denoiser.condition(x_t, cond)
        both = self.denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), cond.cat(cond.null()))
        plain, weak = both.chunk(2)
        return plain, weak


def check_guide(denoiser: Denoiser, guide: Denoiser) -> None:
    """Raise ValueError if the two do not mean the same by (x_t, t, cond)."""
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
