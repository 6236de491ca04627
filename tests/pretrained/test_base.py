"""A base has the same tensors, configs and hashes in every layout; or it is refused."""

import gzip
import json
import shutil
import sys

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

import sd_layouts as layouts
from exact_resume.weights_file import WeightsFileError
from examples.tiny_sd.build import FAMILIES, build
from sturdy.pretrained.base import hash_tensors, open_autoencoder, open_base
from sturdy.pretrained.known import read_text_config, read_unet_config, read_vae_config
from sturdy.pretrained.parts import complete_config, make_module
from sturdy.pretrained.tokenizer import MERGES_USED, find_merges

SINGLE_FILES = {
    "safetensors": {},
    "ckpt": {},
    "averaged.ckpt": {"averaged": True},
    "lightning.ckpt": {"averaged": True, "lightning": True},
}
FOLDERS = {"sharded": layouts.write_sharded_folder, "old": layouts.write_old_folder}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny folder of each family."""
    root = tmp_path_factory.mktemp("folders")
    for family in FAMILIES:
        build(root / family, family)
    return {family: root / family for family in FAMILIES}


@pytest.fixture
def folder(folders, tmp_path):
    """A copy of the folder of version 1, to damage."""
    return shutil.copytree(folders["sd1"], tmp_path / "sd1")


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def edit(path, **changes):
    """Change entries of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def save(tensors, folder):
    """Replace the weights in a folder of a part."""
    (file,) = folder.glob("*.safetensors")
    layouts.save_file(tensors, file)


def read_all(path):
    """Return the tensors of every part."""
    base = open_base(path)
    return [base.weights(part) for part in base.parts]


def run(part, module):
    """Return the output of a part for fixed inputs."""
    noise = torch.Generator().manual_seed(1)
    if part.startswith("text_encoder"):
        tokens = torch.arange(77)[None] * 6
        return module(tokens, output_hidden_states=True).hidden_states[-1]
    if part == "vae":
        return module(torch.randn(1, 3, 32, 32, generator=noise)).sample
    x = torch.randn(1, 4, 8, 8, generator=noise)
    text = torch.randn(1, 77, module.config.cross_attention_dim, generator=noise)
    added = {"text_embeds": text[:, 0, :32], "time_ids": torch.full((1, 6), 64.0)}
    return module(x, torch.tensor([500]), text, added_cond_kwargs=added).sample


class TestFolder:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_has_what_diffusers_loads(self, folders, family):
        from diffusers import DiffusionPipeline

        pipeline = DiffusionPipeline.from_pretrained(folders[family], local_files_only=True)
        base = open_base(folders[family])
        assert base.family == family
        for part in base.parts:
            theirs = getattr(pipeline, part)
            assert equal(base.weights(part), theirs.state_dict())
            assert equal(base.build(part).state_dict(), theirs.state_dict())
            config = base.config(part)
            assert config == json.loads(json.dumps(config))
            assert config == {name: _plain(theirs.config)[name] for name in config}
        assert base.tokenizer(0)("a cat").input_ids == pipeline.tokenizer("a cat").input_ids

    def test_says_what_it_predicts(self, folder):
        assert (open_base(folder).prediction, open_base(folder).zero_snr) == ("noise", False)
        scheduler = folder / "scheduler" / "scheduler_config.json"
        edit(scheduler, prediction_type="v_prediction", rescale_betas_zero_snr=True)
        assert (open_base(folder).prediction, open_base(folder).zero_snr) == ("v", True)
        edit(scheduler, prediction_type="sample")
        with pytest.raises(ValueError, match="prediction_type sample is not supported"):
            open_base(folder)

    def test_another_schedule_is_refused(self, folder):
        scheduler = folder / "scheduler" / "scheduler_config.json"
        edit(scheduler, beta_end=0.02)
        with pytest.raises(ValueError, match=r"beta_end 0\.02 is not supported, only 0\.012"):
            open_base(folder)

    def test_full_precision_is_taken_before_half(self, folder):
        full = open_base(folder).sha256("unet")
        unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
        half = {name: tensor.half() for name, tensor in layouts.load_file(unet).items()}
        layouts.save_file(half, unet.with_name("diffusion_pytorch_model.fp16.safetensors"))
        assert open_base(folder).sha256("unet") == full


