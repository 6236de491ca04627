"""Print the steps of the run HOME that each machine has saved, as JSON, after verifying them."""

import json
import sys
from collections import defaultdict
from pathlib import Path

from exact_resume.checkpoint.reading import load_state
from exact_resume.checkpoint.store import Store

store = Store(Path(sys.argv[1]) / "checkpoints")
saved = defaultdict(list)
for step in store.steps():
    store.verify(step)
    saved[load_state(store.state(step))["state_dict"]["host"]].append(step)
print(json.dumps(saved))
