"""Files of weights as others write them: in every format, damaged, and malicious."""

import pickle
import sys
import zipfile
from contextlib import contextmanager
from types import ModuleType

import numpy as np
import torch
from omegaconf import OmegaConf

WEIGHTS = {
    "model.layer.weight": torch.arange(12.0).reshape(3, 4),
    "model.layer.bias": torch.full((3,), 0.5, dtype=torch.float16),
    "model_ema.layerweight": torch.ones(3, 4),
    "steps": torch.tensor(7),
}


def same(tensors, expected=WEIGHTS):
    return tensors.keys() == expected.keys() and all(
        tensors[name].dtype == expected[name].dtype and torch.equal(tensors[name], expected[name])
        for name in expected
    )


@contextmanager
def fake_classes(*names):
    """Let classes of a package that is not installed exist, and yield them."""
    replaced = {}
    classes = []
    for name in names:
        module, _, short = name.rpartition(".")
        path = module.split(".")
        for depth in range(1, len(path) + 1):
            package = ".".join(path[:depth])
            is_last = depth == len(path)  # it is replaced also where the real one is imported
            if package not in replaced and (is_last or package not in sys.modules):
                replaced[package] = sys.modules.get(package)
                sys.modules[package] = ModuleType(package)
                sys.modules[package].__path__ = []
        base = dict if short == "AttributeDict" else object
        classes.append(type(short, (base,), {"__module__": module}))
        setattr(sys.modules[module], short, classes[-1])
    try:
        yield classes
    finally:
        for package, real in replaced.items():
            del sys.modules[package]
            if real:
                sys.modules[package] = real


def lightning_content(**extra):
    """Yield what Lightning 1.x and 2.x put beside the weights, with objects; save it at once."""
    names = [
        "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
        "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
        "pytorch_lightning.utilities.parsing.AttributeDict",
    ]
    with fake_classes(*names) as (checkpoint, stopping, attributes):
        hyper = attributes(lr=1e-4, betas=[0.9, 0.99])
        hyper["itself"] = checkpoint()
        hyper["itself"].best = np.float32(0.25)
        yield {
            "epoch": 3,
            "global_step": 470000,
            "pytorch-lightning_version": "1.4.2",
            "state_dict": dict(WEIGHTS),
            "callbacks": {checkpoint: {"best": np.float64(0.125)}, stopping: {"wait": 1}},
            "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []}],
            "hyper_parameters": hyper,
            "config": OmegaConf.create({"model": {"lr": 1e-4, "names": ["a", "b"]}}),
            "array": np.arange(3),
        } | extra


def save_lightning(path, **extra):
    for content in lightning_content(**extra):
        torch.save(content, path)
    return path


class Calls:
    """An object whose pickle calls ``function(*arguments)`` when it is loaded."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def replace_pickle(path, change):
    """Rewrite a torch file with ``change(pickle)`` in place of its pickle."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, change(content) if name.endswith("/data.pkl") else content)
    return path


def write_pickle(path, content):
    """Write a torch file whose pickle is ``content``, and that has no tensors."""
    torch.save({}, path)
    return replace_pickle(path, lambda _: content)


def call_pickle(module, name, command, protocol=2):
    """Return a pickle of ``{"x": module.name(command)}``, written by hand."""
    text = pickle.BINUNICODE + len(command).to_bytes(4, "little") + command.encode()
    call = pickle.GLOBAL + f"{module}\n{name}\n".encode() + text + pickle.TUPLE1 + pickle.REDUCE
    key = pickle.BINUNICODE + b"\1\0\0\0x"
    body = pickle.EMPTY_DICT + key + call + pickle.SETITEM + pickle.STOP
    return pickle.PROTO + bytes([protocol]) + body
