"""The card of an export: README.md with what the run was, its figures, and how to use the files."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from exact_resume.files import open_durable
from exact_resume.metrics import MetricsCSV
from exact_resume.replay import EVALUATIONS
from sturdy.export.formats import Subject, Written
from sturdy.image_size import describe_size
from sturdy.sampling.loaded_run import LoadedRun

BANNER = re.compile(r": (\d+ images, \w+ (?:classes|captions))\b")  # in the log of a start
SHOWN_CLASSES = 20
MOST_LIKELY = {
    "torch_export": "A `.pt2` file is a program: load it only if you trust who made it.",
    "onnx": "An `.onnx` file is a program of ONNX's operators; it calls nothing else.",
}
NO_CODE = "The weights are safetensors: loading them executes nothing."


def write_card(
    folder: Path,
    subject: Subject,
    written: Written,
    cfg: DictConfig,
    library: str,
    shares: Mapping[str, float],
) -> None:
    """Write ``README.md``.

    Args:
        folder: of the export.
        subject: what was exported.
        written: by the format.
        cfg: of the command.
        library: that read it back.
        shares: the largest differences that were found, by name.
    """
    run = subject.run
    blocks = [_head(cfg, written), f"# {subject.name}"]
    if cfg.preview:
        blocks.append("![Images drawn with the run's own sampler](preview.png)")
    which = "average (EMA) of the weights" if cfg.weights == "ema" else "weights"
    blocks.append(f"The {which} of step {run.point.step:,}, as `to={cfg.to}`.")
    blocks.append(_table(facts(subject, cfg)))
    if figures := find_figures(run):
        blocks += ["## Figures", "Measured by this run's `evaluate.py`.", _table(figures)]
    blocks.append("## Use")
    blocks += [f"{note[0].upper()}{note[1:]}." for note in written.notes]
    if written.code:
        blocks += ["In this folder:", f"```python\n{written.code}\n```"]
    blocks.append(MOST_LIKELY.get(cfg.to, NO_CODE))
    compared = [(name, f"{share:.1e}") for name, share in shares.items()]
    blocks += [
        "## Checked",
        f"Read back by {library} in a process of its own, and compared with the run on the same "
        f"noise and times. The largest differences, as a share of the largest number:",
        _table(compared),
    ]
    with open_durable(folder / "README.md") as file:
        file.write(("\n\n".join(block for block in blocks if block) + "\n").encode())


def facts(subject: Subject, cfg: DictConfig) -> list[tuple[str, str]]:
    """Return what the run was, as rows of a table."""
    run = subject.run
    config = run.config
    rows = [("license", str(cfg.license) if cfg.license is not None else "not stated")]
    rows += [("images", f"{size_of_data(run)}, {describe_size(subject.size)} pixels")]
    fingerprint = run.point.manifest.get("fingerprint", {})
    if digest := fingerprint.get("data"):
        rows.append(("data digest", f"`{digest}`"))
    classes = list(config["classes"])
    if classes and subject.text is None:
        more = f" and {len(classes) - SHOWN_CLASSES} more" if len(classes) > SHOWN_CLASSES else ""
        rows.append(("classes", ", ".join(classes[:SHOWN_CLASSES]) + more))
    base = getattr(subject.backbone, "base", None)
    if base is not None:
        rows.append(("base", f"{Path(base.path).name}, SHA-256 of its {base.part} `{base.sha256}`"))
    lora = config["backbone"].get("lora")
    if lora:
        rows.append(("adapter", f"rank {lora['rank']}, alpha {lora.get('alpha') or lora['rank']}"))
    for key in ("backbone", "schedule", "target", "space"):
        node = config.get(key) or {}
        if "_target_" in node:
            rows.append((key, node["_target_"].rpartition(".")[2]))
    rows.append(("optimizer", f"learning rate {config['optimizer'].get('lr')}"))
    rows.append(("batch size", str(config["data"]["batch_size"])))
    rows.append(("seed", str(config["seed"])))
    return rows


def size_of_data(run: LoadedRun) -> str:
    """Return how many images and labels a start of the run said that there are."""
    for log in sorted(run.directory.glob("attempts/*/log.txt"), reverse=True):
        if found := BANNER.findall(log.read_text(errors="replace")):
            return str(found[-1])
    return "images of unknown number"


def find_figures(run: LoadedRun) -> list[tuple[str, str]]:
    """Return the newest figures of the evaluation of this step, if there are any."""
    path = run.directory / EVALUATIONS
    rows = MetricsCSV(path).rows() if path.exists() else []
    rows = [row for row in rows if row.get("step") == str(run.point.step)]
    figures = []
    for name, value in (rows[-1] if rows else {}).items():
        if name.startswith("evaluation/") and value:
            figures.append((name.removeprefix("evaluation/"), f"{float(value):.4g}"))
    return figures


def _head(cfg: DictConfig, written: Written) -> str:
    """Return the head that a hub of models reads; empty if there is nothing to say."""
    head = {"license": cfg.license, "library_name": written.library or None}
    lines = [f"{key}: {json.dumps(value)}" for key, value in head.items() if value is not None]
    return "\n".join(["---", *lines, "---"]) if lines else ""


def _table(rows: Any) -> str:
    lines = [f"| {key} | {str(value).replace('|', '&#124;')} |" for key, value in rows]
    return "\n".join(["| | |", "|---|---|", *lines])
