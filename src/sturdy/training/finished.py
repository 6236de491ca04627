"""Whether a run is finished, and what to say to the command that would train it."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from exact_resume.fingerprint import fingerprint
from exact_resume.resume import MAX_REASONS, ResumePoint, Rules, config_changes
from exact_resume.run import Run
from sturdy.training.ema_snapshots import path_of
from sturdy.training.fingerprint import CONDITION_KEY, SPACE_KEY
from sturdy.training.restart_config import FROM_DATA


def is_finished(cfg: DictConfig, run: Run, point: ResumePoint) -> bool:
    """Return whether nothing is left to do: no step, no validation, no images of the last step."""
    last = cfg.trainer.max_steps
    if point.step != last:
        return point.step > last
    is_validated = last in run.metrics.column("val/loss")
    if last % cfg.trainer.val_check_interval == 0 and not is_validated:
        return False
    outputs = []
    if _runs_every_n_steps(cfg.callbacks.get("samples")):
        outputs.append(Path(cfg.callbacks.samples.directory) / f"step-{last:08d}.png")
    if _runs_every_n_steps(cfg.callbacks.get("snapshots")):
        outputs.append(path_of(Path(cfg.callbacks.snapshots.directory), last))
    return all(path.exists() for path in outputs)


def describe_finished(cfg: DictConfig, point: ResumePoint) -> list[str]:
    """Say that there is nothing to do, and how ``cfg`` differs from the trained config."""
    cfg = cfg.copy()
    lines = [
        f"{cfg.name}: finished at step {point.step} (trainer.max_steps={cfg.trainer.max_steps}), "
        f"nothing to do"
    ]
    stored = point.manifest.get("fingerprint", {})
    if not stored:
        return lines
    for key in FROM_DATA:
        cfg[key] = stored.get("config", {}).get(key, cfg[key])
    rules = resume_rules(cfg)
    ignore = [*rules.ignore, *rules.rounding, *FROM_DATA, "init_from", SPACE_KEY, CONDITION_KEY]
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    now = fingerprint(config, stored.get("data", ""))
    changes = config_changes(stored, now, Rules(ignore=ignore, added=rules.added))
    if changes:
        lines.append(
            "it was trained with another configuration; to train this one, give it a name of its "
            "own: name=..."
        )
    return lines + list(changes.values())[:MAX_REASONS]


def resume_rules(cfg: DictConfig) -> Rules:
    """Return which changes of the config a resume accepts."""
    return Rules(cfg.resume.ignore, cfg.resume.rounding, cfg.resume.added)


def _runs_every_n_steps(node: DictConfig | None) -> bool:
    """Return whether a callback that does something every N steps is switched on."""
    return bool(node and node.every_n_steps)
