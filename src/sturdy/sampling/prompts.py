"""Which captions the images are drawn with, as a function of the image's number."""

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig

from sturdy.pretrained.captions import CaptionCondition, Captions
from sturdy.pretrained.text_table import find_table
from sturdy.sampling.loaded_run import LoadedRun
from sturdy.training.captions import caption_option
from sturdy.training.fingerprint import CAPTIONS

SHOWN = 5  # prompts that are printed


def check_no_prompt(options: DictConfig) -> None:
    """Raise ValueError, naming the key, if a run without captions is given a prompt."""
    for name in ("prompt", "negative"):
        if options[name] is not None:
            raise ValueError(
                f"sample.{name}={options[name]}: this run was trained without captions; "
                f"sample.label=... chooses a class, where it has any"
            )


def select_captions(
    run: LoadedRun, options: DictConfig, n: int, cache: Path
) -> tuple[CaptionCondition, dict[str, Any]]:
    """Return the condition of the images 0 to ``n`` - 1, and primitives that it depends on.

    The prompts of ``sample.prompt`` come in turn. Without any, the captions of the training images
    do.

    Args:
        run: a run with captions.
        options: ``sample.*``.
        n: number of images.
        cache: the folder ``paths.cache``.

    Raises:
        ValueError: naming the key, if an option makes no sense, the text encoders cannot be read,
            or there is no prompt and the captions of the run are not in the cache.
    """
    option = caption_option(run.module)
    assert option is not None
    if options.label is not None:
        raise ValueError(
            f"sample.label={options.label}: this run was trained on captions and knows no classes; "
            f'describe the image: sample.prompt="..."'
        )
    used: dict[str, Any] = {"condition": option.key()}
    if options.prompt is None:
        used["prompt"] = _use_training_captions(run, option, options, cache)
    else:
        prompts = read_prompts(options.prompt)
        option.prepare(prompts, cache, null=options.negative)
        used |= {"prompt": prompts, "negative": options.negative}
        for prompt in prompts[:SHOWN]:
            print(f"prompt: {prompt}", flush=True)
        if len(prompts) > SHOWN:
            print(f"and {len(prompts) - SHOWN} more prompts, in turn", flush=True)
    for line in option.notes:
        print(f"note: {line}", flush=True)
    assert option.table is not None
    rows = len(option.table)
    return option(torch.arange(n) % rows, rows), used


def read_prompts(given: Any) -> list[str]:
    """Return the prompts of ``sample.prompt``: a text, or a list of texts.

    Raises:
        ValueError: it is neither.
    """
    prompts: list[Any] = list(given) if isinstance(given, list | ListConfig) else [given]
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f'sample.prompt={given} must be a text, or a list of texts: ["...","..."]')
    return prompts


def _use_training_captions(
    run: LoadedRun, option: Captions, options: DictConfig, cache: Path
) -> str:
    """Give ``option`` the captions that the run was trained on; return their digest."""
    if options.negative is not None:
        raise ValueError(
            f"sample.negative={options.negative} needs a text to draw, too: sample.prompt=..."
        )
    digest = run.point.manifest.get("fingerprint", {}).get("stack", {}).get(CAPTIONS, "")
    option.table = find_table(cache, digest)
    if option.table is None:
        raise ValueError(
            f"sample.prompt must say what to draw: the captions of the training images are not in "
            f"paths.cache={cache} any more"
        )
    return digest
