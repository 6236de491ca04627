"""Any file of weights is read or refused by name, and nothing in it is ever executed."""

import functools
import os
import pickle
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from exact_resume.weights_file import WeightsFileError, open_weights
from untrusted_files import (
    WEIGHTS,
    Calls,
    call_pickle,
    fake_classes,
    replace_pickle,
    same,
    save_lightning,
    write_pickle,
)

save_file = pytest.importorskip("safetensors.torch").save_file


@pytest.fixture
def canary(tmp_path):
    """A file that is there once a malicious file was executed."""
    return tmp_path / "canary"


# Reading


def test_safetensors(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(WEIGHTS | {"v_pred": torch.tensor([])}, path, {"author": "a", "global_step": "12"})
    file = open_weights(path)
    assert same(file.tensors, WEIGHTS | {"v_pred": torch.tensor([])})
    assert (file.path, file.format, file.step, file.imports) == (path, "safetensors", 12, [])
    assert file.metadata == {"author": "a", "global_step": "12"}


@pytest.mark.parametrize("suffix", ["ckpt", "pt", "bin"])
def test_torch(suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    torch.save(WEIGHTS, path)
    file = open_weights(str(path))
    assert same(file.tensors)
    assert (file.path, file.format, file.step, file.imports) == (path, "torch", None, [])


def test_what_is_in_a_file_counts_and_not_its_suffix(tmp_path):
    torch.save(WEIGHTS, tmp_path / "a.safetensors")
    save_file(WEIGHTS, tmp_path / "a.ckpt")
    assert open_weights(tmp_path / "a.safetensors").format == "torch"
    assert open_weights(tmp_path / "a.ckpt").format == "safetensors"
    assert same(open_weights(tmp_path / "a.safetensors").tensors)
    assert same(open_weights(tmp_path / "a.ckpt").tensors)


@pytest.mark.parametrize("name", ["a.ckpt", "a.safetensors"])
def test_tensors_are_mapped_and_the_file_is_never_written(name, tmp_path):
    path = tmp_path / name
    if name == "a.ckpt":
        torch.save(WEIGHTS, path)
    else:
        save_file(WEIGHTS, path)
    before = path.read_bytes()
    file = open_weights(path)
    if sys.platform == "linux":
        assert str(path) in Path("/proc/self/maps").read_text()
    file.tensors["model.layer.weight"].zero_()
    assert path.read_bytes() == before


def test_parameters_are_plain_tensors(tmp_path):
    layer = nn.Linear(3, 2)
    torch.save(OrderedDict(layer.named_parameters()), tmp_path / "a.pt")
    torch.save(layer.state_dict(), tmp_path / "b.pt")
    for name in ("a.pt", "b.pt"):
        tensors = open_weights(tmp_path / name).tensors
        assert same(tensors, layer.state_dict())
        assert not any(tensor.requires_grad for tensor in tensors.values())


def test_nested_dicts_are_joined_by_dots(tmp_path):
    content = {"model": {"a": torch.ones(1), "b": {0: torch.zeros(2)}}, "args": "-v"}
    torch.save(content, tmp_path / "a.pt")
    file = open_weights(tmp_path / "a.pt")
    assert same(file.tensors, {"model.a": torch.ones(1), "model.b.0": torch.zeros(2)})
    assert file.metadata == {"args": "-v"}


def test_lightning_1_with_objects_as_keys_and_values(tmp_path):
    file = open_weights(save_lightning(tmp_path / "a.ckpt"))
    assert same(file.tensors)
    assert file.step == 470000
    assert file.metadata["pytorch-lightning_version"] == "1.4.2"
    assert "optimizer_states" in file.entries
    assert "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint" in file.imports
    assert "omegaconf.dictconfig.DictConfig" in file.imports
    assert any(name.endswith("multiarray.scalar") for name in file.imports)


def test_control_torch_alone_refuses_that_file(tmp_path):
    with pytest.raises(pickle.UnpicklingError):
        torch.load(save_lightning(tmp_path / "a.ckpt"), weights_only=True)


def test_names_of_older_numpy(tmp_path):
    path = save_lightning(tmp_path / "a.ckpt")
    replace_pickle(path, lambda content: content.replace(b"numpy._core.", b"numpy.core."))
    file = open_weights(path)
    assert "numpy.core.multiarray.scalar" in file.imports
    assert same(file.tensors)


def test_a_step_that_is_an_object_is_not_known(tmp_path):
    assert open_weights(save_lightning(tmp_path / "a.ckpt", global_step=np.int64(5))).step is None


def test_a_file_without_checksums(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(WEIGHTS, tmp_path / "a.ckpt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert same(open_weights(tmp_path / "a.ckpt").tensors)


def test_many_threads_at_once(tmp_path):
    save_lightning(tmp_path / "a.ckpt")
    with fake_classes("lightning.pytorch.x.Y") as (cls,):
        torch.save(WEIGHTS | {"y": cls()}, tmp_path / "b.ckpt")
    before = set(torch.serialization.get_safe_globals())
    failures = []

    def read():
        for _ in range(15):
            for name in ("a.ckpt", "b.ckpt"):
                try:
                    assert same(open_weights(tmp_path / name).tensors)
                except Exception as error:
                    failures.append(error)

    threads = [threading.Thread(target=read) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert set(torch.serialization.get_safe_globals()) == before


# Malicious files


def touch(canary):
    return f"touch {canary}"


def write_hub(canary):
    folder = canary.parent / "hub"
    folder.mkdir(exist_ok=True)
    (folder / "hubconf.py").write_text(f"open({str(canary)!r}, 'w')\ndef f():\n    return 1\n")
    return str(folder)


ATTACKS = {
    "posix.system": lambda canary: Calls(os.system, touch(canary)),
    "os.popen": lambda canary: Calls(os.popen, touch(canary)),
    "builtins.eval": lambda canary: Calls(eval, f"open({str(canary)!r}, 'w')"),
    "builtins.exec": lambda canary: Calls(exec, f"open({str(canary)!r}, 'w')"),
    "io.open": lambda canary: Calls(open, str(canary), "w"),
    "functools.partial": lambda canary: Calls(functools.partial(os.system, touch(canary))),
    "functools.reduce": lambda canary: Calls(functools.reduce, os.mkfifo, [str(canary), 384]),
    # how a pickle of protocol 2 writes subprocess.check_call
    "commands.check_call": lambda canary: Calls(subprocess.check_call, ["touch", str(canary)]),
    "torch.hub._load_local": lambda canary: Calls(torch.hub._load_local, write_hub(canary), "f"),
}
PLACES = {
    "instead of the weights": lambda attack, path: torch.save(attack, path),
    "among the weights": lambda attack, path: torch.save(WEIGHTS | {"x": attack}, path),
    "in a Lightning object": lambda attack, path: save_lightning(path, callbacks={"a": [attack]}),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ATTACKS)
def test_malicious_files_are_refused_by_name_and_not_executed(name, place, tmp_path, canary):
    path = tmp_path / "a.ckpt"
    PLACES[place](ATTACKS[name](canary), path)
    with pytest.raises(WeightsFileError) as refused:
        open_weights(path)
    assert name in refused.value.imports
    assert name in str(refused.value)
    assert ".safetensors" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not canary.exists()


@pytest.mark.parametrize("name", ATTACKS)
def test_control_each_of_them_works_where_pickles_are_executed(name, tmp_path, canary):
    path = tmp_path / "a.ckpt"
    PLACES["among the weights"](ATTACKS[name](canary), path)
    torch.load(path, weights_only=False)
    deadline = [canary.exists() for _ in range(20_000)]  # popen does not wait
    assert any(deadline)


SMUGGLED = ["pytorch_lightning.utilities", "lightning.pytorch", "omegaconf.base"]


@pytest.mark.parametrize("module", SMUGGLED)
def test_a_harmless_name_reaches_nothing_real(module, tmp_path, canary):
    """``os.system`` below a harmless module, as protocol 4 reaches it, is a stand-in."""
    path = write_pickle(tmp_path / "a.ckpt", call_pickle(module, "os.system", touch(canary), 4))
    with fake_classes(f"{module}.Any"):
        sys.modules[module].os = os
        with pytest.warns(UserWarning, match="protocol 4"), pytest.raises(WeightsFileError) as why:
            open_weights(path)
        assert not canary.exists()
        assert "holds no tensors" in str(why.value)
        assert why.value.imports == [f"{module}.os.system"]
        torch.load(path, weights_only=False)  # control: it is executed without stand-ins
        assert canary.exists()


def test_stand_ins_take_any_arguments(tmp_path):
    calls = [
        Calls(np._core.multiarray.scalar, np.dtype("float64"), b"12345678"),
        Calls(np._core.multiarray._reconstruct, np.ndarray, (0,), b"b"),
        Calls(defaultdict, list),
        Calls(Path, "/", "etc"),
    ]
    torch.save(WEIGHTS | {"x": calls}, tmp_path / "a.ckpt")
    assert same(open_weights(tmp_path / "a.ckpt").tensors)


@pytest.mark.parametrize(
    "call",
    [
        b"cnumpy.core.multiarray\nscalar\n(NK\x01]}tR",
        b"cnumpy.core.multiarray\nscalar\n)\x81",
        b"comegaconf.dictconfig\nDictConfig\n)\x81}X\x09\0\0\0__class__K\x01sb",
        b"cpytorch_lightning.x\nAttributeDict\n)\x81X\x01\0\0\0aK\x01s",
        b"ccollections\ndefaultdict\nc__builtin__\nlist\n\x85R",
        b"c__builtin__\nint\nc__builtin__\nstr\n\x86",
    ],
)
def test_stand_ins_take_odd_arguments(call, tmp_path):
    weights = {"a": torch.arange(3)}
    torch.save(weights, tmp_path / "a.ckpt")
    item = b"X\x03\0\0\0odd" + call + b"s"
    replace_pickle(tmp_path / "a.ckpt", lambda content: content[:-1] + item + b".")
    file = open_weights(tmp_path / "a.ckpt")
    assert same(file.tensors, weights)
    assert file.imports


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_bare_pickle_is_refused_with_what_it_would_import(protocol, tmp_path, canary):
    path = tmp_path / "a.ckpt"
    attack = [Calls(os.system, touch(canary)), Calls(os.mkfifo, str(canary))]
    path.write_bytes(pickle.dumps(attack, protocol))
    with pytest.raises(WeightsFileError, match=r"would import posix\.mkfifo") as refused:
        open_weights(path)
    assert refused.value.imports == ["posix.mkfifo", "posix.system"]
    assert not canary.exists()
    with pytest.raises(
        (OSError, FileExistsError)
    ):  # control: the first made it, so the second fails
        pickle.loads(path.read_bytes())
    assert canary.exists()


def test_another_protocol_in_a_torch_file_is_refused_with_what_it_would_import(tmp_path, canary):
    path = tmp_path / "a.ckpt"
    torch.save(WEIGHTS | {"x": Calls(os.system, touch(canary))}, path, pickle_protocol=4)
    with pytest.raises(WeightsFileError, match="torch did not write") as refused:
        open_weights(path)
    assert "posix.system" in refused.value.imports
    assert not canary.exists()


# Files that are refused


def html(path):
    path.write_text("<!DOCTYPE html><html>Please log in</html>")


def lfs(path):
    path.write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4265146304\n"
    )


def any_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/readme.txt", "hello")


def legacy_tar(path):
    with tarfile.open(path, "w") as archive:
        archive.add(__file__, "storages")


def overlapping(path):
    header = (
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}'
    )
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(12))


def beyond_the_end(path):
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))


