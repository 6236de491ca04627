"""Compute what fine-tuning Stable Diffusion needs of a GPU's memory; nothing is measured.

    python benchmarks/memory.py        # prints the table of docs/guides/fine-tune.md

    memory = weights + gradients + optimizer + average + tensors kept for the backward pass

The networks are built on PyTorch's meta device, so that their tensors have shapes and no memory.
Kept tensors are counted by hooks of autograd; attention is counted as a kernel that keeps queries,
keys, values, its output and a number a row. Not counted: the CUDA context (about 0.5 GB), kernels'
workspaces and fragmentation.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.nn import functional as F

GIB = 2**30
CARDS = (8, 16, 24, 80)
RESERVE = 1.0  # GiB for the context, workspaces and fragmentation
ADAPTER = ("to_q", "to_k", "to_v", "to_out.0")
RANK = 16
# Numbers that the published configs have and the class's defaults have not.
NETWORKS = {
    "SD 1": (512, {"cross_attention_dim": 768}),
    "SD 2": (
        768,
        {
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True,
        },
    ),
    "SDXL": (
        1024,
        {
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            "use_linear_projection": True,
        },
    ),
}


class Attention(torch.autograd.Function):
    """The shapes of a fused attention, and what it keeps."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty(*q.shape[:-1], v.shape[-1], device=q.device, dtype=q.dtype)
        row = torch.empty(q.shape[:-1], device=q.device, dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, row)
        return out

    @staticmethod
    def backward(ctx, gradient):
        raise NotImplementedError("only the forward pass is counted")


class Kept:
    """Counts the bytes of the tensors that autograd keeps, each storage once."""

    def __init__(self, network: nn.Module) -> None:
        tensors = [*network.parameters(), *network.buffers()]
        self.seen = {tensor.untyped_storage()._cdata for tensor in tensors}
        self.alive: list[torch.Tensor] = []  # so that no storage's address is used again
        self.bytes = 0

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.alive.append(tensor)
            self.bytes += storage.nbytes()
        return tensor


@contextmanager
def fused_attention() -> Iterator[None]:
    before = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda q, k, v, *_, **__: Attention.apply(q, k, v)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = before


def build(options: dict) -> nn.Module:
    with torch.device("meta"):
        return UNet2DConditionModel(**options).train()


def kept_bytes(name: str, dtype: torch.dtype, *, checkpoint: bool) -> int:
    """Return the bytes that are kept for one image; with ``checkpoint`` with the largest block."""
    size, options = NETWORKS[name]
    network = build(options).to(dtype)
    blocks: list[int] = []
    if checkpoint:
        network.enable_gradient_checkpointing()
        plain = build(options).to(dtype)
        blocks = count(plain, size, options, dtype)[1]
    total, _ = count(network, size, options, dtype)
    return total + max(blocks, default=0)


def count(
    network: nn.Module, size: int, options: dict, dtype: torch.dtype
) -> tuple[int, list[int]]:
    """Return the bytes that are kept in all, and in each block that checkpointing recomputes."""
    kept = Kept(network)
    starts: list[int] = []
    blocks: list[int] = []
    for part in network.modules():
        if type(part).__name__ in ("ResnetBlock2D", "BasicTransformerBlock"):
            part.register_forward_pre_hook(lambda *_: starts.append(kept.bytes))
            part.register_forward_hook(lambda *_: blocks.append(kept.bytes - starts.pop()))
    with torch.device("meta"), fused_attention():
        x = torch.empty(1, 4, size // 8, size // 8, dtype=dtype)
        text = torch.empty(1, 77, options["cross_attention_dim"], dtype=dtype)
        added = {"text_embeds": torch.empty(1, 1280, dtype=dtype), "time_ids": torch.empty(1, 6)}
        with torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor):
            network(x, torch.zeros(1), text, added_cond_kwargs=added)
    return kept.bytes, blocks


def adapter_size(network: nn.Module) -> int:
    """Return the number of weights of an adapter of rank ``RANK``."""
    layers = [part for name, part in network.named_modules() if name.endswith(ADAPTER)]
    return sum(RANK * (part.in_features + part.out_features) for part in layers)


def rows() -> Iterator[tuple[str, str, float, float]]:
    """Yield network, way, GiB that are always needed, and GiB an image."""
    for name, (size, options) in NETWORKS.items():
        network = build(options)
        weights = sum(p.numel() for p in network.parameters())
        adapter = adapter_size(network)
        title = f"{name}, {size} px ({weights / 1e6:,.0f} M; adapter {adapter / 1e6:.1f} M)"
        # float32: weights, their average, gradients, and two moments of Adam
        trained = {"full": 20 * weights, "LoRA": 4 * weights + 20 * adapter}
        for way, fixed in trained.items():
            for checkpoint in (False, True):
                label = f"{way}, bf16-mixed" + (", checkpoint" if checkpoint else "")
                copies = 2 * weights  # autocast keeps bfloat16 copies of the weights during a pass
                image = kept_bytes(name, torch.bfloat16, checkpoint=checkpoint)
                yield title, label, (fixed + copies) / GIB, image / GIB
        for checkpoint in (False, True):
            label = "LoRA, base.dtype=bfloat16" + (", checkpoint" if checkpoint else "")
            image = kept_bytes(name, torch.bfloat16, checkpoint=checkpoint)
            yield title, label, (2 * weights + 20 * adapter) / GIB, image / GIB


def main() -> None:
    header = "| | fixed, GiB | an image, GiB | " + " | ".join(f"{c} GB" for c in CARDS) + " |"
    print(header)
    print("|" + "---|" * (3 + len(CARDS)))
    before = None
    for title, label, fixed, image in rows():
        if title != before:
            print(f"| **{title}** |" + " |" * (2 + len(CARDS)))
            before = title
        fits = [int(max(0.0, card * 1e9 / GIB - RESERVE - fixed) // image) for card in CARDS]
        cells = [str(n) if n else "-" for n in fits]
        print(f"| {label} | {fixed:.1f} | {image:.2f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