def _plain(config):
    values = dict(config) if hasattr(config, "keys") else config.to_dict()
    return json.loads(json.dumps(values))


class TestLayouts:
    @pytest.mark.parametrize(
        ("family", "layout"),
        [
            *(("sd1", layout) for layout in [*SINGLE_FILES, *FOLDERS]),
            ("sd2", "lightning.ckpt"),
            ("sd2", "old"),
            ("sdxl", "safetensors"),
            ("sdxl", "averaged.ckpt"),
            ("sdxl", "old"),
        ],
    )
    def test_has_the_tensors_of_the_folder(self, folders, tmp_path, family, layout):
        folder = folders[family]
        if layout in FOLDERS:
            path = FOLDERS[layout](folder, tmp_path / layout)
        else:
            options = SINGLE_FILES[layout]
            path = layouts.write_file(folder, tmp_path / f"model.{layout}", family, **options)
        expected = open_base(folder)
        base = open_base(path)
        assert (base.family, base.parts) == (family, expected.parts)
        for part in base.parts:
            assert equal(base.weights(part), expected.weights(part))
            assert base.sha256(part) == expected.sha256(part)
            assert equal(open_base(path).weights(part), expected.weights(part)), "opened again"

    @pytest.mark.parametrize("family", FAMILIES)
    def test_the_networks_compute_the_same(self, folders, tmp_path, family):
        """Numbers that no tensor shows: heads, activations, the sizes of SDXL."""
        file = layouts.write_file(folders[family], tmp_path / "model.safetensors", family)
        expected = open_base(folders[family])
        base = open_base(file)
        for part in base.parts:
            with torch.no_grad():
                ours = run(part, base.build(part))
                assert torch.equal(ours, run(part, expected.build(part)))

    @pytest.mark.parametrize("family", FAMILIES)
    def test_diffusers_reads_the_single_file_so(self, folders, tmp_path, family):
        """The layout is the real one: diffusers reads it, too."""
        from diffusers import AutoencoderKL, UNet2DConditionModel

        file = layouts.write_file(folders[family], tmp_path / "model.safetensors", family)
        base = open_base(file)
        for part, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
            theirs = kind.from_single_file(
                str(file), config=str(folders[family]), subfolder=part, local_files_only=True
            )
            assert equal(base.weights(part), theirs.state_dict())

    def test_the_averaged_weights_are_taken_and_that_is_said(self, folders, tmp_path):
        plain = open_base(layouts.write_file(folders["sd1"], tmp_path / "plain.ckpt"))
        file = layouts.write_file(folders["sd1"], tmp_path / "averaged.ckpt", averaged=True)
        base = open_base(file)
        assert "averaged weights" in " ".join(base.notes)
        assert "averaged weights" not in " ".join(plain.notes)
        last = torch.load(file, weights_only=True)["state_dict"][f"{layouts.UNET}out.2.bias"]
        taken = base.weights("unet")["conv_out.bias"]
        assert torch.equal(taken, plain.weights("unet")["conv_out.bias"])
        assert torch.equal(last, taken + 1)

    def test_half_precision_stays_as_stored(self, folders, tmp_path):
        folder = open_base(layouts.write_half_folder(folders["sd1"], tmp_path / "half"))
        path = layouts.write_file(folders["sd1"], tmp_path / "half.safetensors", half=True)
        file = open_base(path)
        full = open_base(folders["sd1"])
        for part in full.parts:
            half = {name: tensor.half() for name, tensor in full.weights(part).items()}
            assert equal(folder.weights(part), half)
            assert folder.sha256(part) == file.sha256(part) != full.sha256(part)
            dtypes = {tensor.dtype for tensor in folder.build(part).parameters()}
            assert dtypes == {torch.float32}
        assert file.build("vae", torch.float16).dtype == torch.float16

    def test_a_single_file_says_what_it_predicts_or_not(self, folders, tmp_path):
        empty = {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}
        file = layouts.write_file(folders["sdxl"], tmp_path / "xl.ckpt", "sdxl", extra=empty)
        assert (open_base(file).prediction, open_base(file).zero_snr) == ("v", True)
        file = layouts.write_file(folders["sd2"], tmp_path / "two.ckpt", "sd2")
        assert open_base(file).prediction is None

    def test_text_encoders_without_their_usual_prefix(self, folders, tmp_path):
        file = layouts.write_file(folders["sd1"], tmp_path / "model.safetensors")
        tensors = layouts.load_file(file)
        stripped = {
            n.replace("transformer.text_model.", "transformer."): tensors[n] for n in tensors
        }
        layouts.save_file(stripped, file)
        expected = open_base(folders["sd1"]).sha256("text_encoder")
        assert open_base(file).sha256("text_encoder") == expected

    def test_version_2_with_the_blocks_of_diffusers_alone(self, folders, tmp_path):
        file = layouts.write_file(folders["sd2"], tmp_path / "model.safetensors", "sd2")
        tensors = layouts.load_file(file)
        dropped = ("resblocks.23.", "text_projection", "logit_scale")
        kept = {name: tensors[name] for name in tensors if not any(d in name for d in dropped)}
        assert len(kept) == len(tensors) - 14
        layouts.save_file(kept, file)
        expected = open_base(folders["sd2"]).sha256("text_encoder")
        assert open_base(file).sha256("text_encoder") == expected


