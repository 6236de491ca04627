"""Every way out saves, and what only tells ends nothing: in real fits, and in real processes."""

import errno
import os
import re
import signal
import subprocess
import threading
import warnings

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from omegaconf import OmegaConf
from torch.utils.data import DataLoader

from exact_resume.attempt import IGNORED_WARNINGS
from exact_resume.callbacks.checkpoint import Checkpoint
from exact_resume.callbacks.nan_guard import NanGuard
from exact_resume.callbacks.preemption import AgreeOnSignal, SaveOnSignal
from exact_resume.callbacks.record import Record
from exact_resume.checkpoint.compare import diff_checkpoints, first_divergence
from exact_resume.checkpoint.store import Store, load_state
from exact_resume.checkpoint.writer import SaveError
from exact_resume.failures import is_out_of_memory, tolerate_errors
from exact_resume.metrics import MetricsCSV
from exact_resume.run import Run
from exact_resume.signals import SIGNALS, PreemptedError, Preemption
from exact_resume.streams import LossyFile
from runs import command, differences, train
from sturdy.diffusion.sampler import Euler
from sturdy.errors import ConfigError
from sturdy.sampling.grid_callback import SampleGrids
from sturdy.training.callbacks.progress import Progress
from sturdy.training.memory import describe_out_of_memory
from sturdy.training.outcome import stopped_here_before
from sturdy.training.session import lock_run
from tiny_module import Stream, batch, make, trainer


class Raising(Callback):
    """Raises ``error`` in ``hook`` once ``step`` steps are done."""

    def __init__(self, hook, step, error):
        def method(trainer, *args):
            if trainer.global_step == step:
                raise error

        setattr(self, hook, method)


@pytest.fixture
def fit(tmp_path):
    """Train for nine steps in ``tmp_path/name``, from its newest checkpoint on; returns the error
    that ended it.
    """
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def fit(name, *callbacks, entry=None, loggers=(), module=None):
        directory = tmp_path / name
        directory.mkdir(exist_ok=True)
        metrics, preemption = MetricsCSV(directory / "metrics.csv"), Preemption()
        store = Store(directory / "checkpoints")
        t = trainer(
            directory / "checkpoints",
            9,
            *(AgreeOnSignal(preemption), NanGuard(), Record(metrics), SaveOnSignal(preemption)),
            Checkpoint(every_n_train_steps=None, every_n_minutes=None, keep_last=9),
            *callbacks,
            logger=[metrics, *loggers],
            enable_checkpointing=True,
            val_check_interval=4,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            log_every_n_steps=2,
        )
        module = module or make()
        start = store.steps()[-1] if store.steps() else 0
        loaders = (
            DataLoader(Stream(start), batch_size=None),
            DataLoader([batch(0)], batch_size=None),
        )
        try:
            with t.strategy.checkpoint_io:
                t.fit(
                    module,
                    *loaders,
                    ckpt_path=store.state(start) if start else None,
                    weights_only=True,
                )
        except BaseException as error:
            return error

    yield fit
    for number, handler in before.items():
        signal.signal(number, handler)


def steps(tmp, name):
    return Store(tmp / name / "checkpoints").steps()


def same(tmp, a, b):
    """Whether the last steps of two runs are equal to the bit, and their records."""
    states = [load_state(Store(tmp / name / "checkpoints").state(9)) for name in (a, b)]
    records = [MetricsCSV(tmp / name / "metrics.csv").rows() for name in (a, b)]
    return diff_checkpoints(*states) == [] and first_divergence(*records) is None


@pytest.mark.parametrize(
    ("hook", "step", "error", "saved"),
    [
        ("on_train_batch_end", 3, ValueError("mine"), 3),
        ("on_train_batch_end", 4, MemoryError(), 4),
        ("on_train_batch_start", 5, OSError(errno.EIO, "a disk"), 5),
        ("on_validation_batch_end", 8, RuntimeError("mine"), 8),
        ("on_validation_end", 4, KeyboardInterrupt(), 4),
        ("on_train_end", 9, ValueError("mine"), 9),
    ],
)
def test_an_error_between_two_steps_leaves_a_save_and_the_run_goes_on_bit_for_bit(
    fit, tmp_path, hook, step, error, saved
):
    """A callback of one's own, as the last of all. Lightning makes SystemExit of
    KeyboardInterrupt.
    """
    assert fit("whole") is None
    raised = fit("ended", Raising(hook, step, error))
    assert error in (raised, raised.__context__)
    assert steps(tmp_path, "ended")[-1] == saved
    if saved < 9:
        assert fit("ended") is None
    assert same(tmp_path, "whole", "ended")


