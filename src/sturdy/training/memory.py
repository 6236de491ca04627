"""Lack of memory, and which settings need less."""

from omegaconf import DictConfig

from exact_resume.failures import OutOfMemoryError


def out_of_memory(error: BaseException, cfg: DictConfig) -> OutOfMemoryError:
    """What ``error`` says in a line, and which of the settings in ``cfg`` need less memory."""
    b, v = cfg.data.batch_size, cfg.data.shards or 1
    help = [
        f"data.shards={more} (now {v}) computes the batch in more and smaller parts, of the same "
        f"samples"
        for more in [next((n for n in range(2 * v, b + 1, v) if b % n == 0), None)]
        if more
    ]
    if cfg.backbone.get("checkpoint") is False:
        help.append("backbone.checkpoint=true computes activations twice and keeps few")
    if cfg.data.num_workers:
        help.append(
            f"data.num_workers=0 (now {cfg.data.num_workers}) reads images without processes of "
            f"their own"
        )
    if cfg.callbacks.get("samples"):
        help.append(
            f"callbacks.samples.n (now {cfg.callbacks.samples.n}) is how many images are drawn at "
            f"once"
        )
    help.append(f"a smaller data.batch_size (now {b}) or backbone is another run")
    said = str(error).split("\n")[0] or type(error).__name__
    return OutOfMemoryError(f"out of memory: {said}\n    " + "\n    ".join(help))
