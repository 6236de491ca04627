"""Search for the values of a sweep: each run's values are chosen by Optuna from the results so far.

    values of trial k = f(space, seed, k, values and scores of the trials before it)

Nothing is stored. The same command asks for the same trials again: those that are finished say so
at once, and the first that is not goes on. So a killed search ends in the same runs.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import (
    IntervalSweep,
    Override,
    RangeSweep,
    Transformer,
)

from exact_resume.signals import EXIT_INTERRUPTED, EXIT_RESUMABLE
from sturdy.cli.overrides import (
    LAUNCHER,
    compose_checked,
    hydra_as_usage_error,
    parse_overrides,
)
from sturdy.cli.quoting import quote
from sturdy.cli.sweep import Child, best_score, print_line, report
from sturdy.cli.sweep_plan import Job, make_label
from sturdy.cli.usage import UsageError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

TRIALS, SEED = "sweep.trials", "sweep.seed"
DIGITS = 4  # of a real value: more would not be told apart, and make long names
FAILED, REFUSED = 1, 2


@dataclass(frozen=True)
class Search:
    """What to search through.

    Attributes:
        trials: number of runs.
        seed: of the choices.
        fixed: the words with one value.
        space: the values of each key that is swept, as a distribution of Optuna's.
    """

    trials: int
    seed: int
    fixed: Sequence[str]
    space: Mapping[str, "BaseDistribution"]


def is_search(words: Sequence[str]) -> bool:
    """Return whether the words of a sweep leave its values to a search."""
    return any(word.startswith(f"{TRIALS}=") for word in words)


def plan_search(config: Path, words: Sequence[str]) -> Search:
    """Return what ``words`` ask to search through; the ends of every range are checked.

    Raises:
        UsageError: if a word is mistaken, or Optuna is not installed.
    """
    options = {TRIALS: "", SEED: "0"}
    others = []
    for word in words:
        key, _, value = word.partition("=")
        if key in options:
            options[key] = value
        else:
            others.append(word)
    trials, seed = (_whole(key, value) for key, value in options.items())
    if not trials:
        raise UsageError(f"{TRIALS}=0: the number of runs is at least 1")
    try:
        import optuna
    except ImportError:
        raise UsageError(f"{TRIALS} needs Optuna: pip install 'sturdy-diffusion[optuna]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    fixed: list[str] = []
    space: dict[str, BaseDistribution] = {}
    with hydra_as_usage_error(config):
        for override in parse_overrides(others, multirun=True):
            key = override.get_key_element()
            if key.startswith(LAUNCHER):
                raise UsageError(
                    f"{override.input_line}: each run's values depend on the runs before it, which "
                    f"are made one after the other on this machine; leave it out"
                )
            if override.is_sweep_override():
                space[key] = _distribution(override)
            else:
                fixed.append(override.input_line or "")
    if not space:
        raise UsageError(
            f"{TRIALS}={trials}: nothing to search through; give a range, as in "
            f"'optimizer.lr=tag(log,interval(1e-4,1e-2))', or values, as in seed=0,1"
        )
    search = Search(trials, seed, fixed, space)
    _check_ends(config, search)
    return search


def run_search(config: Path, script: str, words: Sequence[str]) -> int:
    """Run one trial after the other; return the worst exit code.

    A run that fails, because it diverged, counts as bad. A run that is killed, stopped or refused
    ends the search: its score belongs to the choice of the next.

    Args:
        config: the YAML file of the script.
        script: its path.
        words: of the command.

    Raises:
        UsageError: if one of them is mistaken; nothing was started.
    """
    search = plan_search(config, words)
    child = Child()
    done: list[tuple[dict[str, Any], float | None]] = []
    outcomes: dict[str, int | None] = {}
    jobs: dict[str, Job] = {}
    for number in range(search.trials):
        values = choose_values(search, done)
        job = _make_job(config, search, values)
        jobs[job.name] = job
        print_line(f"trial {number + 1} of {search.trials}: {job.name}")
        if outcomes.get(job.name) != 0:  # else the same values were chosen before
            outcomes[job.name] = child.run([sys.executable, script, *job.words])
        code = outcomes[job.name]
        if child.killed:
            outcomes[job.name] = EXIT_RESUMABLE
        ended = (None, REFUSED, EXIT_RESUMABLE, EXIT_INTERRUPTED)
        if child.killed or child.last_signal or code in ended:
            break
        score = best_score(job.metrics) if code != FAILED else None
        done.append((values, score[0] if score else None))
    code = report(outcomes, list(jobs.values()), spread=False)
    scores = {name: score for name, job in jobs.items() if (score := best_score(job.metrics))}
    if scores:
        best = min(scores, key=lambda name: scores[name][0])
        swept = " ".join(f"{key}={value}" for key, value in jobs[best].swept.items())
        print_line(f"best: {best} ({swept})")
    return code


def choose_values(
    search: Search, done: Sequence[tuple[Mapping[str, Any], float | None]]
) -> dict[str, Any]:
    """Return the values of the next trial.

    Args:
        search: where to look.
        done: values and score of each trial before; ``None`` for one that failed.
    """
    import optuna
    from optuna.trial import TrialState, create_trial

    # A generator of its own for each trial, so that its state is nothing to remember.
    sampler = optuna.samplers.TPESampler(seed=search.seed * 100_003 + len(done))
    study = optuna.create_study(sampler=sampler)
    for values, score in done:
        state = TrialState.FAIL if score is None else TrialState.COMPLETE
        study.add_trial(
            create_trial(
                params=dict(values), distributions=dict(search.space), value=score, state=state
            )
        )
    trial = study.ask(dict(search.space))
    return {key: _round(value, search.space[key]) for key, value in trial.params.items()}


def _round(value: Any, distribution: Any) -> Any:
    if not isinstance(value, float) or distribution.step:
        return value
    rounded = float(f"{value:.{DIGITS}g}")
    return min(max(rounded, distribution.low), distribution.high)


def _make_job(config: Path, search: Search, values: Mapping[str, Any]) -> Job:
    swept = {key: str(value) for key, value in values.items()}
    words = [*search.fixed, *(f"{key}={value}" for key, value in swept.items())]
    cfg = compose_checked(config, words)
    if "name" not in cfg:
        raise UsageError(f"{TRIALS} is for train.py: the score of a run is its best val/loss")
    name = f"{cfg.name}/{make_label(swept)}"
    metrics = Path(cfg.paths.runs) / name / "metrics.csv"
    return Job(name, [*words, f"name={quote(name)}"], metrics, swept)


def _check_ends(config: Path, search: Search) -> None:
    """Raise UsageError if a config with the first, last or any listed value cannot be used."""
    from optuna.distributions import CategoricalDistribution

    def ends(distribution: Any) -> list[Any]:
        if isinstance(distribution, CategoricalDistribution):
            return list(distribution.choices)
        return [distribution.low, distribution.high]

    first = {key: ends(distribution)[0] for key, distribution in search.space.items()}
    for key, distribution in search.space.items():
        for value in ends(distribution):
            _make_job(config, search, first | {key: value})


def _distribution(override: Override) -> "BaseDistribution":
    """Return the values of ``override`` as Optuna takes them.

    Raises:
        ValueError: if they cannot be searched through.
    """
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    value: Any = override.value()
    log = "log" in getattr(value, "tags", ())
    if isinstance(value, IntervalSweep):
        if isinstance(value.start, int) and isinstance(value.end, int):
            return IntDistribution(value.start, value.end, log=log)
        return FloatDistribution(float(value.start), float(value.end), log=log)  # type: ignore[arg-type]
    if isinstance(value, RangeSweep):
        numbers: list[Any] = list(value.range())
        if not numbers or value.step <= 0:
            raise ValueError(f"{override.input_line}: the range is empty, or does not rise")
        kind: Any = IntDistribution if isinstance(numbers[0], int) else FloatDistribution
        return kind(numbers[0], numbers[-1], step=value.step)
    words = [Transformer.str(item) for item in override.sweep_iterator()]  # with their quotes
    return CategoricalDistribution(list(dict.fromkeys(words)))


def _whole(key: str, text: str) -> int:
    if not text.isdecimal():
        raise UsageError(f"{key}={text}: it is a whole number, such as {key}=20")
    return int(text)