def test_in_the_middle_of_a_step_nothing_is_saved(fit, tmp_path):
    """In the forward pass, in the backward pass, in the optimizer's step, and between that and the
    average.
    """

    class InStep(Raising):
        def __init__(self, hook):
            super().__init__(hook, 3, ValueError("mine"))

    for hook in ("on_before_backward", "on_after_backward", "on_before_optimizer_step"):
        assert isinstance(fit(hook, InStep(hook)), ValueError)
        assert steps(tmp_path, hook) == []
    module = make()
    update = module.ema.update
    module.ema.update = lambda denoiser, step: update(denoiser, step) if step < 3 else 1 / 0
    assert isinstance(fit("average", module=module), ZeroDivisionError)
    assert steps(tmp_path, "average") == []


def test_what_is_not_finite_and_who_stops_at_once_save_nothing(fit, tmp_path):
    module = make()

    class Spoil(Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 3:
                with torch.no_grad():
                    next(module.denoiser.parameters()).fill_(float("nan"))
                raise ValueError("mine")

    assert str(fit("spoiled", Spoil(), module=module)) == "mine"
    assert steps(tmp_path, "spoiled") == []


def test_a_record_that_cannot_be_written_ends_the_run_without_a_later_checkpoint(fit, tmp_path):
    class Full(Callback):
        def on_train_batch_start(self, trainer, *args):
            if trainer.global_step == 5:
                (tmp_path / "full" / "metrics.csv").unlink()
                (
                    tmp_path / "full" / "metrics.csv"
                ).mkdir()  # as little can be written to as a full disk

    error = fit("full", Full())
    assert isinstance(error, SaveError)
    assert "metrics.csv could not be written" in str(error)
    assert steps(tmp_path, "full") == [4]


def warnings_of(caplog):
    """Return what the loggers of the project have said."""
    packages = ("exact_resume", "sturdy")
    return [r.message for r in caplog.records if r.name.split(".")[0] in packages]


def samples(directory):
    return SampleGrids(
        directory=directory, sampler=Euler(steps=2), image_size=8, every_n_steps=3, n=6
    )


def test_a_grid_that_fails_and_a_logger_that_fails_change_nothing(fit, tmp_path, caplog):
    """The same weights, the same record; a warning each, and not one a step."""
    assert fit("whole", samples(tmp_path / "grids")) is None
    assert len(list((tmp_path / "grids").iterdir())) == 3

    class Server(CSVLogger):
        calls = 0

        def log_metrics(self, *args, **kwargs):
            type(self).calls += 1
            raise ConnectionError("no server")

    (tmp_path / "file").write_text("in the place of a directory")
    caplog.set_level("WARNING")
    broken = samples(tmp_path / "never")
    broken.draw = lambda module: 1 / 0
    loggers = [tolerate_errors(Server(tmp_path / "csv"))]
    assert fit("poor", samples(tmp_path / "file" / "grids"), broken, loggers=loggers) is None
    assert same(tmp_path, "whole", "poor")
    assert Server.calls == 1
    said = sorted(message.split(" failed, ")[0] for message in warnings_of(caplog))
    assert said == [
        "Server, which is not called again,",
        "the grid of samples",
        "the grid of samples",
    ]


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("CUDA out of memory."), PreemptedError("SIGTERM")],
)
def test_a_grid_spares_neither_memory_nor_a_signal(fit, tmp_path, error):
    broken = samples(tmp_path / "never")

    def draw(module):
        raise error

    broken.draw = draw
    assert fit("run", broken) is error
    assert steps(tmp_path, "run") == ([] if isinstance(error, PreemptedError) else [3])


def test_progress_that_fails_is_not_called_again(fit, tmp_path, caplog):
    progress = tolerate_errors(Progress(line_every=0))
    progress.window = None  # until the training starts
    caplog.set_level("WARNING")
    module = make()
    module.log = lambda *args, **kwargs: None  # no val/loss
    assert fit("run", progress, module=module) is None
    assert warnings_of(caplog) == [
        "Progress, which is not called again, failed, and training goes on: KeyError: 'val/loss'"
    ]


def test_a_stream_without_a_reader_takes_everything():
    """A closed pipe, one that is full and must not block, and a full disk."""
    reader, writer = os.pipe()
    os.close(reader)
    with pytest.raises(BrokenPipeError):
        os.write(writer, b"control")
    assert LossyFile(writer, "wb").write(b"abc") == 3
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    full = LossyFile(writer, "wb")
    assert [full.write(b"x" * 100_000) for _ in range(3)][1:] == [100_000, 100_000]
    os.close(reader)
    if os.path.exists("/dev/full"):
        assert LossyFile(os.open("/dev/full", os.O_WRONLY), "wb").write(b"abc") == 3


