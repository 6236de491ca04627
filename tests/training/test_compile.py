"""A compiled network trains like the one as written, resumes to its own bits, and is not believed
blindly.
"""

import shutil

import pytest
import torch

from runs import differences, kill_at, losses, train
from sturdy.errors import ConfigError
from sturdy.training.callbacks.compile import Compile
from tiny_module import Backbone, fit, make


class Traced(Backbone):
    """Compiled by the same tracer, without a second of C++."""

    def compile(self, **options):
        super().compile(**options, backend="aot_eager")


class Wrong(Backbone):
    """Its compiled form does not see the label."""

    def compile(self, **options):
        self._compiled_call_impl = lambda x, t, label: self.forward(x, t, torch.zeros_like(label))


def compiled(backbone, tmp_path):
    module = make(backbone=backbone)
    return module, fit(module, tmp_path, 3, callbacks=[Compile()])[1]


def test_it_trains_the_same(tmp_path):
    written = make(backbone=Backbone)
    _, expected = fit(written, tmp_path / "written", 3)
    module, found = compiled(Traced, tmp_path / "traced")
    assert module.denoiser.backbone._compiled_call_impl is not None
    assert module.ema.model.backbone._compiled_call_impl is None
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b)
    assert module.state_dict().keys() == written.state_dict().keys()


def test_wrong_gradients_are_refused(tmp_path):
    with pytest.raises(
        ConfigError,
        match=r"5 of 6 parameters get other gradients, such as backbone\.label\.weight, ",
    ):
        compiled(Wrong, tmp_path)


@pytest.mark.parametrize("key", ["alignment=embedded", "strategy=fsdp2"])
def test_what_does_not_go_with_it(key, tmp_path):
    refused = train(tmp_path, "refused", "trainer.compile=true", key, code=2)
    assert f"does not go with {key.split('=')[0].replace('strategy', 'fsdp2')}" in refused.stderr


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="Inductor needs a C++ compiler")
def test_killed_it_ends_in_the_same_bits(tmp_path):
    """By Inductor, with dropout: near the network as it is written, and equal to itself."""
    train(tmp_path, "written")
    train(tmp_path, "compiled", "trainer.compile=true")
    written, found = (
        torch.tensor([float(row[1]) for row in losses(tmp_path, n) if row[1]])
        for n in ("written", "compiled")
    )
    torch.testing.assert_close(found, written, rtol=1e-3, atol=1e-3)
    kill_at(tmp_path, "killed", 6, "trainer.compile=true", saved=True)
    assert "bitwise: same stack" in train(tmp_path, "killed", "trainer.compile=true").stdout
    assert differences(tmp_path, "compiled", "killed") == []
