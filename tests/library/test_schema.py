"""The schema of a checkpoint: what may be saved, what is required to load, what is compared."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch.utils.data import DataLoader, TensorDataset

from exact_resume.checkpoint import schema
from exact_resume.checkpoint.compare import diff_checkpoints
from exact_resume.checkpoint.schema import (
    FORMAT,
    MANIFEST_ENTRIES,
    STATE_ENTRIES,
    Entry,
    SchemaError,
    declare,
    markdown_table,
    missing_entries,
)
from exact_resume.checkpoint.store import CheckpointLoadError, Store, load_state
from exact_resume.checkpoint.writer import StoreCheckpointIO


@pytest.fixture(autouse=True)
def restored_schema():
    """Take back what a test declares."""
    before = dict(STATE_ENTRIES), dict(MANIFEST_ENTRIES)
    yield
    for table, entries in zip((STATE_ENTRIES, MANIFEST_ENTRIES), before, strict=True):
        table.clear()
        table.update(entries)


class Numbers(L.LightningDataModule):
    """A stock data module with a state and hyper-parameters."""

    def __init__(self, size=4):
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.ones(8, 2)), batch_size=self.hparams.size)

    def state_dict(self):
        return {"position": 8}

    def load_state_dict(self, state):
        self.loaded = state


class Stock(L.LightningModule):
    """A stock module with automatic optimization, a scheduler and hyper-parameters."""

    def __init__(self, width=2, queue=None):
        super().__init__()
        self.save_hyperparameters(ignore="queue")
        self.layer = torch.nn.Linear(2, width)
        self.queue = queue

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters())
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    def on_save_checkpoint(self, checkpoint):
        if self.queue is not None:
            checkpoint["queue"] = self.queue

    def on_load_checkpoint(self, checkpoint):
        self.queue = checkpoint.get("queue")


def fit(directory, module, *callbacks, entry=None, metadata=None):
    """Train a stock module for some steps; returns the trainer and its data module."""
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=list(callbacks),
        plugins=[StoreCheckpointIO(Store(directory), lambda checkpoint: metadata or {})],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = Numbers()
    trainer.fit(module, data, ckpt_path=entry, weights_only=True)
    return trainer, data


def save(trainer):
    path = trainer.strategy.checkpoint_io.store.state(trainer.global_step)
    trainer.save_checkpoint(path)
    return path


def test_all_that_lightning_writes_is_declared(tmp_path):
    trainer, _ = fit(tmp_path, Stock(), WeightAveraging())
    path = save(trainer)
    state = load_state(path)
    assert state["Numbers"] == {"position": 8}
    assert {"averaging_state", "current_model_state", "hyper_parameters"} <= state.keys()
    assert state["format"] == FORMAT
    assert missing_entries(state) == []
    _, data = fit(tmp_path / "again", Stock(), WeightAveraging(), entry=path)
    assert data.loaded == {"position": 8}


def test_a_value_that_is_not_declared_is_refused_and_one_line_declares_it(tmp_path):
    trainer, _ = fit(tmp_path, Stock(queue=[3, 1]))
    with pytest.raises(SchemaError, match=r"entry 'queue' .*declare\(Entry\('queue', list"):
        save(trainer)
    assert Store(tmp_path).steps() == []
    declare(Entry("queue", list, "samples that wait", written_by="Stock"))
    module = Stock()
    fit(tmp_path / "again", module, entry=save(trainer))
    assert module.queue == [3, 1]


def test_a_value_of_another_type_is_refused(tmp_path):
    declare(Entry("queue", dict, "samples that wait", written_by="Stock"))
    trainer, _ = fit(tmp_path, Stock(queue=[3, 1]))
    with pytest.raises(SchemaError, match=r"'queue' .*is a list, but it is declared as dict"):
        save(trainer)


def test_the_manifest_has_a_schema_too(tmp_path):
    trainer, _ = fit(tmp_path, Stock(), metadata={"place": "here"})
    with pytest.raises(SchemaError, match="entry 'place'"):
        save(trainer)
    declare(Entry("place", str, "the machine", written_by="a test"), MANIFEST_ENTRIES)
    save(trainer)
    assert Store(tmp_path).last()["place"] == "here"


def test_a_name_has_one_meaning():
    declare(Entry("queue", list, "samples that wait", written_by="Stock"))
    declare(Entry("queue", list, "samples that wait", written_by="Stock"))  # a module read twice
    with pytest.raises(SchemaError, match="'queue' is declared already"):
        declare(Entry("queue", list, "another", written_by="another"))


@pytest.mark.parametrize("name", [entry.name for entry in STATE_ENTRIES.values() if entry.required])
def test_what_a_run_needs_to_continue_is_named_if_it_is_missing(name, tmp_path):
    trainer, _ = fit(tmp_path / "run", Stock())
    state = load_state(save(trainer))
    del state[name]
    torch.save(state, tmp_path / "part.ckpt")
    with pytest.raises(CheckpointLoadError, match=f"has no {name}, so no run can continue"):
        trainer.strategy.checkpoint_io.load_checkpoint(tmp_path / "part.ckpt")


def test_everything_is_compared_but_what_is_excepted():
    a = {"state_dict": {"w": torch.ones(1)}, "queue": [1], "loops": {"x": 1}}
    b = {"state_dict": {"w": torch.ones(1)}, "queue": [2], "loops": {"x": 2}}
    assert diff_checkpoints(a, b) == ["queue/0"], "of a module that is not imported here"
    declare(Entry("queue", list, "samples that wait", written_by="Stock"))
    assert diff_checkpoints(a, b) == ["queue/0"]
    del STATE_ENTRIES["queue"]
    declare(Entry("queue", list, "samples that wait", written_by="Stock", compared=False))
    assert diff_checkpoints(a, b) == []
    del STATE_ENTRIES["queue"]
    nan, zero = {"x": float("nan")}, {"x": 0.0}
    assert diff_checkpoints(nan, dict(nan)) == []
    assert diff_checkpoints(zero, {"x": -0.0}) == ["x"]
    assert diff_checkpoints({"x": None}, {}) == ["x"]
    assert diff_checkpoints({"callbacks": {"A": {"n": 1}}}, {"callbacks": {"A": {"n": 2}}})


@pytest.mark.parametrize("table", [STATE_ENTRIES, MANIFEST_ENTRIES])
def test_the_table_for_the_docs_has_a_row_for_each_entry(table):
    head, rule, *rows = markdown_table(table).splitlines()
    assert [row.split("`")[1] for row in rows] == list(table)
    assert all(row.count("|") == rule.count("|") == head.count("|") for row in rows)
    for name in ("state_dict", "optimizer_states", "callbacks", "of a module not imported here"):
        assert schema.is_compared(name)
    assert not schema.is_compared("config"), "it holds the name of the run"