class TestPublishedConfigs:
    """What is read off the tensors of the real widths is what was published."""

    def read(self, part, given):
        config = complete_config(part, given)
        tensors = make_module(part, config).state_dict()
        if part == "unet":
            return config, tensors
        names = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
        if part.startswith("text"):
            tensors = {f"text_model.{name}": tensor for name, tensor in names.items()}
            if "text_projection.weight" in names:
                tensors["text_projection.weight"] = names["text_projection.weight"]
        return config, tensors

    @pytest.mark.parametrize("family", FAMILIES)
    def test_unet(self, family):
        levels = {
            "block_out_channels": [320, 640, 1280, 1280],
            "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
            "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
            "sample_size": 64,
        }
        given = {
            "sd1": {**levels, "cross_attention_dim": 768, "attention_head_dim": [8] * 4},
            "sd2": {
                **levels,
                "cross_attention_dim": 1024,
                "attention_head_dim": [5, 10, 20, 20],
                "use_linear_projection": True,
                "upcast_attention": True,
            },
            "sdxl": {
                "block_out_channels": [320, 640, 1280],
                "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
                "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
                "transformer_layers_per_block": [1, 2, 10],
                "cross_attention_dim": 2048,
                "attention_head_dim": [5, 10, 20],
                "use_linear_projection": True,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 2816,
                "sample_size": 128,
            },
        }[family]
        if family == "sd1":
            given["attention_head_dim"] = 8
        config, tensors = self.read("unet", given)
        assert complete_config("unet", read_unet_config(family, None, tensors, 1280)) == config

    def test_sd2_that_predicts_v_is_larger(self, folders):
        tensors = open_base(folders["sd2"]).weights("unet")
        assert read_unet_config("sd2", "v", tensors)["sample_size"] == 96
        assert read_unet_config("sd2", None, tensors)["sample_size"] == 64

    @pytest.mark.parametrize(("family", "factor"), [("sd1", 0.18215), ("sdxl", 0.13025)])
    def test_vae(self, family, factor):
        given = {
            "block_out_channels": [128, 256, 512, 512],
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
            "layers_per_block": 2,
            "scaling_factor": factor,
            "sample_size": 1024 if family == "sdxl" else 512,
        }
        config, tensors = self.read("vae", given)
        assert complete_config("vae", read_vae_config(family, tensors)) == config

    @pytest.mark.parametrize(
        ("family", "number", "width", "layers", "heads", "activation"),
        [
            ("sd1", 0, 768, 12, 12, "quick_gelu"),
            ("sd2", 0, 1024, 23, 16, "gelu"),
            ("sdxl", 0, 768, 12, 12, "quick_gelu"),
            ("sdxl", 1, 1280, 32, 20, "gelu"),
        ],
    )
    def test_text_encoder(self, family, number, width, layers, heads, activation):
        given = {
            "vocab_size": 49_408,
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "projection_dim": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "hidden_act": activation,
        }
        part = "text_encoder_2" if number else "text_encoder"
        config, tensors = self.read(part, given)
        assert complete_config(part, read_text_config(family, number, tensors)) == config


