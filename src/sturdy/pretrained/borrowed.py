"""A network of diffusers as a backbone: pretrained or not, trained whole or through an adapter.

    f(x_t, t, condition) = network(x_t, timestep(t), condition).sample

    timestep = 1000 t - 1       under a chain of betas, whose steps diffusers counts from 0
    timestep = 1000 sigma(t)    where alpha + sigma = 1, as in rectified flow

A base is a network of a file. Where an adapter is trained, the base stays as it is: its tensors
are left out of ``state_dict``, named by their SHA-256, and read from the file again.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from exact_resume.weights_file import open_weights
from sturdy.diffusion.schedule import STEPS, Schedule
from sturdy.diffusion.target import Target, coefficients_at
from sturdy.pretrained.lora import MARK, LoRA, original_name

# The classes of diffusers that a config may name; a checkpoint can choose no other code.
NETWORKS = ("UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROUNDING = 1e-3  # of 1000 t in float32; a step that is whole up to this is made whole
MAX_NAMES = 5  # of tensors in an error message


@dataclass(frozen=True)
class BaseOfNetwork:
    """Where the weights of a pretrained network are, and what they are.

    Args:
        path: a folder of diffusers, or a single file.
        sha256: of the tensors, as ``sturdy.pretrained.base`` computes it; not of the file.
        part: of the base.
        dtype: in which the network keeps them: ``float32`` or ``bfloat16``.

    Raises:
        ValueError: ``dtype`` is none of these.
    """

    path: str
    sha256: str
    part: str = "unet"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"base.dtype={self.dtype} must be one of {', '.join(DTYPES)}")


class Borrowed(nn.Module):
    """A network of diffusers, with the contract of every backbone.

    Its weights are random until ``load_base`` or a checkpoint replaces them.

    Args:
        network: name of its class, one of ``NETWORKS``.
        config: its arguments, as in the ``config.json`` of a folder of diffusers.
        base: arguments of ``BaseOfNetwork``; None to train from scratch.
        lora: arguments of ``LoRA``; None to train the network itself.
        checkpoint: gradient checkpointing: less memory, about a third more time.

    Raises:
        ValueError: the class is not one of these, or the arguments do not go together.
    """

    def __init__(
        self,
        *,
        network: str,
        config: Mapping[str, Any] | None,
        base: Mapping[str, Any] | None = None,
        lora: Mapping[str, Any] | None = None,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.base = BaseOfNetwork(**base) if base else None
        if lora and self.base is None:
            raise ValueError("lora: an adapter needs a base; give base, or train without lora")
        if self.base and self.base.dtype != "float32" and not lora:
            raise ValueError(
                f"base.dtype={self.base.dtype} is for a base that stays as it is, under lora; "
                f"training needs float32 weights: for speed use trainer.precision=bf16-mixed"
            )
        self.kind = network
        self.network = build_network(network, config)
        self.is_flow = False
        self.frozen: frozenset[str] = frozenset()
        self.is_base_loaded = not lora
        if lora:
            LoRA(**lora).add_to(self.network)
            assert self.base is not None
            self._freeze(DTYPES[self.base.dtype])
        if checkpoint:
            self.network.enable_gradient_checkpointing()
        self.register_state_dict_post_hook(_leave_out_frozen)
        self.register_load_state_dict_pre_hook(_keep_frozen)

    def forward(self, x: Tensor, t: Tensor, *arguments: Tensor | None) -> Tensor:
        """Return the prediction, ``(b, c, h, w)``, in the dtype of ``x``.

        Args:
            x: ``(b, c, h, w)``.
            t: ``(b,)`` in [0, 1].
            *arguments: for UNet2DConditionModel the embeddings of a text ``(b, n, d)``, and for
                SDXL the pooled embedding ``(b, d')`` and the sizes ``(b, 6)``; for the others the
                label ``(b,)``, or None without classes.

        Raises:
            ValueError: the network takes no such condition.
            RuntimeError: the base of an adapter was not loaded.
        """
        if not self.is_base_loaded:
            raise RuntimeError("the base of this adapter was not loaded: call load_base() first")
        dtype = self.network.dtype
        keywords = self._condition(arguments, dtype)
        prediction = self.network(x.to(dtype), self.timestep(t), **keywords).sample
        return prediction[:, : x.shape[1]].to(x.dtype)  # a DiT may predict a variance, too

    def set_schedule(self, schedule: Schedule, target: Target) -> None:
        """Choose the timestep that the network gets; a ``Denoiser`` calls this.

        Raises:
            ValueError: ``target`` gives the network something else than t.
        """
        if type(target).inputs is not Target.inputs:
            raise ValueError(
                f"{self.kind} expects a time, and target=preconditioned gives it a noise level; "
                f"choose target=noise, target=v or target=velocity"
            )
        sums = [sum(coefficients_at(schedule, t)) for t in (0.25, 0.5, 0.75)]
        self.is_flow = all(abs(total - 1) < 1e-6 for total in sums)
        self.schedule = schedule

    def timestep(self, t: Tensor) -> Tensor:
        """Return the time ``(b,)`` as the network knows it, float32 in [0, 1000]."""
        if self.is_flow:
            return STEPS * self.schedule(t)[1]
        steps = (STEPS * t - 1).clamp(min=0)
        whole = steps.round()
        return torch.where((steps - whole).abs() < ROUNDING, whole, steps)

    def frozen_names(self) -> frozenset[str]:
        """Return the names of the tensors that only ``load_base`` has, and no checkpoint."""
        return self.frozen

    def load_base(self, *, fresh: bool) -> None:
        """Load the weights of the base, if there is one.

        Args:
            fresh: whether no checkpoint follows. If one does, only what is frozen is needed.

        Raises:
            ValueError: the base is missing, has changed or is of another network.
        """
        if self.base is None or not (fresh or self.frozen):
            return
        weights, sha256 = read_base(self.base.path, self.base.part)
        if sha256 != self.base.sha256:
            raise ValueError(
                f"path={self.base.path}: the weights of its {self.base.part} have changed. "
                f"Expected SHA-256 {self.base.sha256}, found {sha256}. Give the file that the run "
                f"began with, or start another run: name=..."
            )
        own = {}
        for name, tensor in self.network.state_dict().items():
            if MARK not in name:
                own[original_name(name)] = tensor
        differing = [
            name
            for name in sorted(own.keys() | weights.keys())
            if name not in own or name not in weights or own[name].shape != weights[name].shape
        ]
        if differing:
            raise ValueError(
                f"path={self.base.path}: its {self.base.part} is of another network than config "
                f"says. What differs: {', '.join(differing[:MAX_NAMES])}"
            )
        for name, tensor in own.items():
            tensor.copy_(weights[name])
        self.is_base_loaded = True

    def _freeze(self, dtype: torch.dtype) -> None:
        names = [name for name in self.network.state_dict() if MARK not in name]
        self.frozen = frozenset(f"network.{name}" for name in names)
        for name, parameter in self.network.named_parameters():
            if MARK not in name:
                parameter.requires_grad_(False)
                parameter.data = parameter.data.to(dtype)

    def _condition(
        self, arguments: Sequence[Tensor | None], dtype: torch.dtype
    ) -> dict[str, Tensor | dict[str, Tensor] | None]:
        """Return the condition as keywords of the network."""
        first, *others = arguments
        if self.kind != "UNet2DConditionModel":
            if others:
                raise ValueError(f"{self.kind} cannot be told how images were augmented")
            is_dit = self.kind == "DiTTransformer2DModel"
            if (is_dit or self.network.class_embedding is not None) != (first is not None):
                has = "no classes" if first is None else "classes"
                argument = "num_embeds_ada_norm" if is_dit else "num_class_embeds"
                raise ValueError(f"the data have {has}, but {argument} of {self.kind} disagrees")
            return {"class_labels": first}
        if first is None or first.ndim != 3:
            raise ValueError(
                f"{self.kind} needs the embeddings of a text (b, n, d): condition=captions"
            )
        if not others:
            return {"encoder_hidden_states": first.to(dtype)}
        pooled, sizes = others
        assert pooled is not None
        assert sizes is not None
        # bfloat16 would round the sizes; the network embeds them in float32
        added = {"text_embeds": pooled.to(dtype), "time_ids": sizes}
        return {"encoder_hidden_states": first.to(dtype), "added_cond_kwargs": added}


def build_network(kind: str, config: Mapping[str, Any] | None) -> Any:
    """Return a network of diffusers with random weights from PyTorch's default generator.

    Raises:
        ValueError: ``kind`` is none of ``NETWORKS``, or cannot be built from ``config``.
    """
    if kind not in NETWORKS:
        raise ValueError(f"network={kind} must be one of {', '.join(NETWORKS)}")
    if not config:
        raise ValueError(f"config: give the arguments of {kind}, as in the config.json of a folder")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when diffusers is imported
    try:
        import diffusers
    except ImportError:
        raise ValueError(
            f"network={kind} is of diffusers, which is not installed: "
            f"pip install 'sturdy-diffusion[latent]'"
        ) from None
    arguments = {name: value for name, value in config.items() if not name.startswith("_")}
    try:
        built = getattr(diffusers, kind).from_config(arguments)
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"config: {kind} cannot be built from it: {reason}") from None
    for part in built.modules():
        if hasattr(part, "dropout_prob"):  # of labels; the objective drops them
            part.dropout_prob = 0.0
    return built


def _leave_out_frozen(
    module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any
) -> None:
    assert isinstance(module, Borrowed)
    for name in module.frozen:
        state.pop(prefix + name, None)


def _keep_frozen(module: nn.Module, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    """Give ``load_state_dict`` the frozen tensors, which no checkpoint has, as they are."""
    assert isinstance(module, Borrowed)
    for name, tensor in module.network.state_dict(prefix=f"{prefix}network.").items():
        if name.removeprefix(prefix) in module.frozen:
            state[name] = tensor


def read_base(path: str, part: str) -> tuple[Mapping[str, Tensor], str]:
    """Return the weights of a part of a base by name, and their SHA-256.

    Args:
        path: of a Stable Diffusion; or of a folder of diffusers that holds ``part`` alone.
        part: its name.

    Raises:
        ValueError: there is no such part.
    """
    from sturdy.pretrained.base import hash_tensors, open_base
    from sturdy.pretrained.folder import find_weights

    if not Path(path).expanduser().exists():
        raise ValueError(f"path={path} is not there. If it was moved, give its new place")
    folder = Path(path).expanduser() / part
    if folder.is_dir() and not (folder.parent / "vae").is_dir():
        tensors: dict[str, Tensor] = {}
        for file in find_weights(folder):
            tensors |= open_weights(file).tensors
        return tensors, hash_tensors(tensors)
    base = open_base(path)
    return base.weights(part), base.sha256(part)
