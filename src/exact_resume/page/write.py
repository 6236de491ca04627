"""Write ``index.html`` of a run from the template, the sections and the data of the script."""

import json
import os
import sys
import time
from html import escape
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote

from exact_resume.files import atomic_write
from exact_resume.page import sections
from exact_resume.page.read import RunRecord, format_time, is_run, read_run

PAGE = "index.html"
MARKER = '<meta name="generator" content="exact_resume">'  # of pages that may be replaced
TEMPLATE = Path(__file__).with_name("template.html")


def write_page(
    home: Path, file: Path | None = None, *, verify: bool = False, live: bool = False
) -> RunRecord:
    """Write the page of a run, completely or not at all.

    Args:
        home: the run's directory.
        file: where the page goes; ``index.html`` in ``home`` by default. It finds the pictures in
            ``home`` by a relative path.
        verify: read every byte of the checkpoints, and compare; else only their manifests.
        live: whether the run trains, and will write the page again.

    Returns:
        What is known about the run.

    Raises:
        FileExistsError: ``file`` is there, and is no page of a run.
        OSError: it cannot be written.
    """
    file = file or home / PAGE
    if file.exists() and MARKER.encode() not in file.read_bytes()[:1000]:
        raise FileExistsError(f"{file} is there and is no page of a run; choose another file")
    run = read_run(home, verify=verify)
    page = render(run, file.parent, live=live)
    with atomic_write(file, durable=False, unique=verify) as out:
        out.write(page.encode(errors="backslashreplace"))  # names of files may be any bytes
    return run


def write_command(home: Path, file: Path | None) -> int:
    """Write the page of a run for the command line; return the exit code of ``status``."""
    if not home.is_dir() or not is_run(home):
        what = "holds nothing of a run" if home.is_dir() else "is not there"
        message = f"{home} {what}; give the directory of a run, such as runs/cars"
        print(f"error: {message}", file=sys.stderr)
        return 2
    try:
        run = write_page(home, file, verify=True)
    except FileExistsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {file or home / PAGE} cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    bad = [saved for saved in run.saved if saved.problem]
    print(f"{len(run.saved) - len(bad)} of {len(run.saved)} checkpoints verify")
    print(f"open {file or home / PAGE} in a browser")
    return 0 if run.saved and not bad else 1


def render(run: RunRecord, folder: Path, *, live: bool) -> str:
    """Return the page as a whole.

    Args:
        run: what is known.
        folder: where the page will lie.
        live: as of ``write_page``.
    """
    name = run.home.resolve().name
    main, others, data = sections.draw_charts(run)
    beside = sections.show_pictures(run) + sections.show_newest_start(run)
    body = [
        sections.list_problems(run),
        f'<div class="columns"><div>{beside}</div><div>{main}</div></div>',
        f'<div class="others">{others}</div>' if others else "",
        sections.list_left_out(run),
        sections.list_evaluations(run),
        sections.list_checkpoints(run),
        sections.list_starts(run),
    ]
    pictures = []
    for step, path in run.pictures.items():
        link = os.path.relpath(path.resolve(), folder.resolve())
        pictures.append([step, quote(os.fsencode(link))])
    now = time.time()
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        marker=MARKER,
        title=escape(name),
        state=sections.show_state(run, live=live),
        progress=sections.show_progress(run),
        tiles=sections.show_tiles(run),
        sections="\n".join(filter(None, body)),
        written=escape(format_time(now)),
        home=escape(str(run.home)),
        data=as_json(
            {
                "charts": data,
                "last": max(run.step, 1),
                "pictures": pictures,
                "written": now,
                "live": live,
            }
        ),
    )


def as_json(value: Any) -> str:
    """Return JSON that may stand in a ``script`` element: no text in it can end the element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
