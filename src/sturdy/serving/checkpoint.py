"""Images of one checkpoint for requests, with the bits that sample.py gives to the same words."""

import difflib
import io
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor
from typing_extensions import override

from exact_resume.randomness import Draws, generator, key
from sturdy.diffusion.condition import Condition
from sturdy.diffusion.sampler import sample
from sturdy.sampling.config import SamplingConfig, resolve_sampling
from sturdy.sampling.grids import to_uint8
from sturdy.sampling.labels import select_labels
from sturdy.sampling.loaded_run import LoadedRun
from sturdy.serving.prompts import PromptEncoder
from sturdy.serving.words import Words
from sturdy.training.captions import caption_option

PROBE_S = 30.0  # seconds in which the exact batch size is measured
PROBED = (1.0, 2.0)  # guidance scales: guided, the network computes twice as many samples
SHOWN_CLASSES = 5  # in an error message


class FirstImages(Draws):
    """The random numbers of image 0 of each seed, as sample.py draws them with ``sample.n=1``."""

    def __init__(self, seeds: Sequence[int]) -> None:
        super().__init__(0, [0] * len(seeds))
        self.seeds = seeds

    @override
    def generators(self, purpose: str) -> Iterator[torch.Generator]:
        return (generator(key(seed, "sample"), purpose, 0) for seed in self.seeds)


