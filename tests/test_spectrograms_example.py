"""The example of sounds: no 3 and no square is built in, from a WAV file to the WAV file of a
sample.
"""

import math
import re
import shutil
import subprocess
import sys
import wave

import numpy as np
import pytest
import torch
from PIL import Image

from examples.spectrograms import listen, synthesise
from examples.spectrograms.mel import HOP, RATE, WINDOW, log_mel, to_sound
from examples.spectrograms.source import Sounds
from examples.spectrograms.wav import read_wav, write_wav
from runs import differences, kill_at, run_script, train
from sturdy.data.source import BadImageError

BANDS, FRAMES = 80, 96  # of experiment=spectrograms
SMALL = (16, 24)
WORDS = [
    "experiment=spectrograms",
    "trainer=cpu",
    "trainer.threads=1",
    "trainer.max_steps=6",
    "trainer.val_check_interval=3",
    "trainer.log_every_n_steps=1",
    f"data.image_size=[{SMALL[0]},{SMALL[1]}]",
    "data.batch_size=4",
    "data.holdout=0.2",
    "sampler.steps=2",
    "callbacks.checkpoint.every_n_train_steps=2",
    "callbacks.samples.every_n_steps=6",
    "callbacks.samples.n=4",
]
DIT = ["backbone.width=16", "backbone.depth=2"]
UNET = [
    "backbone=unet",
    "backbone.patch=2",
    "backbone.width=8",
    "backbone.head_dim=8",
    "backbone.blocks=1",
    "backbone.multipliers=[1,2]",
    "backbone.attention=[False,True]",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with ``sounds``."""
    tmp = tmp_path_factory.mktemp("sounds")
    assert synthesise.write_sounds(tmp / "sounds", 8) == 32
    return tmp


@pytest.fixture(scope="module")
def words(home):
    return [*WORDS, f"data.source.root={home / 'sounds'}"]


@pytest.fixture(scope="module")
def once(home, words):
    """A run that nobody has disturbed; its name."""
    said = train(home, "once", *DIT, base=words).stdout
    assert "once: 32 images, 4 classes; fresh, to step 6" in said
    return "once"


def heard(picture):
    """Return the sound of a picture that was rounded to 8 bits."""
    return to_sound(((picture + 1) * 127.5).round() / 127.5 - 1)


def decibels(a, b, among):
    """Return the RMS difference of two pictures in dB, in the cells ``among``."""
    return ((a - b)[among] * 40).square().mean().sqrt().item()


@pytest.mark.parametrize("tone", [220, 440, 1000, 2500, 5000])
def test_a_tone_comes_back_at_its_frequency(tone):
    sine = 0.5 * torch.sin(2 * math.pi * tone * torch.arange(FRAMES * HOP) / RATE)
    sound = heard(log_mel(sine[None], BANDS))[0]
    spectrum = torch.fft.rfft(sound * torch.hann_window(len(sound))).abs()
    peak = spectrum.argmax().item() * RATE / len(sound)
    assert abs(peak - tone) < 2 * RATE / WINDOW  # measured: 18 Hz at most, of 31


@pytest.mark.parametrize("name", synthesise.CLASSES)
def test_a_sound_comes_back_nearly_as_it_was(name):
    both = [synthesise.synthesise(name, index)[: FRAMES * HOP] for index in range(2)]
    picture, other = log_mel(torch.tensor(np.stack(both)), BANDS).float().split(1)
    again = log_mel(heard(picture), BANDS)
    loud = picture > picture.max() - 1  # the upper 40 dB
    assert decibels(again, picture, loud) < 6  # measured: 1.7 to 4.1
    assert decibels(other, picture, loud) > decibels(again, picture, loud) + 2, "the control"


def test_a_picture_is_always_the_same_sound():
    picture = torch.linspace(-1, 1, 16 * 24).reshape(1, 16, 24)
    assert torch.equal(to_sound(picture), to_sound(picture))
    assert not torch.equal(to_sound(picture), to_sound(picture.flip(1)))
    assert to_sound(torch.full((1, 16, 24), -1.0)).abs().max() < 1e-3, "silence"


def test_eight_bits_are_enough():
    sound = torch.tensor(synthesise.synthesise("horn", 0)[: FRAMES * HOP])[None]
    picture = log_mel(sound, BANDS)
    exact = 10 ** (2 * picture[picture > -1])
    rounded = 10 ** (2 * (((picture + 1) * 127.5).round() / 127.5 - 1)[picture > -1])
    noise = (rounded / exact - 1).square().mean().sqrt().item()
    assert -20 * math.log10(noise) == pytest.approx(39.6, abs=0.5)  # dB below the sound


def test_a_wav_file_comes_back(tmp_path):
    sound = np.array([0.0, 0.5, -0.25, 1.0, -1.0, 1e-5], np.float32)
    write_wav(tmp_path / "a.wav", sound)
    assert np.abs(read_wav(tmp_path / "a.wav") - sound).max() <= 1 / 32768
    with wave.open(str(tmp_path / "a.wav")) as file:
        assert (file.getframerate(), file.getsampwidth(), file.getnchannels()) == (RATE, 2, 1)


def test_other_files_are_refused_with_a_reason(tmp_path):
    (tmp_path / "text.wav").write_text("no sound")
    with pytest.raises(BadImageError, match="cannot be read as WAV"):
        read_wav(tmp_path / "text.wav")
    with wave.open(str(tmp_path / "slow.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(100))
    with pytest.raises(BadImageError, match=r"has 8000 samples a second .* not 16000 of 16: sox"):
        read_wav(tmp_path / "slow.wav")


def test_a_source_of_pictures_of_one_channel(home):
    source = Sounds(root=str(home / "sounds"), size=SMALL)
    assert source.classes == ("bell", "engine", "horn", "pluck")
    assert len(source) == 32
    picture = source.decode(9)
    assert (picture.shape, picture.dtype) == ((1, *SMALL), np.uint8)
    assert source.name(9) == "engine/0001.wav"
    assert source.label(9) == 1
    assert source.key != Sounds(root=str(home / "sounds"), size=(16, 32)).key


def test_a_short_sound_ends_in_silence_and_a_long_one_is_cut(tmp_path):
    sound = synthesise.synthesise("horn", 1).astype(np.float32)
    (tmp_path / "a").mkdir()
    for name, part in (("1", sound), ("2", np.tile(sound, 2)), ("3", sound[: 10 * HOP])):
        write_wav(tmp_path / "a" / f"{name}.wav", part)
    source = Sounds(root=str(tmp_path), size=SMALL)
    whole, long, short = (source.decode(index) for index in range(3))
    assert np.array_equal(whole, long)
    assert not short[:, :, 14:].any()
    assert whole[:, :, 14:].any()


def test_sounds_are_written_once(home):
    before = {path: path.read_bytes() for path in (home / "sounds").rglob("*.wav")}
    [first, *_] = before
    first.unlink()
    assert synthesise.write_sounds(home / "sounds", 8) == 1
    assert {path: path.read_bytes() for path in before} == before


def test_without_sounds_the_command_that_makes_them(tmp_path):
    said = train(tmp_path, "none", "data.source.root=nowhere", base=WORDS, code=2).stderr
    assert "root=nowhere has no WAV files" in said
    assert "python -m examples.spectrograms.synthesise nowhere" in said
    assert "Traceback" not in said


def test_killed_it_ends_in_the_same_bits(home, words, once):
    kill_at(home, "killed", 4, *DIT, base=words, saved=True)
    assert "resumed from step" in train(home, "killed", *DIT, base=words).stdout
    assert differences(home, once, "killed") == []


@pytest.mark.slow
def test_the_unet_too(home, words):
    words = ["data=sounds", "space.channels=1", *UNET, *words[1:]]
    train(home, "unet", base=words)
    kill_at(home, "killed-unet", 4, base=words, saved=True)
    assert "resumed from step" in train(home, "killed-unet", base=words).stdout
    assert differences(home, "unet", "killed-unet") == []


@pytest.mark.slow
def test_a_moved_folder_is_the_same_run(home, words, once):
    shutil.copytree(home / "sounds", home / "moved")
    moved = [*words[:-1], f"data.source.root={home / 'moved'}", "trainer.max_steps=8"]
    moved += ["learning_rate=constant"]
    train(home, "moved", *DIT, "learning_rate=constant", base=words)
    assert "(bitwise" in train(home, "moved", *DIT, base=moved).stdout


def test_its_samples_are_pictures_and_sounds(home, once, monkeypatch, capsys):
    with Image.open(home / "runs" / once / "samples" / "step-00000006.png") as grid:
        assert grid.width > grid.height  # four in a row, which are as wide as they are
    run_script(home, "sample", f"run={once}", "sample.n=5")
    folder = home / "runs" / once / "pictures"
    for path in sorted(folder.glob("0*.png")):
        with Image.open(path) as image:
            assert (image.mode, image.size) == ("L", (SMALL[1], SMALL[0]))
    before = {path: path.stat().st_mtime_ns for path in folder.glob("0*.png")}
    run_script(home, "sample", f"run={once}", "sample.n=5")
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("0*.png")}

    monkeypatch.setattr(sys, "argv", ["listen", str(folder)])
    assert listen.main() == 0
    assert "5 sounds" in capsys.readouterr().out
    for number in range(5):
        assert len(read_wav(folder / f"{number:06d}.wav")) == SMALL[1] * HOP
    with Image.open(folder / "spectrograms.png") as figure:
        assert figure.mode == "RGBA"


def test_a_picture_is_drawn_from_a_picture(home, once):
    """sample.image and sample.mask, with an image of other proportions."""
    draw = np.random.default_rng(0)
    Image.fromarray(draw.integers(0, 256, (50, 40, 3), np.uint8)).save(home / "tall.png")
    mask = np.zeros((50, 40), np.uint8)
    mask[25:] = 255
    Image.fromarray(mask).save(home / "mask.png")
    options = [f"sample.image={home / 'tall.png'}", f"sample.mask={home / 'mask.png'}"]
    run_script(home, "sample", f"run={once}", "sample.n=1", f"sample.out={home / 'o'}", *options)
    with Image.open(home / "o" / "000000.png") as image:
        assert (image.mode, image.size) == ("L", (SMALL[1], SMALL[0]))


def test_listen_says_what_is_wrong(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["listen", str(tmp_path)])
    assert listen.main() == 2
    assert "has no pictures" in capsys.readouterr().err
    Image.new("RGB", (4, 4)).save(tmp_path / "000000.png")
    assert listen.main() == 2
    assert "is no grey image" in capsys.readouterr().err


@pytest.mark.slow
def test_it_is_evaluated_and_exported(home, once):
    small = ["evaluate.n=8", "evaluate.batch_size=8", "evaluate.levels=2", "features.seen=16"]
    small += ["evaluate.audit_seen=16", "evaluate.auditors=1"]
    said = run_script(home, "evaluate", f"run={once}", *small)
    assert "class accuracy" in said
    report = (home / "runs" / once / "evaluation" / "report.md").read_text()
    assert "8 images of 16 x 24 pixels" in report
    run_script(home, "export", f"run={once}", "to=torch_export", "preview=2")
    [folder] = (home / "runs" / once / "exports").iterdir()
    card = (folder / "README.md").read_text()
    assert "16 x 24 pixels" in card
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=folder)
    with Image.open(folder / "drawn.png") as image:
        assert (image.mode, image.size) == ("L", (4 * SMALL[1], SMALL[0]))


@pytest.mark.skipif(not shutil.which("sox"), reason="there is no sox")
def test_sox_reads_the_sounds(home):
    file = home / "sounds" / "bell" / "0000.wav"
    done = subprocess.run(["sox", file, "-n", "stat"], capture_output=True, text=True, check=True)
    assert re.search(r"Length \(seconds\):\s+1\.000000", done.stderr)
