"""The HTTP side: LitServe, and what it lacks.

A request is a function of its words, so when a worker dies, every request without an answer is
simply asked again; an answer that comes twice is dropped. LitServe itself starts the worker again.
"""

import asyncio
import json
import multiprocessing
import os
import signal
import threading
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from litserve import LitServer
from litserve.utils import LitAPIStatus, ResponseBufferItem, WorkerSetupStatus
from omegaconf import DictConfig
from typing_extensions import override

from sturdy.serving.records import Metrics, RequestLog
from sturdy.serving.words import Limits, Words, read_words
from sturdy.serving.worker import IDLE_S, Answer, Worker

BODY_BYTES = 64_000  # of a request
CONNECTIONS = 1000  # open at the same time
POLL_S = 0.25  # seconds between two looks at the workers
PAGE = Path(__file__).with_name("page.html")
REPLACED = ("/", "/predict")  # routes of LitServe, for which the server has its own
PAGE_RULES = (
    "default-src 'none'; connect-src 'self'; img-src blob: data:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'"
)


async def read_json(request: Request) -> Any:
    """Return the body of a request.

    Raises:
        ValueError: it is no JSON.
    """
    try:
        return json.loads(await request.body())
    except (ValueError, RecursionError):
        raise ValueError('the body must be JSON, such as {"seed": 1}') from None


