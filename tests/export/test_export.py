"""What leaves a run is complete, right and read by others; what is wrong leaves nothing."""

import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from exact_resume.checkpoint.store import Store, load_state
from finetuning import LORA, prepare
from runs import COMMON, ROOT, fork, train
from sd_layouts import write_file
from sturdy.cli.main import compose_run
from sturdy.evaluation.record import write_row
from sturdy.export import formats
from sturdy.export.main import main

pytest.importorskip("diffusers")

SHORT = [
    *(word for word in COMMON if not word.startswith(("backbone.", "callbacks.samples"))),
    "trainer.max_steps=2",
    "trainer.val_check_interval=1",
    "callbacks.checkpoint.every_n_train_steps=1",
    "callbacks.samples=null",
]
DIT = [*SHORT, "backbone=dit", "backbone.width=32", "backbone.depth=1", "backbone.heads=2"]
UNET = [
    *SHORT,
    *("backbone=unet", "backbone.width=8", "backbone.head_dim=8", "backbone.blocks=1"),
    *("backbone.multipliers=[1,2]", "backbone.attention=[False,True]"),
]
UNET2D = [
    *SHORT,
    *("backbone=unet2d", "backbone.width=8", "backbone.head_dim=8", "backbone.blocks=1"),
    *("backbone.multipliers=[1,2]", "backbone.attention=[False,True]"),
]


@pytest.fixture(scope="module")
def tmp(tmp_path_factory):
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def dit(tmp):
    train(tmp, "dit", base=DIT)
    return tmp / "runs" / "dit"


@pytest.fixture(scope="module")
def diffusion(tmp):
    """The words of a run that fine-tunes a tiny Stable Diffusion."""
    return prepare(tmp)


@pytest.fixture(scope="module")
def adapter(tmp, diffusion):
    train(tmp, "adapter", *LORA, "lora.alpha=24", base=diffusion)


@pytest.fixture
def export(tmp, tmp_path, capsys, monkeypatch):
    """Export in this process into ``tmp_path / "out"``: the exit code and what was said."""
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)

    def start(*words):
        paths = [f"paths.runs={tmp / 'runs'}", f"paths.cache={tmp / 'cache'}", "device=cpu"]
        words = [*paths, f"out={tmp_path / 'out'}", "threads=1", "preview=2", *words]
        code = main(compose_run(ROOT / "conf" / "export.yaml", words), words)
        said = capsys.readouterr()
        return code, said.out + said.err

    yield start
    torch.use_deterministic_algorithms(False)


def draw_as_the_card_says(folder, *options, path=""):
    """Run the lines of the card in its folder, without this project unless ``path`` has it."""
    code = re.findall(r"```python\n(.*?)\n```", (folder / "README.md").read_text(), re.DOTALL)[0]
    environment = os.environ | {"PYTHONPATH": path}
    words = [sys.executable, *options, "-c", code]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with Image.open(folder / "drawn.png") as image:
        return image.size


def averages(run, step=2):
    state = load_state(Store(run / "checkpoints").state(step))["state_dict"]
    start = "ema.model.backbone."
    return {n.removeprefix(start): t for n, t in state.items() if n.startswith(start)}


def test_the_weights_of_our_own_network(dit, export, tmp_path):
    write_row(dit, 2, {"evaluation/n": 8, "evaluation/kid": 0.25})
    write_row(dit, 1, {"evaluation/n": 8, "evaluation/kid": 0.75})
    code, said = export("run=dit", "to=safetensors", "license=CC-BY-4.0")
    assert code == 0, said
    assert "read back by safetensors" in said
    out = tmp_path / "out"
    names = {"README.md", "config.json", "model.safetensors", "preview.png"}
    assert {path.name for path in out.iterdir()} == names
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    modes = {path.stat().st_mode & 0o777 for path in out.iterdir()}
    assert len(modes) == 1, "as readable as new files are"
    weights = load_file(out / "model.safetensors")
    expected = averages(dit)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    card = (out / "README.md").read_text()
    assert "0.75" not in card  # of another step
    for part in (
        "60 images, 8 classes",
        "CC-BY-4.0",
        "| kid | 0.25 |",
        "pickup",
        "(EMA) of the weights of step 2",
    ):
        assert part in card
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    assert draw_as_the_card_says(out, path=path) == (64, 16)