class TestBuild:
    def test_draws_no_random_numbers_and_leaves_nothing_empty(self, folders):
        before = torch.get_rng_state()
        base = open_base(folders["sdxl"])
        for part in base.parts:
            module = base.build(part)
            assert not module.training
            assert not any(tensor.is_meta for tensor in [*module.parameters(), *module.buffers()])
        assert torch.equal(before, torch.get_rng_state())

    @pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
    def test_training_does_not_reach_the_file(self, folders, tmp_path, suffix):
        base = open_base(layouts.write_file(folders["sd1"], tmp_path / f"model.{suffix}"))
        before = base.sha256("unet")
        with torch.no_grad():
            for parameter in base.build("unet").parameters():
                parameter.add_(1)
        assert base.sha256("unet") == before == open_base(base.path).sha256("unet")


class TestHash:
    def test_depends_on_names_dtypes_shapes_and_bytes_alone(self):
        one = {"a": torch.arange(6.0), "b": torch.ones(2, 3)}
        digest = hash_tensors(one)
        assert hash_tensors({"b": one["b"], "a": one["a"]}) == digest
        assert hash_tensors({"a": one["a"], "b": torch.ones(3, 2).T}) == digest
        others = [
            {"c": one["a"], "b": one["b"]},
            {"a": one["a"].half(), "b": one["b"]},
            {"a": one["a"], "b": one["b"].reshape(3, 2)},
            {"a": one["a"].nextafter(torch.tensor(9.0)), "b": one["b"]},
            {"a": one["b"], "b": one["a"]},
            {"a": one["a"]},
        ]
        digests = {hash_tensors(other) for other in others} | {digest}
        assert len(digests) == 1 + len(others)

    def test_takes_every_dtype_and_no_dimension(self):
        dtypes = (torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool)
        digests = {hash_tensors({"a": torch.tensor(1.0).to(dtype)}) for dtype in dtypes}
        assert len(digests) == len(dtypes)
        hash_tensors({"a": torch.empty(0)})


