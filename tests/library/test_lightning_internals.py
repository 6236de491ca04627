"""What the project uses of Lightning and torch although it is not public, in real fits.

Each test has a control: the same fit without the function of ``lightning_internals`` goes wrong. If
a control fails, Lightning has learnt it by itself, and the function can go.
"""

import os
import signal
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from exact_resume import distributed
from exact_resume.distributed import init_process_group
from exact_resume.lightning_internals import (
    always_run_fit_loop,
    disable_signal_handling,
    is_in_step,
    reset_batch_progress,
    run_validation,
)
from exact_resume.workers import reserve_port, worker_environment

X = torch.linspace(-1, 1, 32).reshape(16, 2)


class Module(L.LightningModule):
    """A linear map, with Lightning's own optimization."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch):
        return self.layer(batch[0]).square().mean()

    def validation_step(self, batch):
        return self.training_step(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class On(Callback):
    """Calls ``action(trainer)`` in each of ``hooks``."""

    def __init__(self, action, *hooks):
        for hook in hooks:
            setattr(self, hook, lambda trainer, *args, hook=hook: action(trainer, hook))


def make_trainer(directory, *callbacks, **settings):
    defaults = {
        "accelerator": "cpu",
        "max_steps": 4,
        "max_epochs": -1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "val_check_interval": 3,
        "check_val_every_n_epoch": None,
    }
    return L.Trainer(
        **defaults | settings, callbacks=list(callbacks), default_root_dir=str(directory)
    )


def fit(trainer, **settings):
    module = Module()
    loader = DataLoader(TensorDataset(X), batch_size=2)
    trainer.fit(module, loader, DataLoader(TensorDataset(X), batch_size=8), **settings)
    return module


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("disabled", [True, False])
def test_the_handler_of_a_signal_stays_ours(disabled, tmp_path):
    """Control: Lightning puts its own in its place."""
    found = []

    def handler(number, frame):
        pass

    before = signal.signal(signal.SIGTERM, handler)
    try:
        look = On(lambda *_: found.append(signal.getsignal(signal.SIGTERM)), "on_train_start")
        trainer = make_trainer(tmp_path, look)
        if disabled:
            disable_signal_handling(trainer)
        fit(trainer)
        found.append(signal.getsignal(signal.SIGTERM))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(found) == 2
    assert all(f is handler for f in found) == disabled


def count_broadcasts(directory: Path, rank: int, port: int, disabled: bool) -> int:
    """Train in this process, one of two; return how often it broadcast a tensor in four steps."""
    calls = 0

    def start_counting(*_):
        broadcast = torch.distributed.broadcast

        def count(*args, **kwargs):
            nonlocal calls
            calls += 1
            return broadcast(*args, **kwargs)

        torch.distributed.broadcast = count

    os.environ |= worker_environment(rank, 2, port, 0)
    init_process_group()
    trainer = make_trainer(
        directory,
        On(start_counting, "on_train_start"),
        devices=2,
        strategy="ddp",
        plugins=[distributed.cluster_environment()],
        limit_val_batches=0,
    )
    if disabled:
        disable_signal_handling(trainer)
    fit(trainer)
    return calls


@pytest.mark.parametrize("disabled", [True, False])
def test_no_step_waits_for_a_tensor_about_signals(disabled, tmp_path):
    """Control: each process broadcasts one at each of the four steps."""
    assert hasattr(_TrainingEpochLoop, "_broadcast_sigterm_tensor")
    sys.stdout.flush()
    pids = []
    with reserve_port() as port:
        for rank in range(2):
            if pid := os.fork():
                pids.append(pid)
                continue
            code = 99
            try:
                code = count_broadcasts(tmp_path, rank, port, disabled)
            finally:
                os._exit(code)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert codes == ([0, 0] if disabled else [4, 4])


@pytest.mark.parametrize("always", [True, False])
def test_at_the_last_step_the_hooks_are_called_and_nothing_is_trained(always, tmp_path):
    """Control: Lightning calls neither."""
    trainer = make_trainer(tmp_path)
    trained = fit(trainer)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    called = []
    note = On(lambda _, hook: called.append(hook), "on_train_start", "on_train_end")
    again = make_trainer(tmp_path, note)
    if always:
        always_run_fit_loop(again)
    module = fit(again, ckpt_path=tmp_path / "end.ckpt", weights_only=True)
    assert called == (["on_train_start", "on_train_end"] if always else [])
    assert again.global_step == 4
    assert equal(module, trained)


def test_a_validation_before_the_first_step_changes_nothing_that_follows(tmp_path):
    """Control: ``trainer.validate`` in its place, which ends the fit."""
    plain = fit(make_trainer(tmp_path))
    steps = []
    note = On(lambda trainer, _: steps.append(trainer.global_step), "on_validation_end")
    validate = On(lambda trainer, _: run_validation(trainer), "on_train_start")
    assert equal(fit(make_trainer(tmp_path, note, validate)), plain)
    assert steps == [0, 3]

    def validate_publicly(trainer, hook):
        loader = DataLoader(TensorDataset(X), batch_size=8)
        trainer.validate(trainer.lightning_module, loader, verbose=False)

    with pytest.raises(MisconfigurationException, match="train_dataloader"):
        fit(make_trainer(tmp_path, On(validate_publicly, "on_train_start")))


def test_what_is_in_a_step(tmp_path):
    """From the forward pass to the update of the weights; a fetched batch is not in it yet."""
    found = {}
    inside = ("on_before_backward", "on_after_backward", "on_before_optimizer_step")
    outside = (
        "on_train_start",
        "on_train_batch_start",
        "on_train_batch_end",
        "on_validation_batch_end",
        "on_train_end",
    )
    note = On(lambda trainer, hook: found.update({hook: is_in_step(trainer)}), *inside, *outside)
    fit(make_trainer(tmp_path, note))
    assert found == dict.fromkeys(inside, True) | dict.fromkeys(outside, False)


@pytest.mark.parametrize(
    ("hook", "step"), [("on_train_batch_start", 2), ("on_validation_batch_end", 3)]
)
def test_what_was_not_done_is_not_counted(hook, step, tmp_path):
    """Control: the counters that Lightning saves there count the batch, or the validation."""
    saved = {}

    def save(trainer, hook):
        if trainer.global_step == step and hook not in saved:
            saved["as it is"] = loops(trainer, tmp_path)
            reset_batch_progress(trainer)
            saved[hook] = loops(trainer, tmp_path)
            raise StopIteration

    def save_undisturbed(trainer, hook):
        if trainer.global_step == step:
            saved["undisturbed"] = loops(trainer, tmp_path)

    fit(make_trainer(tmp_path, On(save_undisturbed, "on_train_batch_end")))
    fit(make_trainer(tmp_path, On(save, hook)))
    assert counters(saved[hook]) == counters(saved["undisturbed"])
    assert counters(saved["as it is"]) != counters(saved["undisturbed"])


def loops(trainer, directory):
    trainer.save_checkpoint(directory / "state.ckpt")
    return torch.load(directory / "state.ckpt", weights_only=True)["loops"]["fit_loop"]


def counters(state):
    """Return the batches begun, in training and in the validation of now."""
    training = state["epoch_loop.batch_progress"]
    validation = state["epoch_loop.val_loop.batch_progress"]
    return (training["total"]["ready"], training["current"]["ready"], validation["current"])


def test_sums_over_lists_of_tensors_are_those_of_a_loop():
    """torch has no public name for them: the private ones must exist, and give the same bits."""
    a = [torch.randn(5, 3), torch.randn(7)]
    b = [torch.randn(5, 3), torch.randn(7)]
    expected = [(x + y) * 3 for x, y in zip(a, b, strict=True)]
    torch._foreach_add_(a, b)
    torch._foreach_mul_(a, 3)
    copies = [torch.zeros_like(x) for x in a]
    torch._foreach_copy_(copies, a)
    assert all(torch.equal(x, y) for x, y in zip(copies, expected, strict=True))