def test_the_weights_themselves(dit, export, tmp_path):
    assert export("run=dit", "to=safetensors", "weights=model", "preview=0", "ckpt_path=1")[0] == 0
    weights = load_file(tmp_path / "out" / "model.safetensors")
    state = load_state(Store(dit / "checkpoints").state(1))["state_dict"]
    assert all(torch.equal(state[f"denoiser.backbone.{n}"], t) for n, t in weights.items())
    assert "not stated" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["to=diffusers"], "backbone=unet2d"),
        (["to=lora"], "no adapter: use to=diffusers"),
        (["to=kohya"], "backbone=unet2d"),
        (["to=difusers"], "Did you mean diffusers?"),
        (["to=safetensors", "weights=emma"], "Did you mean ema?"),
        (["to=safetensors", "prompt=a car"], "trained without captions"),
        (["to=safetensors", "ckpt_path=7"], "7"),
        (["to=safetensors", "preview=-1"], "preview=-1"),
    ],
)
def test_a_refusal_is_one_line_and_leaves_nothing(dit, export, tmp_path, words, part):
    code, said = export("run=dit", "preview=0", *words)
    assert code == 2
    error = said.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert part in error
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_never_overwritten(dit, export, tmp_path):
    (tmp_path / "out").mkdir()
    code, said = export("run=dit", "to=safetensors")
    assert code == 2
    assert "is there already" in said
    assert list((tmp_path / "out").iterdir()) == []


def test_control_a_weight_that_changed_on_the_way_is_seen(dit, export, tmp_path, monkeypatch):
    def write_and_change(subject, folder, *rest):
        written = formats.write_safetensors(subject, folder, *rest)
        tensors = load_file(folder / "model.safetensors")
        next(iter(tensors.values())).view(-1)[0] += 1e-6
        save_file(tensors, folder / "model.safetensors")
        return written

    monkeypatch.setitem(formats.FORMATS, "safetensors", write_and_change)
    code, said = export("run=dit", "to=safetensors", "preview=0")
    assert code == 2
    assert "differs from the run's by 1 " in said
    assert list(tmp_path.iterdir()) == []


def test_killed_it_leaves_no_folder_and_the_next_one_cleans_up(dit, tmp, export, tmp_path):
    paths = [f"paths.runs={tmp / 'runs'}", f"paths.cache={tmp / 'cache'}", "device=cpu"]
    words = [*paths, "run=dit", "to=safetensors", f"out={tmp_path / 'out'}", "threads=1"]
    process, out, err = fork(tmp_path, "killed", [str(ROOT / "export.py"), *words])
    end = time.monotonic() + 120
    while not list(tmp_path.glob(".out.export-*/export/*")):
        assert time.monotonic() < end, out.read_text() + err.read_text()
        time.sleep(0.005)
    process.kill()
    process.join()
    assert not (tmp_path / "out").exists()
    assert len(list(tmp_path.glob(".out.export-*"))) == 1
    assert export("run=dit", "to=safetensors", "preview=0")[0] == 0
    assert list(tmp_path.glob(".out.export-*")) == []


@pytest.mark.slow
@pytest.mark.parametrize("base", [DIT, UNET, [*UNET2D, "schedule=cosine", "target=v"]])
def test_a_program_of_torch_draws_without_this_project(tmp, export, tmp_path, base):
    name = f"program-{base[len(SHORT)].partition('=')[2]}"
    train(tmp, name, base=base)
    code, said = export(f"run={name}", "to=torch_export")
    assert code == 0, said
    assert "read back by torch 2" in said
    assert draw_as_the_card_says(tmp_path / "out", "-I") == (64, 16)


@pytest.mark.slow
def test_a_program_of_onnx_draws_without_this_project(dit, export, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    code, said = export("run=dit", "to=onnx")
    assert code == 0, said
    assert "read back by onnxruntime" in said
    assert draw_as_the_card_says(tmp_path / "out", "-I") == (64, 16)


def test_onnx_without_its_packages_is_refused(dit, export, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    code, said = export("run=dit", "to=onnx", "preview=0")
    assert code == 2
    assert "pip install 'sturdy-diffusion[onnx]'" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["schedule=linear", "target=noise"],
        ["schedule=cosine", "target=v"],
        ["schedule=rectified_flow", "target=velocity"],
        ["schedule=shifted", "target=velocity", "schedule.base_size=8"],
    ],
    ids=["noise", "v", "flow", "shifted"],
)
def test_a_network_of_diffusers_leaves_as_a_pipeline(tmp, export, tmp_path, words, request):
    name = request.node.callspec.id
    train(tmp, name, *words, base=UNET2D)
    code, said = export(f"run={name}", "to=diffusers")
    assert code == 0, said
    assert "read back by diffusers" in said
    assert "next" in said
    assert draw_as_the_card_says(tmp_path / "out", "-I") == (64, 16)


