"""The sections of the page, as HTML, each from what ``read.py`` found.

Names of runs, metrics, samples and files may hold anything, so all text goes through ``escape``.
"""

from collections.abc import Iterable
from html import escape
from typing import Any

from exact_resume.page.chart import Curve, chart_data, draw_chart, thin
from exact_resume.page.read import RunRecord, SavedStep, Start, format_time

LOSSES = ("train/loss", "val/loss")
MOST_CHARTS = 8  # small ones
MOST_MARKS = 100  # restarts on a time line, the newest
MOST_ROWS = 20  # of a table
MOST_LINES = 40
WORDS = {"": "not stored", "refused": "no guarantee"}
COMMAND = "python -m exact_resume status"


def show_state(run: RunRecord, *, live: bool) -> str:
    """Return whether the run is finished or trains; "" if that is not known."""
    if run.is_finished:
        return '<span class="pill good">finished</span>'
    return '<span class="pill calm">training</span>' if live else ""


def show_progress(run: RunRecord) -> str:
    """Return the bar under the title; "" if nobody knows where the run is finished."""
    if not run.max_steps:
        return ""
    percent = min(100.0, 100 * run.step / run.max_steps)
    return (
        f'<div class="progress" role="progressbar" aria-label="steps done" aria-valuemin="0" '
        f'aria-valuemax="{run.max_steps}" aria-valuenow="{run.step}">'
        f'<i style="width:{percent:.2f}%"></i></div>'
    )


def show_tiles(run: RunRecord) -> str:
    """Return the figures at the top."""
    of = f"of {run.max_steps:,}, {run.step / run.max_steps:.1%}" if run.max_steps else "steps"
    tiles = [("step", f"{run.step:,}", of)]
    if run.seconds_left and not run.is_finished:
        tiles.append(
            ("time left", f"about {_duration(run.seconds_left)}", "without validations and saves")
        )
    if run.best is not None:
        newest = max(run.scores)
        best = f"best {run.scores[run.best]:.4g} at step {run.best:,}"
        tiles.append((run.monitor, f"{run.scores[newest]:.4g}", best))
    elif LOSSES[0] in run.series:
        tiles.append((LOSSES[0], f"{run.series[LOSSES[0]][1][-1]:.4g}", "the newest step"))
    if run.starts:
        guarantee = run.starts[-1].guarantee
        note = f"the newest: {WORDS.get(guarantee, guarantee)}"
        tiles.append(("starts", f"{len(run.starts):,}", note))
    if run.skips:
        tiles.append(("left out", f"{len(run.skips)}", "batches that were not finite"))
    return "".join(
        f'<div class="tile"><small>{escape(name)}</small><strong>{escape(value)}</strong>'
        f"<span>{escape(note)}</span></div>"
        for name, value, note in tiles
    )


def list_problems(run: RunRecord) -> str:
    """Return the files that could not be read."""
    return "".join(f'<p class="problem">{escape(line)}</p>' for line in run.problems)


def show_newest_start(run: RunRecord) -> str:
    """Return the banner of the newest start, and what the same command would do."""
    if not run.starts:
        return ""
    start = run.starts[-1]
    body = f'<p class="banner">{_pill(start.guarantee)} {_banner(start)}</p>'
    if run.outlook and not run.is_finished:
        body += f'<p class="note">Now {escape(run.outlook)}.</p>'
    return _card("The newest start", body)


def show_pictures(run: RunRecord) -> str:
    """Return the pictures through time, under a slider."""
    if not run.pictures:
        return ""
    last = len(run.pictures) - 1
    body = (
        '<div class="frame"><img id="picture" alt=""></div>'
        '<div class="slider"><button id="play" type="button" aria-label="play">&#9654;</button>'
        f'<input id="time" type="range" min="0" max="{last}" value="{last}" '
        'aria-label="step of the picture"><output id="when"></output></div>'
    )
    return _card("Samples through time", body, "pictures")


