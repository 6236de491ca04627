"""Which checkpoints are kept: one rule for the store and for its second copy elsewhere."""

import math
from collections.abc import Collection, Mapping


def best_steps(
    steps: Collection[int], scores: Mapping[int, float], *, mode: str, n: int
) -> list[int]:
    """Return the ``n`` of ``steps`` with the best scores, best first.

    Args:
        steps: the checkpoints to choose from.
        scores: by step; a step without a score, or with one that is not finite, is never best.
        mode: ``min`` or ``max``: whether small or large scores are good.
        n: how many.
    """
    sign = 1 if mode == "min" else -1
    scored = [step for step in steps if math.isfinite(scores.get(step, math.nan))]
    return sorted(scored, key=lambda step: sign * scores[step])[:n]


def kept_steps(
    steps: Collection[int],
    scores: Mapping[int, float],
    *,
    mode: str,
    keep_last: int,
    keep_best: int,
    keep_every: int | None,
    lost_scores: Collection[int] = (),
) -> set[int]:
    """Return which of ``steps`` are kept; the newest always is.

    Args:
        steps: the checkpoints there are.
        scores: by step.
        mode: ``min`` or ``max``.
        keep_last: number of newest steps to keep, at least 1.
        keep_best: number of best steps to keep.
        keep_every: steps divisible by it are kept; None for none.
        lost_scores: steps that had a score which is gone: each may be the best.
    """
    kept = {*sorted(steps)[-keep_last:], *best_steps(steps, scores, mode=mode, n=keep_best)}
    if keep_every:
        kept |= {step for step in steps if step % keep_every == 0}
    if keep_best:
        kept |= set(lost_scores) & set(steps)
    return kept