@pytest.mark.slow
def test_control_a_scheduler_that_means_something_else_is_seen(tmp, export, tmp_path, monkeypatch):
    def write_and_change(subject, folder, *rest):
        written = formats.write_diffusers(subject, folder, *rest)
        file = folder / "scheduler" / "scheduler_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"timestep_spacing": "leading"}))
        return written

    train(tmp, "other", "schedule=linear", "target=noise", base=UNET2D)
    monkeypatch.setitem(formats.FORMATS, "diffusers", write_and_change)
    code, said = export("run=other", "to=diffusers", "preview=0")
    assert code == 2
    assert "differs from the run's" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_adapter_leaves_in_every_format(tmp, adapter, export, tmp_path):
    for to in ("lora", "kohya", "diffusers", "safetensors", "torch_export"):
        code, said = export("run=adapter", f"to={to}", "preview=0", f"out={tmp_path / to}")
        assert code == 0, said
    kohya = load_file(tmp_path / "kohya" / "adapter.safetensors")
    assert {name.rpartition(".")[2] for name in kohya} == {"weight", "alpha"}
    assert {float(t) for name, t in kohya.items() if name.endswith(".alpha")} == {24.0}
    assert draw_as_the_card_says(tmp_path / "diffusers", "-I") == (64, 64)
    assert draw_as_the_card_says(tmp_path / "torch_export", "-I") == (256, 64)


@pytest.mark.slow
def test_sdxl_leaves_with_both_text_encoders(tmp, export, tmp_path):
    home = tmp / "xl"
    words = prepare(home, "sdxl")
    train(tmp, "xl", *LORA, "base.dtype=bfloat16", base=words)
    for to in ("diffusers", "lora"):
        code, said = export("run=xl", f"to={to}", "preview=0", f"out={tmp_path / to}")
        assert code == 0, said
        assert to != "diffusers" or "pooled" in said
    assert draw_as_the_card_says(tmp_path / "diffusers", "-I") == (64, 64)


@pytest.mark.slow
def test_a_network_of_diffusers_in_latents_leaves_with_its_autoencoder(
    tmp, diffusion, export, tmp_path
):
    words = [*UNET2D, "space=latents", f"space.path={tmp / 'sd1'}", "data.image_size=64"]
    train(tmp, "latent", *words, "schedule=linear", "target=v", base=[])
    code, said = export("run=latent", "to=diffusers", "preview=0")
    assert code == 0, said
    assert "image" in said
    assert draw_as_the_card_says(tmp_path / "out", "-I") == (256, 64)


@pytest.mark.slow
@pytest.mark.parametrize("averaged", [False, True])
def test_all_of_stable_diffusion_leaves_as_the_file_it_came_from(
    tmp, diffusion, export, tmp_path, averaged
):
    home = tmp / f"file-{averaged}"
    home.mkdir()
    file = write_file(tmp / "sd1", home / "model.safetensors", averaged=averaged)
    shutil.copytree(tmp / "sd1" / "tokenizer", home / "tokenizer")
    words = [word if not word.startswith("base=") else f"base={file}" for word in diffusion]
    train(tmp, home.name, base=words)
    code, said = export(f"run={home.name}", "to=kohya", "preview=0")
    assert code == 0, said
    assert "read back by diffusers" in said
    before = load_file(file)
    after = load_file(tmp_path / "out" / f"{home.name}.safetensors")
    assert after.keys() == {name for name in before if not name.startswith("model_ema.")}
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.startswith("model.diffusion_model.") for name in moved)


@pytest.mark.slow
def test_all_of_stable_diffusion_leaves_as_a_pipeline_and_not_as_an_adapter(
    tmp, diffusion, export, tmp_path
):
    train(tmp, "full", base=diffusion)
    code, said = export("run=full", "to=diffusers", "prompt=a red car")
    assert code == 0, said
    for part in ("prediction", "next", "embeddings", "image"):
        assert part in said
    assert draw_as_the_card_says(tmp_path / "out", "-I") == (64, 64)
    code, said = export("run=full", "to=lora", f"out={tmp_path / 'lora'}")
    assert code == 2
    assert "no adapter" in said
    code, said = export("run=full", "to=kohya", f"out={tmp_path / 'kohya'}")
    assert code == 2
    assert "is a folder" in said
