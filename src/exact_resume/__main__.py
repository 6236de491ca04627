"""Look at a run from a terminal, or from the script of a cluster's job; no run is changed.

    python -m exact_resume status runs/NAME     a table, and what the run's command would do now
    python -m exact_resume status runs/NAME --html [FILE]    a page to watch it: index.html there
    python -m exact_resume verify runs/NAME     only whether every checkpoint verifies
    python -m exact_resume show FILE            what a file of weights holds; nothing is executed
    python -m exact_resume consolidate runs/NAME    one full file from a sharded checkpoint
    python -m exact_resume again runs/NAME      whether to start it again: see ``again.py``

``show`` also takes a checkpoint, a run, or a folder with several files of weights.

Exit code: 0 if all checkpoints verify, if the file can be read, or for yes; 1 if one checkpoint
does not verify or there is none, if the file is refused or damaged, or for no; 2 for a wrong
command.
"""

import sys
from pathlib import Path

USAGE = (
    "usage: python -m exact_resume status|verify|consolidate runs/NAME, status runs/NAME "
    "--html [FILE], show FILE, again runs/NAME --code N"
)


def main(arguments: list[str]) -> int:
    """Run the command; return the exit code."""
    # Imported where they are used: torch takes seconds, which a script of a job need not wait.
    match arguments:
        case ["status" | "verify" as command, run]:
            from exact_resume.status import print_status

            return print_status(Path(run), table=command == "status")
        case ["status", run, "--html", *file] if len(file) < 2:
            from exact_resume.page.write import write_command

            return write_command(Path(run), Path(file[0]) if file else None)
        case ["show", path]:
            from exact_resume.show import show

            return show(Path(path))
        case ["consolidate", *others]:
            from exact_resume.consolidate import consolidate_command

            return consolidate_command(others)
        case ["again", run]:
            from exact_resume.again import again

            return again(Path(run))
        case ["again", run, "--code", code] if code.isdecimal():
            from exact_resume.again import again

            return again(Path(run), int(code))
    print(USAGE, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
