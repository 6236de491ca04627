"""Sharded checkpoints: each process writes its pieces, and any number of processes reads them."""

import hashlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from exact_resume.__main__ import main
from exact_resume.checkpoint import schema, sharded
from exact_resume.checkpoint.compare import diff_checkpoints
from exact_resume.checkpoint.integrity import CheckpointLoadError, CorruptCheckpointError
from exact_resume.checkpoint.reading import manifest_hash
from exact_resume.checkpoint.renames import RENAMED, Renamed
from exact_resume.checkpoint.store import MANIFEST, STATE, Store, load_state
from exact_resume.checkpoint.writer import SaveError, StoreCheckpointIO
from exact_resume.distributed import PeerLostError

PARTS = ["part-00000.safetensors", "part-00001.safetensors"]


def start_world(tmp: Path, n: int, action: Callable[[int], object]) -> list[int]:
    """Fork ``n`` connected processes that call ``action(rank)``; return their ids."""
    meeting = tmp / f"meeting-{time.monotonic_ns()}"
    sys.stdout.flush()
    pids = []
    for rank in range(n):
        if pid := os.fork():
            pids.append(pid)
            continue
        code = 1
        try:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(n)}
            store = dist.FileStore(str(meeting), n)
            dist.init_process_group(
                "gloo", store=store, rank=rank, world_size=n, timeout=timedelta(seconds=60)
            )
            action(rank)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return pids


def run_world(tmp: Path, n: int, action: Callable[[int], object]) -> None:
    """Run ``action(rank)`` in ``n`` connected processes; none may fail."""
    codes = [os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in start_world(tmp, n, action)]
    assert codes == [0] * n


def full_state(step: int) -> dict:
    """Return a state of every kind of tensor that may be cut, and of some that are not."""
    draw = torch.Generator().manual_seed(step)
    weights = {
        "even": torch.randn(8, 6, generator=draw),
        "uneven": torch.randn(5, 3, generator=draw),
        "one row": torch.randn(1, 4, generator=draw),
        "half": torch.randn(6, generator=draw).bfloat16(),
        "flags": torch.rand(4, 2, generator=draw) > 0.5,
        "counts": torch.arange(step, step + 7),
        "transposed": torch.randn(3, 4, generator=draw).T,
        "odd values": torch.tensor([float("nan"), -0.0, float("inf"), 1e-45]),
        "copied": torch.randn(3, generator=draw),
        "whole": torch.randn(2, 2, generator=draw),
        "empty": torch.empty(0, 3),
    }
    optimizer = {"state": {"even": {"exp_avg": torch.randn(8, 6, generator=draw)}}}
    return {
        "state_dict": weights,
        "optimizer_states": [optimizer | {"param_groups": [{"lr": 0.1, "params": ["even"]}]}],
        "global_step": step,
        "lr_schedulers": [],
        "loops": {},
        "pytorch-lightning_version": "2.6.6",
    }


def cut_state(step: int) -> dict:
    """Return ``full_state`` with its tensors cut over the processes; ``copied`` is on each."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def cut(name: str, value: Tensor) -> Tensor:
        if name == "whole":
            return value
        way = Replicate() if name == "copied" else Shard(1 if name == "transposed" else 0)
        return distribute_tensor(value, mesh, [way])

    state = full_state(step)
    state["state_dict"] = {name: cut(name, v) for name, v in state["state_dict"].items()}
    moments = state["optimizer_states"][0]["state"]["even"]
    moments["exp_avg"] = cut("even", moments["exp_avg"])
    return state


def make_io(directory: Path, retry_delays: tuple[float, ...] = ()) -> StoreCheckpointIO:
    writer = StoreCheckpointIO(Store(directory), lambda state: {}, retry_delays=retry_delays)
    writer.sharded = True
    return writer


def save_with(writer: StoreCheckpointIO, step: int) -> None:
    """Save ``step`` in the background; called by all processes."""
    with writer:
        writer.save_checkpoint(cut_state(step), writer.store.state(step))


def save_steps(directory: Path, *steps: int, retry_delays: tuple[float, ...] = ()) -> None:
    """Save ``steps`` in the background; called by all processes."""
    with make_io(directory, retry_delays) as writer:
        for step in steps:
            writer.save_checkpoint(cut_state(step), writer.store.state(step))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store with the steps 1 and 2, written by two processes."""
    run_world(tmp_path, 2, lambda rank: save_steps(tmp_path / "checkpoints", 1, 2))
    return Store(tmp_path / "checkpoints")


@pytest.fixture
def disk(tmp_path: Path):
    """A small file system of its own."""
    there = tmp_path / "disk"
    there.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", there], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"mounting is not permitted here: {mounted.stderr.strip()}")
    yield there
    subprocess.run(["umount", there], check=True)


