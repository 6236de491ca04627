"""Several real processes of one run, forked from this one, so that none has to import anything.

They get their ranks as from a launcher, and are otherwise like those of ``trainer.devices=N``.
"""

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from hydra import compose, initialize_config_dir

import sturdy.training.run as run
from exact_resume.checkpoint.store import Store
from exact_resume.randomness import Draws, key
from runs import ROOT, SMALL, SMALL_UNET

SHARDED, SHARDED_UNET = ([*base, "data.shards=4", "reduction=tree"] for base in (SMALL, SMALL_UNET))


class World:
    """``n`` processes that train ``name`` under ``tmp`` and print to ``tmp/name-RANK.out``."""

    def __init__(
        self,
        tmp: Path,
        name: str,
        n: int,
        *overrides: str,
        base: list[str] = SHARDED,
        first: Callable[[int], object] = lambda rank: None,
    ) -> None:
        words = [
            *base,
            f"paths.runs={tmp / 'runs'}",
            f"paths.cache={tmp / 'cache'}",
            f"name={name}",
            *overrides,
        ]
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            cfg = compose("train", words)
        self.home = tmp / "runs" / name
        self.store = Store(self.home / "checkpoints")
        self.older = set(self.store.steps())
        self.outputs = [tmp / f"{name}-{rank}.out" for rank in range(n)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        sys.stdout.flush()
        self.pids = []
        for rank, output in enumerate(self.outputs):
            if pid := os.fork():
                self.pids.append(pid)
                continue
            code = 99
            try:
                _become(rank, n, port, output)
                first(rank)
                code = run.train(cfg, words)
            except SystemExit as left:
                code = int(left.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

    def until(self, step: int) -> "World":
        """Wait until ``step`` is in the record, and a checkpoint of this world on the disk."""
        metrics = self.home / "metrics.csv"
        while set(self.store.steps()) <= self.older or not (
            metrics.exists()
            and any(r.startswith(f"{step},") for r in metrics.read_text().splitlines())
        ):
            if all(os.waitid(os.P_PID, p, os.WEXITED | os.WNOHANG | os.WNOWAIT) for p in self.pids):
                raise AssertionError(f"the run ended before step {step}:\n{self.output()}")
            time.sleep(0.01)
        return self

    def kill(self, *ranks: int, number: signal.Signals = signal.SIGKILL) -> "World":
        """Send a signal to ``ranks``, or to all."""
        for rank in ranks or range(len(self.pids)):
            os.kill(self.pids[rank], number)
        return self

    def wait(self) -> list[int]:
        """Exit codes, by rank; negative ones are signals."""
        return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in self.pids]

    def output(self, rank: int | None = None) -> str:
        """Return the output of one rank or of all."""
        return "".join(
            o.read_text() for i, o in enumerate(self.outputs) if rank in (None, i) and o.exists()
        )


def finish(tmp: Path, name: str, n: int, *overrides: str, **how) -> World:
    """Train to the end."""
    world = World(tmp, name, n, *overrides, **how)
    codes = world.wait()
    assert codes == [0] * n, f"{codes}\n{world.output()}"
    return world


def ledger(tmp: Path, name: str) -> Callable[[int], None]:
    """Return a ``first`` of ``World`` that notes all draws for training; ``entries`` reads them."""

    def keep(rank: int) -> None:
        import sturdy.training.module as module

        file = (tmp / f"{name}-{os.getpid()}.ledger").open("w", buffering=1)
        reseed, step = module.reseed, 0

        def noting(seed: int, purpose: str, number: int, shard: int) -> None:
            nonlocal step
            step = number
            reseed(seed, purpose, number, shard)

        class Noting(Draws):
            def _fill(self, purpose, shape, method):
                out = super()._fill(purpose, shape, method)
                for position, row in zip(self.positions, out, strict=True):
                    if self.seed == 0:  # validation has a seed of its own
                        file.write(
                            f"{step} {position} {purpose} {key(row.numpy().tobytes().hex())}\n"
                        )
                return out

        module.reseed, module.Draws = noting, Noting

    return keep


def entries(tmp: Path, name: str) -> list[str]:
    """Return each step, position, purpose and hash that a process of ``name`` has noted, once.

    A line that a kill has cut is left out.
    """
    lines = {
        line
        for path in tmp.glob(f"{name}-*.ledger")
        for line in path.read_text().splitlines(keepends=True)
    }
    return sorted(line for line in lines if line.endswith("\n"))


def _become(rank: int, n: int, port: int, output: Path) -> None:
    out = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    ranks = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "GROUP_RANK": 0,
        "WORLD_SIZE": n,
        "LOCAL_WORLD_SIZE": n,
    }
    os.environ |= {k: str(v) for k, v in ranks.items()}
    os.environ |= {
        "TORCHELASTIC_RUN_ID": "test",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
