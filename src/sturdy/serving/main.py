"""The command ``serve.py``: checks everything, then starts the server."""

import importlib.util
import re
import shlex
import socket
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from sturdy.sampling.config import resolve_sampling
from sturdy.sampling.loaded_run import LoadedRun, check_integers, open_run, run_job
from sturdy.serving.checkpoint import with_values
from sturdy.training.captions import caption_option

PACKAGES = ("litserve", "prometheus_client")
HOSTS = ("127.0.0.1", "0.0.0.0", "::")  # that LitServe accepts
MINIMUMS = {
    "port": 1024,
    "workers": 1,
    "batch_size": 1,
    "queue": 1,
    "timeout": 1,
    "retries": 0,
    "max_steps": 1,
}
LARGEST_PORT = 65535
LOG = "serve.jsonl"  # in the run's directory
QUOTES = re.compile(r"^([^=]+)=(['\"])(.*)\2$")  # the command line quotes text for Hydra
# Words that sample.py must be given, too.
SAME = (
    *("run", "paths.", "base", "space.", "condition.", "sampler", "guidance.", "trust", "device"),
    "threads",
)


def main(cfg: DictConfig, overrides: list[str]) -> int:
    """Serve a run until a signal; return the exit code."""
    return run_job(lambda cfg: serve_run(cfg, overrides), cfg)


def serve_run(cfg: DictConfig, overrides: list[str]) -> None:
    """Serve the run.

    Raises:
        ValueError, OSError, ResumeRefusedError, NoValidCheckpointError: with what to do.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"serve.py needs {' and '.join(missing)}: pip install 'sturdy-diffusion[serve]'"
        )
    check_options(cfg)
    # On the CPU, so that the memory of the GPU is the worker's.
    run = open_run(with_values(cfg, {"device": "cpu"}))
    facts = describe_run(cfg, run, overrides)
    directory = run.directory
    del run
    from sturdy.serving.records import RequestLog
    from sturdy.serving.server import Server
    from sturdy.serving.worker import Worker

    log = RequestLog(Path(cfg.serve.log or directory / LOG))
    host = "127.0.0.1" if cfg.serve.host == "127.0.0.1" else socket.gethostname()
    banner = f"{directory} is served at http://{host}:{cfg.serve.port}; Ctrl-C ends it"
    if cfg.serve.host != "127.0.0.1":
        banner += (
            f"\nwarning: serve.host={cfg.serve.host} lets everyone draw who can reach this machine"
        )
    Server(Worker(cfg, directory), cfg, log, facts, banner).serve()


def check_options(cfg: DictConfig) -> None:
    """Check the options ``serve.*``.

    Raises:
        ValueError: naming the key.
        OSError: the port is in use.
    """
    options = cfg.serve
    check_integers(options, MINIMUMS, "serve.")
    if options.host not in HOSTS:
        raise ValueError(f"serve.host={options.host} must be one of {', '.join(HOSTS)}")
    guidance = options.max_guidance
    if not isinstance(guidance, int | float) or isinstance(guidance, bool) or not guidance >= 0:
        raise ValueError(f"serve.max_guidance={guidance} must be a number of at least 0")
    if not isinstance(options.exact, bool):
        raise ValueError(f"serve.exact={options.exact} must be true or false")
    if options.port > LARGEST_PORT:
        raise ValueError(f"serve.port={options.port} must be at most {LARGEST_PORT}")
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((options.host, options.port))
        except OSError as error:
            raise OSError(
                f"serve.port={options.port} cannot be used ({error.strerror}); choose another one"
            ) from None


def describe_run(cfg: DictConfig, run: LoadedRun, overrides: list[str]) -> dict[str, Any]:
    """Return what the page shows, as JSON: the classes, the limits and the command.

    Raises:
        ValueError: the settings of the sampler make no sense.
    """
    settings = resolve_sampling(cfg, run.config, state=run.point.state, trust=run.trust)
    settings.make_sampler()
    same = [QUOTES.sub(r"\1=\3", word) for word in overrides if word.startswith(SAME)]
    return {
        "run": run.directory.name,
        "size": run.config["data"]["image_size"],
        "classes": list(run.config["classes"]),
        "captions": caption_option(run.module) is not None,
        "steps": settings.sampler.get("steps"),
        "guidance": settings.guidance.get("scale"),
        "max_steps": cfg.serve.max_steps,
        "max_guidance": cfg.serve.max_guidance,
        "command": shlex.join(["python", "sample.py", *same]),
    }