class CheckpointSampler:
    """Draws the images of requests from one checkpoint.

    Args:
        cfg: of the command; its ``sampler`` and ``guidance`` hold where a request says nothing.
        run: the checkpoint.

    Attributes:
        step: of the checkpoint.
        batch_sizes: the most images that are drawn together, by guidance scale as of ``PROBED``.

    Raises:
        ValueError: a setting makes no sense for the run.
    """

    def __init__(self, cfg: DictConfig, run: LoadedRun) -> None:
        self.cfg = cfg
        self.run = run
        self.step = run.point.step
        self.classes = list(run.config["classes"])
        self.prior = run.config.get("prior", [])
        self.space = run.module.space
        self.shape = self.space.shape(run.config["data"]["image_size"])
        settings = self._settings(Words())
        self.network = settings.load_network(run)
        self.guide = settings.load_guide(run)
        option = caption_option(run.module)
        self.encode = PromptEncoder(option) if option else None
        largest = cfg.serve.batch_size
        self.batch_sizes = {scale: largest for scale in PROBED}
        if cfg.serve.exact:
            self.batch_sizes = {scale: self.exact_batch_size(scale, largest) for scale in PROBED}

    def check(self, words: Words) -> None:
        """Check that the run knows the class, and is given a text if it reads texts.

        Raises:
            ValueError: naming the word.
        """
        if self.encode is not None:
            if words.label is not None:
                raise ValueError("label: this run was trained on captions; describe the image")
            if words.prompt is None:
                raise ValueError("prompt must say what to draw")
            return
        for name in ("prompt", "negative"):
            if getattr(words, name) is not None:
                raise ValueError(f"{name}: this run was trained without captions")
        try:
            self._label(words)
        except ValueError:
            near = difflib.get_close_matches(str(words.label), self.classes, SHOWN_CLASSES, 0.5)
            shown = ", ".join(near or self.classes[:SHOWN_CLASSES]) or "none"
            more = len(self.classes) - SHOWN_CLASSES
            found = "near it are" if near else "there are"
            rest = f" and {more} more" if more > 0 and not near else ""
            raise ValueError(
                f"label={words.label} is no class of this run; {found}: {shown}{rest}"
            ) from None

    def draw(self, requests: Sequence[Words]) -> list[bytes]:
        """Return the PNG file of each request; they were checked.

        Those with the same steps, guidance and negative prompt are drawn together.
        """
        groups: dict[tuple[object, ...], list[int]] = {}
        for number, words in enumerate(requests):
            together = (words.steps, words.guidance, words.negative)
            groups.setdefault(together, []).append(number)
        files = [b""] * len(requests)
        for numbers in groups.values():
            size = self._batch_size(requests[numbers[0]])
            for first in range(0, len(numbers), size):
                part = numbers[first : first + size]
                pixels = to_uint8(self._images([requests[number] for number in part]))
                for number, image in zip(part, pixels, strict=True):
                    files[number] = to_png(image)
        return files

    @torch.no_grad()
    def exact_batch_size(self, scale: float, largest: int) -> int:
        """Return how many images can be drawn together without a change of any bit.

        Which kernels run, and so how they round, depends on the shape of the batch and not on the
        numbers in it. So the outputs of the network and of the space for one batch of each size
        tell, compared with the outputs for each sample alone.

        Args:
            scale: of the guidance.
            largest: that is tried. When ``PROBE_S`` have passed, no larger one is.
        """
        start = time.monotonic()
        alone = self._probe(scale, [0])
        for n in range(2, largest + 1):
            if time.monotonic() - start > PROBE_S:
                return n - 1
            alone = torch.cat([alone, self._probe(scale, [n - 1])])
            if not torch.equal(alone, self._probe(scale, range(n))):
                return n - 1
        return largest

    def _probe(self, scale: float, numbers: Sequence[int]) -> Tensor:
        """Return outputs of the network and of the space for samples ``numbers``, a row each."""
        x = FirstImages(numbers).normal("start", self.shape).to(self.run.device)
        words = [Words(seed=number, prompt="", label=self._class(number)) for number in numbers]
        cond = self._condition(words)
        settings = self._settings(Words(guidance=scale))
        t = torch.full((len(x),), sum(interval(settings)) / 2, device=x.device)
        estimate = settings.add_guidance(self.network, cond, self.guide)(x, t, cond)
        return torch.cat([estimate.flatten(1), self.space.decode(x).flatten(1)], 1)

    def _batch_size(self, words: Words) -> int:
        settings = self._settings(words)
        plain, guided = self.batch_sizes.values()
        scale = settings.guidance["scale"]
        if scale == 1:
            return plain
        always = scale != 0 and interval(settings) == (0.0, 1.0)
        return guided if always else min(plain, guided)

    def _class(self, number: int) -> str | None:
        return self.classes[number % len(self.classes)] if self.classes else None

    @torch.no_grad()
    def _images(self, words: Sequence[Words]) -> Tensor:
        """Return images ``(b, 3, h, w)`` of requests that have the same settings."""
        settings = self._settings(words[0])
        cond = self._condition(words)
        denoiser = settings.add_guidance(self.network, cond, self.guide)
        draws = FirstImages([each.seed for each in words])
        noise = draws.normal("start", self.shape).to(self.run.device)
        sampler = settings.make_sampler()
        x0 = sample(sampler, denoiser, noise, cond, draws, clip=self.space.clip)
        return self.space.decode(x0)

    def _settings(self, words: Words) -> SamplingConfig:
        cfg = self.cfg
        if words.steps is not None:
            cfg = with_values(cfg, {"sampler": {"steps": words.steps}})
        if words.guidance is not None:
            cfg = with_values(cfg, {"guidance": {"scale": words.guidance}})
        run = self.run
        return resolve_sampling(cfg, run.config, state=run.point.state, trust=run.trust)

    def _condition(self, words: Sequence[Words]) -> Tensor | Condition | None:
        if self.encode is not None:
            prompts = [each.prompt or "" for each in words]
            return self.encode(prompts, words[0].negative).to(self.run.device)
        labels = [self._label(each) for each in words]
        found = [label for label in labels if label is not None]
        return torch.cat(found).to(self.run.device) if found else None

    def _label(self, words: Words) -> Tensor | None:
        return select_labels(words.label, self.classes, self.prior, 1)


def interval(settings: SamplingConfig) -> tuple[float, float]:
    """Return the times in which there is guidance."""
    low, high = settings.guidance.get("interval") or (0.0, 1.0)
    return float(low), float(high)


def to_png(image: Tensor) -> bytes:
    """Return the PNG file of uint8 ``(h, w, c)``."""
    file = io.BytesIO()
    Image.fromarray(image.numpy()).save(file, format="PNG")
    return file.getvalue()


def with_values(cfg: DictConfig, values: dict[str, Any]) -> DictConfig:
    """Return ``cfg`` with some values replaced."""
    merged = OmegaConf.merge(cfg, values)
    assert isinstance(merged, DictConfig)
    return merged
