"""What to do when memory is short."""

from omegaconf import DictConfig


def describe_out_of_memory(error: BaseException, cfg: DictConfig) -> str:
    """Return the error in a line, and the settings that need less memory, one line each."""
    batch_size = cfg.data.batch_size
    shards = cfg.data.shards or 1
    advice = []
    finer = [n for n in range(2 * shards, batch_size + 1, shards) if batch_size % n == 0]
    if finer:
        advice.append(
            f"data.shards={finer[0]} (now {shards}) computes the batch in more and smaller parts, "
            f"of the same samples"
        )
    if cfg.backbone.get("checkpoint") is False:
        advice.append("backbone.checkpoint=true computes activations twice and keeps few")
    if cfg.data.num_workers:
        workers = cfg.data.num_workers
        advice.append(
            f"data.num_workers=0 (now {workers}) reads images without processes of their own"
        )
    if cfg.callbacks.get("samples"):
        n = cfg.callbacks.samples.n
        advice.append(f"callbacks.samples.n (now {n}) is how many images are drawn at once")
    advice.append(f"a smaller data.batch_size (now {batch_size}) or backbone is another run")
    first_line = str(error).split("\n")[0] or type(error).__name__
    return "\n    ".join([f"out of memory: {first_line}", *advice])
