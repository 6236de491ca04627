"""What is wrong with a word of the command, and what to type instead."""

import difflib
import sys
from collections.abc import Iterable, Mapping


class UsageError(Exception):
    """The command cannot be understood; the message says what to do."""


# Keys that would break the promise of a resumed run, and what to use instead.
REFUSED = {
    "trainer.max_epochs": "training counts steps: use trainer.max_steps",
    "trainer.min_epochs": "training counts steps: use trainer.max_steps",
    "trainer.min_steps": "use trainer.max_steps",
    "trainer.max_time": (
        "how long a step takes must not decide what is trained: use trainer.max_steps"
    ),
    "trainer.accumulate_grad_batches": (
        "use data.shards: a batch is computed in that many equal parts"
    ),
    "trainer.fast_dev_run": "use debug=default",
    "trainer.overfit_batches": "use data.source.n=64, or a small folder",
    "trainer.limit_train_batches": "use trainer.max_steps",
    "trainer.gradient_clip_val": "use clip",
    "trainer.gradient_clip_algorithm": "use clip, the largest norm",
    "trainer.num_sanity_val_steps": "use debug=default",
    "trainer.check_val_every_n_epoch": "use trainer.val_check_interval, in steps",
    "trainer.use_distributed_sampler": "the order is by position; there is nothing to set",
    "trainer.reload_dataloaders_every_n_epochs": "there is one endless epoch",
    "trainer.enable_checkpointing": "use callbacks.checkpoint",
    "trainer.default_root_dir": "use paths.runs and name",
    "trainer.callbacks": "use callbacks",
    "trainer.logger": "use logger",
    "trainer.plugins": "the store is the plugin",
    "trainer.barebones": "it leaves out checkpoints and the record; use trainer.profiler=simple",
    "hydra.run.dir": "the run's directory is paths.runs/name",
    "hydra.job.chdir": "start it where it should be, or give paths.runs and paths.cache",
    "hydra.mode": "a sweep is asked for with -m",
    "hydra/sweeper": (
        "a sweep goes through every combination of the values given; with sweep.trials=20, Optuna "
        "chooses those of 20 runs"
    ),
    "sweep.trials": "it is for a sweep: add -m",
    "sweep.seed": "it is for a sweep with sweep.trials=20",
    "hydra.sweeper.params": "give the values on the command line: key=1,2,3",
    "hydra.sweep.dir": "the runs of a sweep are in paths.runs, named after what is swept",
    "hydra.sweep.subdir": "the runs of a sweep are in paths.runs, named after what is swept",
}

# Keys of other projects, and the keys here.
FOREIGN_KEYS = {
    "epochs": ("trainer.max_steps",),  # training counts steps
    "max_epochs": ("trainer.max_steps",),
    "num_epochs": ("trainer.max_steps",),
    "iterations": ("trainer.max_steps",),
    "steps": ("trainer.max_steps", "sampler.steps"),
    "num_steps": ("trainer.max_steps", "sampler.steps"),
    "gpus": ("trainer.devices",),
    "workers": ("data.num_workers",),
    "resolution": ("data.image_size",),
    "size": ("data.image_size",),
    "model": ("backbone",),
    "dataset": ("data",),
    "data_dir": ("data.root", "data_root"),
    "data_path": ("data.root", "data_root"),
    "output_dir": ("paths.runs", "sample.out", "evaluate.out", "out"),
    "fp16": ("trainer.precision",),
    "bf16": ("trainer.precision",),
    "num_samples": ("sample.n", "evaluate.n"),
    "cfg_scale": ("guidance.scale",),
}

# Keys under their name of the version before this one, and their name today. An old name is still
# taken, with a line that says the new one. The keys of sturdy.renames must be here, too.
RENAMED_KEYS: dict[str, str] = {}


def rename_old_keys(words: Iterable[str], renamed: Mapping[str, str] = RENAMED_KEYS) -> list[str]:
    """Return ``words`` with old keys under their new names, and print a line for each of these."""
    current = []
    for word in words:
        key, equals, value = word.lstrip("+~").partition("=")
        old = next((old for old in renamed if f"{key}.".startswith(f"{old}.")), None)
        if old:
            new_key = renamed[old] + key.removeprefix(old)
            print(
                f"warning: {key} is called {new_key} now; the old name will not be taken for long",
                file=sys.stderr,
            )
            signs = word[: len(word) - len(word.lstrip("+~"))]
            word = f"{signs}{new_key}{equals}{value}"
        current.append(word)
    return current


def check_not_refused(key: str) -> None:
    """Raise UsageError if ``key`` would break the promise."""
    if key in REFUSED:
        raise UsageError(f"{key} is refused: {REFUSED[key]}")


def suggest(word: str, known: Iterable[str]) -> str:
    """Return " Did you mean ...?" or, where nothing is near, " There are: ..."."""
    known = sorted(known)
    last_part = word.rsplit(".", 1)[-1]
    near = [key for key in FOREIGN_KEYS.get(last_part, ()) if key in known]
    if not near:
        near = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
        by_last_part = {key.rsplit(".", 1)[-1]: key for key in known}
        near_parts = difflib.get_close_matches(last_part, by_last_part, n=2, cutoff=0.75)
        near += [by_last_part[part] for part in near_parts]
    if near:
        return f" Did you mean {' or '.join(dict.fromkeys(near))}?"
    if len(known) <= 40:
        return f" There are: {', '.join(known)}."
    return " See --help, or --cfg job for all keys."


def explain_stray_word(words: list[str], number: int, names: set[str]) -> str:
    """Return what to type instead of the word at ``number``, which is not ``key=value``.

    Args:
        words: the whole command.
        number: the index of the word.
        names: keys and groups that the script knows.
    """
    before, word, after, last = ["", *words, "", ""][number : number + 4]
    key = word.lstrip("-")
    is_key = word in names or "." in word or word.startswith(("-", "="))
    follows_a_value = "=" in before.strip("=") and not (
        word.startswith("-") or "." in word or (word in names and after)
    )
    if before.endswith("="):
        return f"{before} {word}: write {before}{word}"
    if after == "=":
        return f"{word} = {last}: write {key}={last}"
    if after.startswith("="):
        return f"{word} {after}: write {key}{after}"
    if after and "=" not in after and not follows_a_value:
        return f"{word} {after}: write {key}={after}"
    if follows_a_value:
        return (
            f"{word}: write key=value; if it belongs to the word before it, quote both: "
            f"'{before} {word}'"
        )
    if is_key:
        return f"{word}: write {word.strip('-=')}=VALUE"
    return f"{word}: write key=value, such as name={word} or run={word}; --help lists the keys"