class Server(LitServer):
    """Serves ``POST /draw``, ``/health``, ``/metrics``, ``/info`` and the page ``/``.

    Args:
        worker: draws.
        cfg: of the command.
        log: of the requests.
        facts: about the run, for the page, as JSON.
        banner: printed when requests are accepted.
    """

    def __init__(
        self, worker: Worker, cfg: DictConfig, log: RequestLog, facts: dict[str, Any], banner: str
    ) -> None:
        super().__init__(
            worker,
            accelerator="cpu",  # the worker chooses its device
            workers_per_device=cfg.serve.workers,
            timeout=False,  # ours counts the time of drawing, too
            restart_workers=True,
            max_payload_size=BODY_BYTES,
            disable_openapi_url=True,  # its page loads from the network
            model_metadata=facts,
        )
        self.options = cfg.serve
        self.limits = Limits(cfg.serve.max_steps, float(cfg.serve.max_guidance))
        self.metrics = Metrics()
        self.log = log
        self.banner = banner
        self.waiting = 0
        self.is_up = False
        self.monitor_internal = POLL_S
        self.uvicorn_graceful_timeout = cfg.serve.timeout
        routes = self.app.router.routes
        routes[:] = [route for route in routes if getattr(route, "path", "") not in REPLACED]
        protected = [Depends(self.setup_auth())]  # by LIT_SERVER_API_KEY, if it is set
        add = self.app.add_api_route
        add("/draw", self.draw, methods=["POST"], dependencies=protected, response_model=None)
        add("/metrics", self.show_metrics, dependencies=protected, response_model=None)
        add("/", self.show_page, response_model=None)

    async def draw(self, request: Request) -> Response:
        """Answer with a PNG file, or with a JSON object whose ``detail`` says what is wrong."""
        start = time.monotonic()
        words: Words | None = None
        try:
            words = read_words(await read_json(request), self.limits)
        except ValueError as error:
            answer = Answer(422, str(error).encode())
        else:
            answer = await self._answer(words)
        seconds = time.monotonic() - start
        self.metrics.count(answer, seconds)
        self.log.write(words, answer, seconds)
        headers = {"X-Step": str(answer.step)} if answer.step >= 0 else {}
        if answer.status == 200:
            return Response(answer.body, media_type="image/png", headers=headers)
        if answer.status == 503:
            headers["Retry-After"] = "1"
        return JSONResponse({"detail": answer.body.decode()}, answer.status, headers)

    async def _answer(self, words: Words) -> Answer:
        if self.waiting >= self.options.queue:
            return Answer(503, f"{self.waiting} requests wait already; try again".encode())
        self.waiting += 1
        try:
            async with asyncio.timeout(self.options.timeout):
                return await self._ask(words)
        except TimeoutError:
            return Answer(504, f"no answer in {self.options.timeout} s".encode())
        finally:
            self.waiting -= 1

    async def _ask(self, words: Words) -> Answer:
        """Ask a worker; when a worker was lost, ask again."""
        for attempt in range(self.options.retries + 1):
            if attempt:
                self.metrics.again.inc()
            uid = str(uuid.uuid4())
            item = ResponseBufferItem(asyncio.Event())
            self.response_buffer[uid] = item
            try:
                queue = self._get_request_queue(self.lit_api.api_path)
                queue.put((self.app.response_queue_id, uid, time.monotonic(), words))
                await item.event.wait()
            finally:
                del self.response_buffer[uid]
            if item.response is None:
                continue  # a worker was lost, perhaps with this request
            content, status = item.response
            if status == LitAPIStatus.OK:
                return content
            return Answer(500, b"the worker failed; its messages say why")
        return Answer(503, b"the worker was lost while it drew this, every time")

    async def show_metrics(self) -> Response:
        """Answer with the metrics, for Prometheus."""
        self.metrics.waiting.set(self.waiting)
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def show_page(self) -> Response:
        """Answer with the page to try it."""
        headers = {"Content-Security-Policy": PAGE_RULES, "X-Content-Type-Options": "nosniff"}
        return Response(PAGE.read_bytes(), media_type="text/html; charset=utf-8", headers=headers)

    @override
    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        async with super().lifespan(app):
            watch = asyncio.create_task(self._watch_workers())
            print(self.banner, flush=True)
            yield
            watch.cancel()

    async def _watch_workers(self) -> None:
        """Wake all requests when a worker is lost; end when the main process was killed."""
        main = multiprocessing.parent_process()
        ready: set[str] = set()
        while True:
            await asyncio.sleep(POLL_S)
            if main is not None and not main.is_alive():
                os.kill(self.manager_pid, signal.SIGKILL)
                os._exit(1)
            statuses = dict(self.workers_setup_status)
            lost = [name for name in ready if statuses[name] != WorkerSetupStatus.READY]
            ready = {name for name, s in statuses.items() if s == WorkerSetupStatus.READY}
            if not lost:
                continue
            self.metrics.lost.inc(len(lost))
            # The manager still waits on the dead worker's behalf, and may give it a request.
            await asyncio.sleep(2 * IDLE_S)
            print(f"a worker was lost; {self.waiting} requests are asked again", flush=True)
            for item in self.response_buffer.values():
                item.event.set()

    @override
    def _init_manager(self, num_api_servers: int) -> Any:
        manager = super()._init_manager(num_api_servers)
        self.manager_pid = manager._process.pid  # holds the queues
        main = os.getpid()

        def stop(number: int, frame: object) -> None:
            if os.getpid() != main:
                os._exit(0)  # the process of uvicorn, which repeats the signal when it is done
            if not self.is_up:
                raise KeyboardInterrupt
            # In another thread: this one is waiting for the event, over the same connection.
            threading.Thread(target=self._shutdown_event.set).start()

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
        return manager

    def serve(self) -> None:
        """Serve until SIGINT or SIGTERM; requests that wait then are answered first.

        Raises:
            ValueError: no worker could start.
        """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # for the manager, which inherits it
        options = {"log_level": "error", "generate_client_file": False, "num_api_servers": 1}
        host, port = self.options.host, self.options.port
        try:
            self.run(host, port, limit_concurrency=CONNECTIONS, **options)
        except KeyboardInterrupt:
            pass
        except RuntimeError:
            if self.is_up:
                raise
            raise ValueError("the worker could not start; its messages say why") from None
        finally:
            for process in multiprocessing.active_children():  # of a start that was interrupted
                process.kill()

    @override
    def _start_worker_monitoring(self, *args: Any, **kwargs: Any) -> None:
        super()._start_worker_monitoring(*args, **kwargs)
        self.is_up = True
