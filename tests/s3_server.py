"""A real S3 server on loopback, in a process of its own, and a proxy in front that fails on demand.

    client -> Proxy -> moto's server, which keeps its objects in memory

Nothing leaves this machine. The credentials are dummies, which the server does not check.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from socket import create_connection
from typing import Any

from exact_resume.supervisor import signal_when_parent_dies
from s3_proxy import HOST, Proxy, flipped, free_port

BUCKET = "bucket"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "dummy",
    "AWS_SECRET_ACCESS_KEY": "dummy",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/nowhere",
    "AWS_SHARED_CREDENTIALS_FILE": "/nowhere",
}


class S3Server:
    """moto's server, started and with an empty bucket.

    Attributes:
        port: on loopback.
        proxy: what clients are to use.
    """

    def __init__(self) -> None:
        self.port = free_port()
        self._client: Any = None
        quiet = subprocess.DEVNULL
        words = [sys.executable, __file__, str(self.port)]
        self.process = subprocess.Popen(words, stdout=quiet, stderr=quiet)
        try:
            wait_for_port(self.port, self.process)
            self.client().create_bucket(Bucket=BUCKET)
            self.proxy = Proxy(self.port)
        except BaseException:
            self.process.kill()
            raise

    def environment(self) -> dict[str, str]:
        """Return the variables with which a client finds the server, through the proxy."""
        return CREDENTIALS | {"AWS_ENDPOINT_URL": self.proxy.url}

    def client(self) -> Any:
        """Return boto3's client of the server itself, past the proxy and its faults."""
        import boto3

        if self._client is None:
            self._client = boto3.client(
                "s3",
                endpoint_url=f"http://{HOST}:{self.port}",
                aws_access_key_id="dummy",
                aws_secret_access_key="dummy",
                region_name="us-east-1",
            )
        return self._client

    def keys(self, prefix: str = "") -> list[str]:
        """Return the names of the objects under ``prefix``."""
        listing = self.client().get_paginator("list_objects_v2")
        pages = listing.paginate(Bucket=BUCKET, Prefix=prefix)
        return [item["Key"] for page in pages for item in page.get("Contents", [])]

    def read(self, key: str) -> bytes:
        """Return an object as it is at rest."""
        body: bytes = self.client().get_object(Bucket=BUCKET, Key=key)["Body"].read()
        return body

    def write(self, key: str, body: bytes) -> None:
        """Replace an object, as another client can."""
        self.client().put_object(Bucket=BUCKET, Key=key, Body=body)

    def flip(self, key: str) -> None:
        """Flip a bit of an object at rest; the server then sums the wrong bytes itself."""
        self.write(key, flipped(self.read(key)))

    def close(self) -> None:
        """Stop both."""
        self.proxy.close()
        self.process.kill()
        self.process.wait()


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """Run a server for as long as the block lasts."""
    with closing(S3Server()) as server:
        yield server


def wait_for_port(port: int, process: subprocess.Popen[bytes], seconds: float = 60) -> None:
    """Return when something listens on ``port``."""
    deadline = time.monotonic() + seconds
    while True:
        with suppress(OSError):
            create_connection((HOST, port), 1).close()
            return
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"moto's server does not listen; it exited with {process.poll()}")
        time.sleep(0.05)


if __name__ == "__main__":
    from moto.server import main

    signal_when_parent_dies(signal.SIGKILL)
    main(["-H", HOST, "-p", sys.argv[1]])
