"""A proxy in front of an S3 server that fails on demand, also in the middle of a request."""

import http.client
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import SHUT_RDWR, SO_RCVBUF, SOL_SOCKET, socket
from typing import Any

HOST = "127.0.0.1"
BUFFER = 16 * 1024  # bytes that the kernel takes off the client's hands before the proxy reads
SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"
CHECKSUMS = ("x-amz-checksum", "x-amz-sdk-checksum", "x-amz-trailer", "content-md5")


@dataclass(frozen=True)
class Fault:
    """What the proxy does to the requests that it concerns.

    Attributes:
        kind: ``refuse`` connections; ``hang``: accept, and never answer; ``late``: the same, but
            do what was asked when the fault is over, whether or not the client still lives;
            ``slow``: ``rate`` bytes a second; ``full``: answer 503 SlowDown; ``flip`` a bit of the
            body, and drop its checksums; ``cut`` the connection in the middle of the body;
            ``forget``: do what is asked, and close the connection without an answer.
        methods: of HTTP. A refused connection has no method.
        match: a part of the path of the object.
        rate: bytes a second.
    """

    kind: str
    methods: tuple[str, ...] = ("GET", "HEAD", "PUT", "POST", "DELETE")
    match: str = ""
    rate: int = 0


class Proxy:
    """A proxy that can be told to fail at any time, also in the middle of a request.

    Args:
        target: the port of the server behind it.

    Attributes:
        fault: the fault now; None for none.
        requests: the method and the path of each request that arrived.
        under_way: those that were not answered yet, by number.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = free_port()
        self.url = f"http://{HOST}:{self.port}"
        self.fault: Fault | None = None
        self.requests: list[tuple[str, str]] = []
        self.under_way: dict[int, tuple[str, str]] = {}
        self.connections: set[socket] = set()
        self.listener: Listener | None = None
        self._listen()

    def switch(self, fault: Fault | None) -> None:
        """Fail like this from now on; None for not at all."""
        self.fault = fault
        if fault and fault.kind == "refuse":
            self.close()
        elif self.listener is None:
            self._listen()

    @contextmanager
    def failing(self, fault: Fault) -> Iterator[None]:
        """Fail like this for as long as the block lasts."""
        self.switch(fault)
        try:
            yield
        finally:
            self.switch(None)

    def fault_of(self, method: str, path: str) -> Fault:
        """Return the fault that concerns a request now; its kind is empty if there is none."""
        fault = self.fault
        if fault and method in fault.methods and fault.match in path:
            return fault
        return Fault("")

    def count(self, method: str, match: str = "") -> int:
        """Return how many requests of this kind have arrived."""
        return sum(m == method and match in path for m, path in list(self.requests))

    def is_busy(self, method: str, match: str = "") -> bool:
        """Return whether a request of this kind is under way."""
        return any(m == method and match in path for m, path in [*self.under_way.values()])

    def close(self) -> None:
        """Close the port and all connections."""
        if self.listener:
            self.listener.shutdown()
            self.listener.server_close()
            self.listener = None
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(SHUT_RDWR)

    def _listen(self) -> None:
        self.listener = Listener(self)
        threading.Thread(target=self.listener.serve_forever, args=(0.02,), daemon=True).start()


class Listener(ThreadingHTTPServer):
    """The proxy's open port; each connection has a thread."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy
        super().__init__((HOST, proxy.port), Handler, bind_and_activate=False)
        self.socket.setsockopt(SOL_SOCKET, SO_RCVBUF, BUFFER)
        self.server_bind()
        self.server_activate()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that are gone: they were killed."""


class Handler(BaseHTTPRequestHandler):
    """One connection of a client."""

    protocol_version = "HTTP/1.1"
    server: Listener

    def setup(self) -> None:
        super().setup()
        self.server.proxy.connections.add(self.connection)

    def finish(self) -> None:
        self.server.proxy.connections.discard(self.connection)
        super().finish()

    def answer(self) -> None:
        """Note a request, and forward it."""
        proxy, request = self.server.proxy, (self.command, self.path)
        proxy.requests.append(request)
        proxy.under_way[id(self)] = request
        try:
            self.forward()
        finally:
            del proxy.under_way[id(self)]

    def forward(self) -> None:
        """Pass one request to the server and its answer back, with the fault of the moment."""
        body = self._receive(int(self.headers.get("Content-Length") or 0))
        while self._fault().kind == "late":
            time.sleep(0.02)
        if body is None:
            return
        headers = dict(self.headers.items())
        if self._fault().kind == "full":
            self._send(503, {"Content-Type": "application/xml"}, SLOW_DOWN)
            return
        if self._fault().kind == "flip" and self.command in ("PUT", "POST") and body:
            body, headers = flipped(body), without_checksums(headers)
        with closing(http.client.HTTPConnection(HOST, self.server.proxy.target)) as upstream:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                upstream.putheader(name, value)
            upstream.endheaders(body)
            answer = upstream.getresponse()
            content = answer.read()
        headers = dict(answer.getheaders())
        if self._fault().kind == "flip" and self.command == "GET" and content:
            content, headers = flipped(content), without_checksums(headers)
        if self._fault().kind == "forget":
            self.close_connection = True
            return
        self._send(answer.status, headers, content)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def _fault(self) -> Fault:
        """Return the fault of the moment."""
        return self.server.proxy.fault_of(self.command, self.path)

    def _hangs(self) -> bool:
        """Return whether the request hung, when the fault is over; its client has long gone."""
        hung = False
        while self._fault().kind == "hang":
            hung = True
            time.sleep(0.02)
        return hung

    def _pieces(self, size: int) -> Iterator[int]:
        """Yield the sizes of the pieces of a body, as fast as the fault of the moment allows.

        It ends early, and the connection with it, where the fault cuts it.
        """
        done = 0
        while done < size:
            fault = self._fault()
            if self._hangs() or (fault.kind == "cut" and done >= size // 2):
                self.close_connection = True
                return
            piece = min(size - done, BUFFER)
            if fault.kind == "cut":
                piece = min(piece, size - size // 2)
            if fault.kind == "slow":
                piece = min(piece, max(1, fault.rate // 20))
                time.sleep(piece / fault.rate)
            yield piece
            done += piece

    def _receive(self, size: int) -> bytes | None:
        """Read a body of ``size`` bytes; None if the connection ended first."""
        body = b""
        for piece in self._pieces(size):
            body += self.rfile.read(piece)
        if len(body) < size:
            self.close_connection = True
            return None
        return body

    def _send(self, status: int, headers: dict[str, str], content: bytes) -> None:
        if self._hangs():
            self.close_connection = True
            return
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        length = headers.get("Content-Length", "0") if self.command == "HEAD" else len(content)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        done = 0
        for piece in self._pieces(len(content)):
            self.wfile.write(content[done : done + piece])
            done += piece


def flipped(body: bytes) -> bytes:
    """Return ``body`` with one bit of its middle flipped."""
    middle = len(body) // 2
    return body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]


def without_checksums(headers: dict[str, str]) -> dict[str, str]:
    """Return ``headers`` without the sums that would give a flipped bit away."""
    return {k: v for k, v in headers.items() if not k.lower().startswith(CHECKSUMS)}


def free_port() -> int:
    """Return a port of loopback that is free."""
    with socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port