class TestAutoencoder:
    def test_of_every_kind_of_path(self, folders, tmp_path):
        pipeline = folders["sd1"]
        alone = {
            layouts.vae_name(name): tensor[:, :, None, None]
            if is_attention(name, tensor)
            else tensor
            for name, tensor in layouts.read_folder(pipeline)["vae"].items()
        }
        torch.save({"state_dict": {**alone, "loss.logvar": torch.zeros(())}}, tmp_path / "vae.ckpt")
        file = layouts.write_file(pipeline, tmp_path / "model.safetensors")
        expected = open_base(pipeline)
        for opened in (
            open_autoencoder(pipeline),
            open_autoencoder(pipeline / "vae"),
            open_autoencoder(file),
            open_autoencoder(tmp_path / "vae.ckpt", scaling_factor=0.18215),
        ):
            assert opened.parts == ("vae",)
            assert opened.sha256("vae") == expected.sha256("vae")
            assert opened.config("vae")["scaling_factor"] == 0.18215
            assert equal(opened.build("vae").state_dict(), expected.weights("vae"))
        with pytest.raises(ValueError, match=r"give scaling_factor=0\.18215 .* 0\.13025 for XL"):
            open_autoencoder(tmp_path / "vae.ckpt")

    def test_refuses_what_holds_none(self, folders, tmp_path):
        with pytest.raises(ValueError, match="CLIPTextModel; vae must be AutoencoderKL"):
            open_autoencoder(folders["sd1"] / "text_encoder")
        with pytest.raises(ValueError, match=r"config\.json is missing"):
            open_autoencoder(tmp_path)
        torch.save({"a": torch.zeros(2)}, tmp_path / "other.ckpt")
        with pytest.raises(ValueError, match="no autoencoder"):
            open_autoencoder(tmp_path / "other.ckpt")


def is_attention(name, tensor):
    return "attentions" in name and tensor.ndim == 2


class TestTokenizer:
    TEXT = "Two dogs, a cat"

    def test_of_a_folder_of_any_age(self, folders, tmp_path):
        old = open_base(layouts.write_old_folder(folders["sdxl"], tmp_path / "old"))
        base = open_base(folders["sdxl"])
        for number, pad in enumerate(["<|endoftext|>", "!"]):
            tokenizer = base.tokenizer(number)
            assert tokenizer.pad_token == pad
            options = {"padding": "max_length", "truncation": True}
            ids = tokenizer(self.TEXT, **options).input_ids
            assert len(ids) == 77
            assert old.tokenizer(number)(self.TEXT, **options).input_ids == ids

    def test_of_a_single_file_is_beside_it_or_in_open_clip(self, tmp_path, monkeypatch):
        merges = write_merges(tmp_path)
        build(tmp_path / "sd2", "sd2", vocabulary=merges)
        expected = open_base(tmp_path / "sd2").tokenizer(0)
        file = layouts.write_file(tmp_path / "sd2", tmp_path / "model.ckpt", "sd2")
        base = open_base(file)
        if find_merges() is None:
            with pytest.raises(ValueError, match="pip install --no-deps open-clip-torch"):
                base.tokenizer(0)
        monkeypatch.syspath_prepend(tmp_path)  # holds a package open_clip now
        monkeypatch.delitem(sys.modules, "open_clip", raising=False)
        assert find_merges() == merges
        found = base.tokenizer(0)
        assert found.pad_token == expected.pad_token == "!"
        assert len(found) == 49_408
        assert found(self.TEXT).input_ids == expected(self.TEXT).input_ids
        assert "open_clip" not in sys.modules

        content = torch.load(file, weights_only=True)
        name = f"{layouts.OPEN_CLIP['sd2']}token_embedding.weight"
        content["state_dict"][name] = content["state_dict"][name][:600].clone()
        torch.save(content, tmp_path / "small.ckpt")
        with pytest.raises(ValueError, match="knows 600 tokens and CLIP's tokenizer 49408"):
            open_base(tmp_path / "small.ckpt").tokenizer(0)
        shutil.copytree(tmp_path / "sd2" / "tokenizer", tmp_path / "tokenizer")
        with pytest.raises(ValueError, match="has 49408 tokens, and its text encoder knows 600"):
            open_base(tmp_path / "small.ckpt").tokenizer(0)
        shutil.rmtree(tmp_path / "open_clip")
        assert open_base(file).tokenizer(0)(self.TEXT).input_ids == expected(self.TEXT).input_ids

    def test_refuses_one_that_is_missing_broken_or_of_another_model(self, folder, tmp_path):
        edit(folder / "text_encoder" / "config.json", vocab_size=500)
        with pytest.raises(ValueError, match=r"has \d+ tokens, and its text encoder knows 500"):
            open_base(folder).tokenizer(0)
        (folder / "tokenizer" / "tokenizer.json").write_text("{")
        with pytest.raises(ValueError, match="holds no tokenizer of CLIP"):
            open_base(folder).tokenizer(0)
        shutil.rmtree(folder / "tokenizer")
        with pytest.raises(ValueError, match="misses the folder tokenizer"):
            open_base(folder).tokenizer(0)

    @pytest.mark.skipif(find_merges() is None, reason="needs open-clip-torch")
    def test_clip_is_known(self, tmp_path):
        build(tmp_path / "sd1")
        ids = open_base(tmp_path / "sd1").tokenizer(0)("a photo of a cat").input_ids
        assert ids == [49406, 320, 1125, 539, 320, 2368, 49407]