def draw_charts(run: RunRecord) -> tuple[str, str, list[Any]]:
    """Return the main charts, the others, and the points of each for the script."""
    curves = {name: thin(name, *points) for name, points in run.series.items()}
    curves = {name: curve for name, curve in curves.items() if len(curve.x)}
    groups: list[tuple[str, list[Curve], bool]] = []
    if losses := [curves.pop(name) for name in LOSSES if name in curves]:
        groups.append(("Loss", losses, False))
    for name in sorted(curves):
        word = name.rpartition("/")[2]
        if word == "learning_rate" or word.split("-")[0] == "lr":
            groups.append(("Learning rate", [curves.pop(name)], True))
    for name in sorted(curves)[:MOST_CHARTS]:
        groups.append((name, [curves[name]], False))
    last = max(run.step, 1)
    marks = _marks(run, last)
    kinds = {"restart": 'class="start"', "batch left out": 'class="skip"'}
    keys = [word for word, found in kinds.items() if found in marks]
    legend = "".join(f'<span class="key {word.split()[0]}">{word}</span>' for word in keys)
    main = ""
    others = ""
    for number, (title, lines, whole) in enumerate(groups):
        is_loss = title == "Loss"
        chart = draw_chart(
            title, lines, last, marks, number=number, legend=legend * is_loss, whole=whole
        )
        card = f'<section class="card {"big" * is_loss}">{chart}</section>'
        if title == lines[0].name:
            others += card
        else:
            main += card
    if left := sorted(curves)[MOST_CHARTS:]:
        others += f'<p class="note">In metrics.csv, too: {escape(", ".join(left))}</p>'
    return main, others, [chart_data(lines) for _, lines, _ in groups]


def list_left_out(run: RunRecord) -> str:
    """Return what was left out: of the data, and of the batches."""
    body = ""
    lines = next((start.data for start in reversed(run.starts) if start.data), [])
    lines = "\n".join(lines).splitlines()
    if lines:
        shown = lines[:MOST_LINES]
        if len(lines) > MOST_LINES:
            shown.append(f"... and {len(lines) - MOST_LINES} more lines, in attempts/")
        body += f"<pre>{escape(chr(10).join(shown))}</pre>"
    if run.skips:
        rows = []
        for skip in run.skips[::-1][:MOST_ROWS]:
            names = escape(", ".join(map(str, skip["images"][:8])))
            positions = f"{skip['position']:,} to {skip['position'] + skip['size'] - 1:,}"
            if not skip["size"]:
                positions = "not known"
            reason = escape(str(skip["reason"]))
            wide = [f'<span class="why">{text}</span>' for text in (reason, names)]
            rows.append([f"{skip['step']:,}", positions, *wide])
        body += "<h3>Batches that are left out</h3>"
        body += _table(["step", "positions", "why", "samples"], rows)
        body += _more(len(run.skips), "skips.jsonl")
    return _card("Data, and what was left out", body)


def list_evaluations(run: RunRecord) -> str:
    """Return the rows of ``evaluations.csv``, the newest first."""
    names = [name for name in (run.evaluations or [{}])[0] if name != "step"]
    rows = []
    for row in run.evaluations[::-1][:MOST_ROWS]:
        rows.append([f"{int(row['step']):,}", *(_number(row[name]) for name in names)])
    heads = [name.removeprefix("evaluation/").replace("_", " ") for name in names]
    body = _table(["step", *heads], rows) + _more(len(run.evaluations), "evaluations.csv")
    return _card("Evaluation", body) if rows else ""