@pytest.mark.parametrize("n", [2, 3])
def test_it_equals_the_full_state(tmp_path: Path, n: int) -> None:
    directory = tmp_path / "checkpoints"
    run_world(tmp_path, n, lambda rank: save_steps(directory, 5))
    loaded = load_state(Store(directory).state(5))
    want = full_state(5)
    assert diff_checkpoints(want, loaded) == []
    assert loaded.keys() == want.keys() | {"format"}
    for name, value in want["state_dict"].items():
        assert loaded["state_dict"][name].stride() == value.stride(), name
    manifest = Store(directory).verify(5)
    names = {path.name for path in Store(directory).path(5).iterdir()}
    assert manifest["files"].keys() | {MANIFEST} == names
    assert len(names) == n + 2


def test_no_part_has_what_another_has(store: Store) -> None:
    size = sum((store.path(1) / part).stat().st_size for part in PARTS)
    tensors = full_state(1)["state_dict"].values()
    assert size < sum(tensor.nbytes for tensor in tensors) + 8 * 6 * 4 + 2 * 3000, "headers"
    assert (store.path(1) / STATE).stat().st_size < 10_000


def test_the_parts_are_safetensors_that_torch_reads(store: Store) -> None:
    pytest.importorskip("safetensors")
    import torch.distributed.checkpoint as dcp

    target = torch.empty(5, 3)
    reader = dcp.HuggingFaceStorageReader(str(store.path(1)))
    dcp.load({"state_dict/uneven": target}, storage_reader=reader, no_dist=True)
    assert torch.equal(target, full_state(1)["state_dict"]["uneven"])