REFUSED = {
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "directory": (lambda path: path.mkdir(), "is a directory"),
    "pipe": (lambda path: os.mkfifo(path), "is no regular file"),
    "html": (html, "is a web page"),
    "lfs": (lfs, "git lfs pull"),
    "json": (lambda path: path.write_text('{"weight_map": {}}'), "is JSON"),
    "gguf": (lambda path: path.write_bytes(b"GGUF\3\0\0\0"), "is a GGUF file"),
    "text": (lambda path: path.write_text("weights"), "is no file of weights"),
    "zip": (any_zip, "not of torch"),
    "torchscript": (
        lambda path: torch.jit.script(nn.Linear(2, 2)).save(str(path)),
        "is a TorchScript program",
    ),
    "legacy": (
        lambda path: torch.save(WEIGHTS, path, _use_new_zipfile_serialization=False),
        "convert it once",
    ),
    "legacy tar": (legacy_tar, "is a tar file"),
    "a tensor": (lambda path: torch.save(torch.ones(2), path), "holds a Tensor"),
    "no tensors": (lambda path: torch.save({"a": [1]}, path), "holds no tensors"),
    "a network": (lambda path: torch.save(nn.Linear(2, 2), path), "torch.nn.modules.linear.Linear"),
    "no tensors in safetensors": (lambda path: save_file({}, path), "holds no tensors"),
    "overlapping": (overlapping, "is damaged"),
    "beyond the end": (beyond_the_end, "is damaged"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
@pytest.mark.parametrize("kind", REFUSED)
def test_what_holds_no_weights_is_refused_by_name(kind, suffix, tmp_path):
    write, reason = REFUSED[kind]
    path = tmp_path / f"a.{suffix}"
    write(path)
    with pytest.raises(WeightsFileError) as refused:
        open_weights(path)
    assert reason in str(refused.value)
    assert str(refused.value).startswith(f"{path} ")
    assert "\n" not in str(refused.value)


def test_the_advice_for_a_legacy_file_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(WEIGHTS, "OLD", _use_new_zipfile_serialization=False)
    with pytest.raises(WeightsFileError) as refused:
        open_weights("OLD")
    command = str(refused.value).split('python -c "')[1].rstrip('"')
    exec(command)
    assert same(open_weights("NEW.ckpt").tensors)


def test_a_file_that_is_not_there():
    with pytest.raises(FileNotFoundError):
        open_weights("nowhere.ckpt")


def test_a_dict_in_itself_is_refused(tmp_path):
    content = {}
    content["a"] = content
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(WeightsFileError, match="is damaged"):
        open_weights(tmp_path / "a.ckpt")


def write_weights(path):
    if path.suffix == ".ckpt":
        torch.save(WEIGHTS, path)
    else:
        save_file(WEIGHTS, path, {"author": "somebody"})
    return path.read_bytes()


@pytest.mark.parametrize("name", ["a.ckpt", "a.safetensors"])
def test_every_truncated_file_is_refused(name, tmp_path):
    path = tmp_path / name
    content = write_weights(path)
    for length in [*range(20), *range(20, len(content), 37), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(WeightsFileError, match=str(path)):
            open_weights(path)


def test_a_flipped_bit_anywhere_in_a_torch_file_never_gives_other_weights(tmp_path):
    """A flip in what nobody reads, such as a date, may leave the file readable."""
    path = tmp_path / "a.ckpt"
    content = write_weights(path)
    outcomes = Counter()
    for place in range(0, len(content), 2):
        spoilt = bytearray(content)
        spoilt[place] ^= 1 << place // 2 % 8
        path.write_bytes(spoilt)
        try:
            assert same(open_weights(path).tensors), place
            outcomes["read"] += 1
        except WeightsFileError:
            outcomes["refused"] += 1
    assert outcomes["refused"] > outcomes["read"]


def test_control_torch_alone_does_not_notice_a_flipped_bit(tmp_path):
    path = tmp_path / "a.ckpt"
    content = write_weights(path)
    spoilt = content.replace(WEIGHTS["model.layer.weight"].numpy().tobytes(), b"\1" * 48)
    assert spoilt != content
    path.write_bytes(spoilt)
    assert not same(torch.load(path, weights_only=True, mmap=True))
    with pytest.raises(WeightsFileError, match="does not match its checksum"):
        open_weights(path)


def test_flipped_bits_in_the_header_of_safetensors(tmp_path):
    """Its structure is checked. Flips in names, texts and tensors cannot be noticed."""
    path = tmp_path / "a.safetensors"
    content = write_weights(path)
    end = 8 + int.from_bytes(content[:8], "little")
    structure = [place for place in range(end) if place < 8 or chr(content[place]) in '{}[]:,"']
    for place in structure:
        for bit in range(8):
            spoilt = bytearray(content)
            spoilt[place] ^= 1 << bit
            path.write_bytes(spoilt)
            with pytest.raises(WeightsFileError, match=str(path)):
                open_weights(path)


def test_without_safetensors(tmp_path, monkeypatch):
    torch.save(WEIGHTS, tmp_path / "a.ckpt")
    save_file(WEIGHTS, tmp_path / "a.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert same(open_weights(tmp_path / "a.ckpt").tensors)
    with pytest.raises(WeightsFileError, match="pip install safetensors"):
        open_weights(tmp_path / "a.safetensors")