def list_checkpoints(run: RunRecord) -> str:
    """Return the checkpoints, and whether they verify."""
    shown = run.saved[:MOST_ROWS]
    shown += [saved for saved in run.saved[MOST_ROWS:] if saved.marks or saved.problem]
    body = ""
    if shown:
        heads = ["step", "verified", run.monitor, "", "size", "written"]
        body = _table(heads, [_saved_row(run, saved) for saved in shown])
        body += _more(len(run.saved), "checkpoints/", len(shown))
        if not run.is_verified:
            body += (
                f'<p class="note">Each was written completely, with its checksums. Training does '
                f"not read them again: <code>{COMMAND} {escape(str(run.home))} --html</code> "
                f"does.</p>"
            )
    for line in run.set_aside:
        body += f'<p class="note">{escape(line)}</p>'
    return _card("Checkpoints", body)


def list_starts(run: RunRecord) -> str:
    """Return all attempts with their banners, the newest first."""
    rows = []
    for start in run.starts[::-1][:MOST_ROWS]:
        step = "" if start.step is None else f"{start.step:,}"
        rows.append(
            [
                str(start.number),
                f"<time>{escape(start.time)}</time>",
                escape(start.host),
                step,
                _pill(start.guarantee),
                f'<span class="banner">{_banner(start)}</span>',
            ]
        )
    heads = ["start", "time", "machine", "from step", "guarantee", "banner"]
    body = _table(heads, rows) + _more(len(run.starts), "attempts/") if rows else ""
    return _card("Starts", body, "starts")


def _card(title: str, body: str, name: str = "") -> str:
    return f'<section class="card {name}"><h2>{escape(title)}</h2>{body}</section>' if body else ""


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table; the cells of ``rows`` are HTML."""
    columns = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = [f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows]
    return (
        f'<div class="scroll"><table><thead><tr>{columns}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _pill(word: str) -> str:
    kinds = {"bitwise": "good", "same samples": "warn", "refused": "bad", "fresh": "calm"}
    return f'<span class="pill {kinds.get(word, "")}">{escape(WORDS.get(word, word))}</span>'


def _marks(run: RunRecord, last: int) -> str:
    """Return the restarts and the skipped batches on the time line of a chart."""
    texts: dict[tuple[str, str], list[str]] = {}
    for start in run.entries()[-MOST_MARKS:]:
        if start.step:
            place = f"{100 * start.step / last:.1f}"
            text = f"start {start.number} at step {start.step:,}: {start.guarantee}"
            texts.setdefault(("start", place), []).append(text)
    for skip in run.skips:
        if skip["step"] <= last:
            place = f"{100 * skip['step'] / last:.1f}"
            text = f"the batch of step {skip['step']:,} is left out: {skip['reason']}"
            texts.setdefault(("skip", place), []).append(text)
    return "".join(
        f'<i class="{kind}" style="left:{place}%" title="{escape(chr(10).join(lines))}"></i>'
        for (kind, place), lines in texts.items()
    )


def _banner(start: Start) -> str:
    return escape(start.banner) or "An older version made this start, and stored no banner."


def _saved_row(run: RunRecord, saved: SavedStep) -> list[str]:
    verified = '<span class="pill good">yes</span>' if run.is_verified else "as written"
    if saved.problem:
        verified = (
            f'<span class="pill bad">NO</span> <span class="why">{escape(saved.problem)}</span>'
        )
    return [
        f"{saved.step:,}",
        verified,
        "" if saved.score is None else f"{saved.score:.5g}",
        " ".join(f'<span class="pill calm">{mark}</span>' for mark in saved.marks),
        f"{saved.size / 1e6:,.1f} MB",
        f"<time>{format_time(saved.time)}</time>",
    ]


def _more(total: int, where: str, shown: int = MOST_ROWS) -> str:
    """Say how many rows a table has not."""
    if total <= shown:
        return ""
    return f'<p class="note">{total - shown:,} more in {escape(where)}</p>'


def _number(cell: str) -> str:
    try:
        return f"{float(cell):,.4g}"
    except ValueError:
        return escape(cell or "")


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.1f} {unit}" if length > 60 else f"{seconds / 60:.0f} min"
    return f"{seconds:.0f} s"