def test_a_run_outlives_its_reader_and_a_question(tmp_path):
    """As in ``train.py ... | head -1``, and two times ``kill -USR2``: once in the imports, once
    while it trains.
    """
    words = command(
        tmp_path, "read", "trainer.max_steps=400", "callbacks.samples.every_n_steps=null"
    )
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        run.stdout.readline()
        run.send_signal(signal.SIGUSR2)
        run.stdout.close()
        metrics = tmp_path / "runs" / "read" / "metrics.csv"
        while not (metrics.exists() and "\n20," in metrics.read_text()):
            assert run.poll() is None, run.stderr.read()
        run.send_signal(signal.SIGUSR2)
        said = run.stderr.read()
        assert run.wait() == 0, said
    assert Store(tmp_path / "runs" / "read" / "checkpoints").steps()[-1] == 400
    assert "Traceback" not in said
    [stacks] = (tmp_path / "runs" / "read" / "attempts").glob("*/hang-rank0.txt")
    assert "Thread" in stacks.read_text()


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOTDIR])
def test_no_right_to_write_is_a_mistake_that_names_the_key(number, tmp_path):
    """Who starts runs again must not try that again. Root has every right, so it is another user
    who asks.
    """
    place = tmp_path / "place"
    if number == errno.ENOTDIR:
        place.write_text("a file")
    else:
        place.mkdir(mode=0o555)
    root = os.geteuid() == 0
    if root:
        tmp_path.chmod(0o755)
        os.seteuid(65534)
    try:
        with pytest.raises(ConfigError, match=r"paths\.runs") as refused:
            lock_run(Run(place / "run"))
    finally:
        if root:
            os.seteuid(0)
    assert isinstance(refused.value.__cause__, OSError)


def test_who_is_stopped_twice_without_a_step_in_between_is_told(tmp_path):
    assert not stopped_here_before(Run(tmp_path / "nothing there"))
    found = [stopped_here_before(Run(tmp_path))]
    found.append(stopped_here_before(Run(tmp_path)))
    Store(tmp_path / "checkpoints").commit(5, {})
    found += [stopped_here_before(Run(tmp_path)), stopped_here_before(Run(tmp_path))]
    assert found == [False, True, False, True]


def test_a_profiler_reports_and_changes_nothing(tmp_path):
    """The last part is without it, and is the same trajectory."""
    train(tmp_path, "whole")
    table = train(tmp_path, "watched", "trainer.max_steps=3", "trainer.profiler=simple").stdout
    table = table[table.index("where the time went") : table.index("An action may contain")]
    assert max(map(len, table.splitlines())) <= 80
    assert re.search(r"^run_training_batch +3 ", table, re.MULTILINE), table
    traced = train(tmp_path, "watched", "trainer.max_steps=8", "trainer.profiler=pytorch")
    assert "warn" not in (traced.stdout + traced.stderr).lower()
    files = [path.name for path in (tmp_path / "runs/watched/attempts/002").iterdir()]
    assert "fit-profile.txt" in files
    assert [name for name in files if name.endswith(".pt.trace.json")]
    done = train(tmp_path, "watched").stdout
    assert "resumed from step 8, to step 12 (bitwise" in done
    assert "where the time" not in done
    assert differences(tmp_path, "whole", "watched") == []


def test_out_of_memory_says_what_helps():
    cfg = OmegaConf.create(
        {
            "data": {"batch_size": 12, "shards": 2, "num_workers": 0},
            "backbone": {"checkpoint": False},
            "callbacks": {"samples": {"n": 56}},
        }
    )
    with pytest.raises(RuntimeError) as real:
        torch.empty(2**60)
    assert is_out_of_memory(real.value)
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    said = str(describe_out_of_memory(real.value, cfg))
    assert said.startswith("out of memory: ")
    assert "data.shards=4 (now 2)" in said
    assert "backbone.checkpoint=true" in said
    assert "data.batch_size (now 12)" in said
    cfg.data.shards = cfg.data.batch_size = 3
    assert "data.shards" not in str(describe_out_of_memory(real.value, cfg)), (
        "it cannot be cut any smaller"
    )


def test_a_training_in_another_thread_hears_no_signal_and_says_so(fit, tmp_path, caplog):
    caplog.set_level("WARNING")
    result = []
    thread = threading.Thread(target=lambda: result.append(fit("thread")))
    thread.start()
    thread.join()
    assert result == [None]
    assert steps(tmp_path, "thread")[-1] == 9
    assert [message for message in warnings_of(caplog) if "not in the main thread" in message]


def test_the_hint_about_srun_is_expected(monkeypatch, tmp_path):
    from lightning.fabric.plugins.environments import SLURMEnvironment

    (tmp_path / "srun").write_text("")
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.warns(UserWarning, match="srun"):
        SLURMEnvironment.detect()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for message in IGNORED_WARNINGS:
            warnings.filterwarnings("ignore", message)
        SLURMEnvironment.detect()
