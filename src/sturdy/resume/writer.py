"""Lightning's saves and loads, carried out by the store.

Whatever asks the Trainer for a checkpoint ends here; the path it names, ``.../step-00000500/state.ckpt``, is committed
as a whole directory with its manifest, or not at all.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import CheckpointIO

from sturdy.resume.store import Store, load_state


class StoreIO(CheckpointIO):
    """A CheckpointIO plugin on ``store``.

    Args:
        facts: what goes into the manifest of a checkpoint beside its step (position, fingerprint).
    """

    def __init__(self, store: Store, facts: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> None:
        self.store, self.facts = store, facts

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Commit ``checkpoint`` under its step."""
        step = checkpoint["global_step"]
        if Path(path) != self.store.state(step):
            raise ValueError(f"a checkpoint of step {step} belongs at {self.store.state(step)}, not at {path}")
        self.store.commit(step, checkpoint, **self.facts(checkpoint))

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Tensors and primitives only, whatever ``weights_only`` says; the entry was verified before."""
        return load_state(Path(path), map_location or "cpu")

    def remove_checkpoint(self, path: Any) -> None:
        """Deleting is the store's (``Store.prune``), and never a side effect of a save."""