def test_a_strategy_that_cuts_nothing_writes_one_file(tmp_path: Path) -> None:
    writer = make_io(tmp_path)
    writer.save_checkpoint(full_state(3), writer.store.state(3))
    assert {path.name for path in writer.store.path(3).iterdir()} == {STATE, MANIFEST}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def flip_header(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[20] ^= 1
    path.write_bytes(content)


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("name", [STATE, *PARTS])
def test_a_checkpoint_with_a_damaged_file_is_not_used(store: Store, name: str) -> None:
    for damage in (Path.unlink, flip, flip_header, cut_short):
        broken = Store(store.directory.parent / damage.__name__)
        shutil.copytree(store.directory, broken.directory)
        damage(broken.path(2) / name)
        with pytest.raises(CorruptCheckpointError, match=name):
            broken.verify(2)
        with pytest.raises(CorruptCheckpointError, match=name):
            load_state(broken.state(2))
        manifest = broken.last(quarantine=True)
        assert manifest is not None
        assert manifest["step"] == 1, damage
        assert [path.name[:13] for path in (broken.directory / "quarantine").glob("*[0-9]")] == [
            "step-00000002"
        ]


def test_weights_that_were_renamed_since_are_found(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "FORMAT", schema.FORMAT + 1)
    monkeypatch.setitem(RENAMED, schema.FORMAT - 1, Renamed(weights={"even": "level"}))
    loaded, old = load_state(store.state(2)), full_state(2)
    assert torch.equal(loaded["state_dict"]["level"], old["state_dict"]["even"])
    moment = loaded["optimizer_states"][0]["state"]["level"]["exp_avg"]
    assert torch.equal(moment, old["optimizer_states"][0]["state"]["even"]["exp_avg"])


def test_a_part_of_another_checkpoint_is_not_taken(store: Store) -> None:
    """Also without a manifest, ``state.ckpt`` knows its parts."""
    shutil.copyfile(store.path(1) / PARTS[1], store.path(2) / PARTS[1])
    (store.path(2) / MANIFEST).unlink()
    with pytest.raises(CorruptCheckpointError, match=PARTS[1]):
        load_state(store.state(2))


class Malicious:
    """Writes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return (Path.touch, (self.canary,))


def malicious_bytes(canary: Path) -> list[bytes]:
    zipped = io.BytesIO()
    torch.save({"state_dict": Malicious(canary)}, zipped)
    return [pickle.dumps(Malicious(canary)), zipped.getvalue()]


@pytest.mark.parametrize("name", [STATE, PARTS[1], MANIFEST, ".metadata"])
@pytest.mark.parametrize("kind", [0, 1])
def test_loading_executes_nothing(store: Store, tmp_path: Path, name: str, kind: int) -> None:
    """Not even where every hash was made to fit; neither with a manifest nor without one."""
    canary = tmp_path / "executed"
    content = malicious_bytes(canary)[kind]
    path = store.path(2)
    (path / name).write_bytes(content)
    forge_hashes(path, name)
    for _ in range(2):
        if name == ".metadata":  # nothing reads it
            load_state(store.state(2))
        else:
            with pytest.raises((CorruptCheckpointError, CheckpointLoadError)):
                load_state(store.state(2))
        main(["show", str(path)])
        main(["verify", str(tmp_path)])
        if name in (STATE, PARTS[1]):
            (path / MANIFEST).unlink(missing_ok=True)
    assert not canary.exists()
    control = io.BytesIO(content)
    pickle.load(control) if kind == 0 else torch.load(control, weights_only=False)
    assert canary.exists(), "control: it does execute"


def forge_hashes(path: Path, name: str) -> None:
    """Make every hash fit the files that are there now."""
    if name == MANIFEST:
        return
    files = {}
    for file in path.iterdir():
        content = file.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        files[file.name] = {"bytes": len(content), "sha256": digest}
    del files[MANIFEST]
    if name != STATE:
        state = torch.load(path / STATE, weights_only=True)
        state["parts"] = {part: files[part] for part in PARTS}
        torch.save(state, path / STATE)
        content = (path / STATE).read_bytes()
        files[STATE] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest = json.loads((path / MANIFEST).read_bytes()) | {"files": files}
    del manifest["sha256"]
    manifest["sha256"] = manifest_hash(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest))


def test_a_full_disk(disk: Path, tmp_path: Path) -> None:
    """The error of one process is that of all, nothing counts, and the space is free again."""
    directory = disk / "checkpoints"
    run_world(tmp_path, 2, lambda rank: save_steps(directory, 1))
    filler = disk / "filler"
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize
    filler.write_bytes(bytes(free - 4096))

    def fail(rank: int) -> None:
        with pytest.raises(SaveError, match="No space left on device"):
            save_steps(directory, 2, 3, retry_delays=(0, 0))

    run_world(tmp_path, 2, fail)
    assert [path.name for path in directory.iterdir()] == ["step-00000001"]
    filler.unlink()
    run_world(tmp_path, 2, lambda rank: save_steps(directory, 2))
    assert diff_checkpoints(load_state(Store(directory).state(2)), full_state(2)) == []


def test_all_processes_try_again_together(disk: Path, tmp_path: Path) -> None:
    directory = disk / "checkpoints"
    filler = disk / "filler"
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize
    filler.write_bytes(bytes(free - 4096))

    def save(rank: int) -> None:
        warned = []
        import exact_resume.checkpoint.writer as module

        def note(*arguments: object) -> None:
            warned.append(arguments)
            if rank == 1 and len(warned) == 2:
                filler.unlink()

        module.log.warning = note  # type: ignore[method-assign]
        save_steps(directory, 2, retry_delays=(0.05,) * 1000)
        assert len(warned) >= 2

    run_world(tmp_path, 2, save)
    assert diff_checkpoints(load_state(Store(directory).state(2)), full_state(2)) == []


def test_a_process_that_dies_in_the_middle_leaves_nothing_that_counts(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    run_world(tmp_path, 2, lambda rank: save_steps(directory, 1))

    def die(rank: int) -> None:
        writer = make_io(directory)
        if rank:
            sharded.write_part = lambda *_: os._exit(0)  # after the plan, before its part
        with pytest.raises(PeerLostError):
            save_with(writer, 2)

    run_world(tmp_path, 2, die)
    store = Store(directory)
    assert store.steps() == [1]
    store.remove_stale_temp()
    assert [path.name for path in directory.iterdir()] == ["step-00000001"]
    run_world(tmp_path, 2, lambda rank: save_steps(directory, 2))
    assert store.steps() == [1, 2]


def test_a_process_that_hangs_is_not_waited_for_without_end(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"

    def hang(rank: int) -> None:
        sharded.TIMEOUT = timedelta(seconds=1)
        writer = make_io(directory)
        if rank:
            sharded.write_part = lambda *_: time.sleep(3)
        with pytest.raises(PeerLostError):
            save_with(writer, 2)

    run_world(tmp_path, 2, hang)
    assert Store(directory).steps() == []


@pytest.mark.parametrize("is_checked", [True, False])
def test_control_no_rename_before_each_part_is_there(tmp_path: Path, is_checked: bool) -> None:
    directory = tmp_path / "checkpoints"

    def lose(rank: int) -> None:
        write = sharded.write_part
        if rank:
            sharded.write_part = lambda path, pieces: write(tmp_path / path.name, pieces)
        if not is_checked:
            sharded.check_size = lambda path, entry: None
            save_steps(directory, 2)
            return
        with pytest.raises(SaveError, match=r"part-00001.*storage that all machines share"):
            save_steps(directory, 2)

    run_world(tmp_path, 2, lose)
    if is_checked:
        assert [*directory.iterdir()] == []
        return
    with pytest.raises(CorruptCheckpointError, match="part-00001"):  # what the check prevents
        Store(directory).verify(2)


# --- A distributed model


def make_model(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a model and its optimizer after one step, cut over the processes if there are any."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3), nn.LayerNorm(3))
    if dist.is_initialized():
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(2, 5)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def model_state(model: nn.Module, optimizer: torch.optim.Optimizer, *, whole: bool) -> dict:
    options = StateDictOptions(full_state_dict=whole)
    state = full_state(4)
    state["state_dict"] = get_model_state_dict(model, options=options)
    state["optimizer_states"] = [get_optimizer_state_dict(model, optimizer, options=options)]
    return state


@pytest.fixture
def trained(tmp_path: Path) -> Store:
    """The checkpoint of a model on two processes."""

    def save(rank: int) -> None:
        writer = make_io(tmp_path / "trained")
        model, optimizer = make_model(0)
        writer.save_checkpoint(model_state(model, optimizer, whole=False), writer.store.state(4))

    run_world(tmp_path, 2, save)
    return Store(tmp_path / "trained")


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_any_number_of_processes_loads_its_pieces(trained: Store, tmp_path: Path, n: int) -> None:
    want = load_state(trained.state(4))

    def load(rank: int) -> None:
        model, optimizer = make_model(1)
        assert diff_checkpoints(want, model_state(model, optimizer, whole=True))
        rest = make_io(tmp_path).load_into(trained.state(4), model, [optimizer])
        assert rest is not None
        assert rest["global_step"] == 4
        found = model_state(model, optimizer, whole=True)
        assert diff_checkpoints(want, found, ["state_dict", "optimizer_states"]) == []

    run_world(tmp_path, n, load)


def test_a_process_reads_only_the_parts_that_it_needs(trained: Store, tmp_path: Path) -> None:
    flip(trained.path(4) / PARTS[1])

    def load(rank: int) -> None:
        model, optimizer = make_model(1)
        writer = make_io(tmp_path)
        if rank == 0:
            assert writer.load_into(trained.state(4), model, [optimizer])
            return
        with pytest.raises(CorruptCheckpointError, match=PARTS[1]):
            writer.load_into(trained.state(4), model, [optimizer])

    run_world(tmp_path, 2, load)


def test_another_network_is_refused_by_name(trained: Store, tmp_path: Path) -> None:
    def load(rank: int) -> None:
        wider = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 3), nn.LayerNorm(3))
        fully_shard(wider, mesh=init_device_mesh("cpu", (2,)))
        optimizer = torch.optim.AdamW(wider.parameters())
        with pytest.raises(CheckpointLoadError, match=r"0.weight has the shape \(7, 5\) there"):
            make_io(tmp_path).load_into(trained.state(4), wider, [optimizer])
        wider.append(nn.Linear(3, 3))
        with pytest.raises(CheckpointLoadError, match=r"it has no 3\.bias, 3\.weight"):
            make_io(tmp_path).load_into(trained.state(4), wider, [optimizer])

    run_world(tmp_path, 2, load)


# --- The command


def test_consolidate_writes_one_full_file(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store.write_score(2, "val/loss", 0.5)
    assert main(["consolidate", str(tmp_path)]) == 0
    made = Store(tmp_path / "consolidated")
    assert made.steps() == [2]
    assert made.verify(2)["files"].keys() == {STATE}
    alone = torch.load(made.state(2), weights_only=True)
    assert diff_checkpoints(alone, full_state(2)) == []
    assert made.scores("val/loss") == {2: 0.5}
    assert "verified" in capsys.readouterr().out
    assert main(["consolidate", str(tmp_path)]) == 2
    assert "never overwritten" in capsys.readouterr().err
    out = tmp_path / "out"
    assert main(["consolidate", str(store.path(1)), "--out", str(out)]) == 0
    assert main(["consolidate", str(tmp_path), "--step", "7"]) == 2
    assert "no step 7" in capsys.readouterr().err
    assert main(["consolidate", str(out / "step-00000001")]) == 0
    assert "is whole already" in capsys.readouterr().out


def test_consolidate_refuses_what_does_not_verify(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(store.path(2) / PARTS[0])
    assert main(["consolidate", str(tmp_path), "--step", "2"]) == 1
    assert PARTS[0] in capsys.readouterr().err
    assert not (tmp_path / "consolidated").exists()
    assert main(["consolidate", str(tmp_path)]) == 0, "the next older one"
    assert Store(tmp_path / "consolidated").steps() == [1]