def write_merges(root):
    """Write a package with a file like CLIP's, of other merges."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    ends = letters + [f"{letter}</w>" for letter in letters]
    pairs = [f"{first} {second}" for first in letters for second in ends]
    text = "\n".join(["#version: 0.2", *pairs[: MERGES_USED + 100]])
    (root / "open_clip").mkdir()
    (root / "open_clip" / "__init__.py").write_text("raise RuntimeError('imported')")
    file = root / "open_clip" / "bpe_simple_vocab_16e6.txt.gz"
    file.write_bytes(gzip.compress(text.encode()))
    return file


class TestRefusals:
    def test_a_path_that_is_not_there(self, tmp_path):
        with pytest.raises(ValueError, match="nothing is not there: give a file"):
            open_base(tmp_path / "nothing")

    def test_a_name_of_the_hub(self):
        command = (
            "hf download runwayml/stable-diffusion-v1-5 --local-dir stable-diffusion-v1-5, and "
            "give the folder stable-diffusion-v1-5"
        )
        with pytest.raises(ValueError, match=command):
            open_base("runwayml/stable-diffusion-v1-5")
        with pytest.raises(ValueError, match="not there: give a file"):
            open_base("models/v1-5.ckpt")

    def test_folders_that_are_no_pipeline(self, folder, tmp_path):
        (tmp_path / "empty").mkdir()
        with pytest.raises(ValueError, match="misses unet, vae, text_encoder, scheduler"):
            open_base(tmp_path / "empty")
        with pytest.raises(ValueError, match="it is UNet2DConditionModel alone; give the folder"):
            open_base(folder / "unet")
        cached = tmp_path / "models--owner--name" / "snapshots" / "ab12"
        cached.mkdir(parents=True)
        with pytest.raises(ValueError, match=f"scheduler: give {cached}"):
            open_base(cached.parents[1])
        shutil.rmtree(folder / "unet")
        edit(folder / "model_index.json", _class_name="StableDiffusion3Pipeline")
        with pytest.raises(ValueError, match="misses unet: it is StableDiffusion3Pipeline"):
            open_base(folder)

    def test_another_unet(self, folder):
        config = folder / "unet" / "config.json"
        edit(config, in_channels=9)
        with pytest.raises(ValueError, match="takes 9 channels"):
            open_base(folder)
        edit(config, _class_name="UNet2DModel")
        with pytest.raises(ValueError, match="unet holds UNet2DModel; unet must be UNet2DCond"):
            open_base(folder)
        edit(config, _class_name="UNet2DConditionModel", in_channels=4, block_out_channels=[7])
        with pytest.raises(ValueError, match="UNet2DConditionModel does not take its config"):
            open_base(folder).weights("unet")
        config.write_text("{")
        with pytest.raises(ValueError, match=r"unet/config\.json cannot be read as JSON"):
            open_base(folder)

    def test_tensors_that_do_not_fit(self, folder):
        part = folder / "vae"
        (file,) = part.glob("*.safetensors")
        tensors = layouts.load_file(file)
        first = tensors.pop("encoder.conv_in.weight")
        save(tensors, part)
        with pytest.raises(ValueError, match=r"vae of .*sd1 misses encoder\.conv_in\.weight"):
            open_base(folder).weights("vae")
        save({**tensors, "encoder.conv_in.weight": first, "more": first.clone()}, part)
        with pytest.raises(ValueError, match="has more, which its network has not"):
            open_base(folder).sha256("vae")
        save({**tensors, "encoder.conv_in.weight": first[:, :2].contiguous()}, part)
        with pytest.raises(ValueError, match=r"conv_in\.weight is \(32, 2, 3, 3\), and its config"):
            open_base(folder).build("vae")

    def test_many_missing_tensors_make_a_short_list(self, folder):
        save({"conv_in.bias": torch.zeros(32)}, folder / "unet")
        with pytest.raises(ValueError, match=r"misses \S+, \S+, \S+ and \d+ more tensors: "):
            open_base(folder).weights("unet")

    def test_weights_that_are_not_there(self, folders, folder, tmp_path):
        (file,) = (folder / "unet").glob("*.safetensors")
        file.unlink()
        with pytest.raises(ValueError, match="unet holds no weights"):
            open_base(folder)
        sharded = layouts.write_sharded_folder(folders["sd1"], tmp_path / "sharded")
        shard = next((sharded / "vae").glob("*-00002-of-00002.safetensors"))
        shard.unlink()
        with pytest.raises(ValueError, match=f"names {shard.name}, which is missing"):
            open_base(sharded)

    def test_damaged_files(self, folder, tmp_path):
        for file in (
            *(folder / "unet").glob("*.safetensors"),
            layouts.write_file(folder, tmp_path / "a.safetensors"),
            layouts.write_file(folder, tmp_path / "a.ckpt"),
        ):
            file.write_bytes(file.read_bytes()[:100_000])
            base = folder if file.parent.name == "unet" else file
            with pytest.raises(WeightsFileError, match=file.name):
                open_base(base).weights("unet")

    @pytest.mark.parametrize(
        ("prefix", "match"),
        [
            ("first_stage_model.", r"misses vae \(first_stage_model\.\*\)"),
            (f"{layouts.UNET}time_embed.0.weight", r"misses time_embedding\.linear_1\.weight"),
            (f"{layouts.UNET}input_blocks.1.1.proj_in.weight", r"misses the tensor down_blocks\.0"),
            (f"{layouts.UNET}input_blocks.1.", r"has \S+input_blocks\.11\."),
            (f"{layouts.UNET}input_blocks.4.0.out_layers", "misses the tensor down_blocks.1"),
            ("model_ema.diffusion_modelout2bias", "misses model_ema.diffusion_modelout2bias"),
            ("first_stage_model.encoder.conv_in.weight", r"misses the tensor encoder\.conv_in"),
            ("cond_stage_model.transformer.text_model.embeddings.token", "misses the tensor text_"),
        ],
    )
    def test_single_files_without_some_tensors(self, folders, tmp_path, prefix, match):
        state = layouts.ldm_state(layouts.read_folder(folders["sd1"]), "sd1")
        layouts.add_average(state)
        missing = {name for name in state if name.startswith(prefix)}
        missing |= {layouts.averaged_name(name) for name in missing}
        assert missing & state.keys()
        kept = {name: tensor for name, tensor in state.items() if name not in missing}
        torch.save(kept, tmp_path / "part.ckpt")
        with pytest.raises(ValueError, match=match):
            read_all(tmp_path / "part.ckpt")

    def test_single_files_with_foreign_tensors(self, folders, tmp_path):
        for name in (f"{layouts.UNET}input_hint_block.0.weight", "first_stage_model.encoder.more"):
            extra = {name: torch.ones(2)}
            file = layouts.write_file(folders["sd1"], tmp_path / "more.ckpt", extra=extra)
            with pytest.raises(ValueError, match=f"has {name}, which Stable Diffusion"):
                read_all(file)
