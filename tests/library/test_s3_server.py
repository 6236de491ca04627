"""The S3 server of the tests is one, and its proxy fails as it is told to."""

import os
import threading
import time

import pytest

from s3_proxy import Fault, flipped
from s3_server import BUCKET, s3_server

pytest.importorskip("moto")
s3fs = pytest.importorskip("s3fs")
aiohttp = pytest.importorskip("aiohttp")
botocore = pytest.importorskip("botocore.exceptions")

# Not every error of s3fs is an OSError: a refused connection and a cut body are not.
ERRORS = (OSError, botocore.BotoCoreError, aiohttp.ClientError)
BODY = os.urandom(300_000)


@pytest.fixture(scope="module")
def server():
    with s3_server() as server:
        yield server


@pytest.fixture
def files(server):
    """A client that goes through the proxy, and asks once."""
    return s3fs.S3FileSystem(
        key="dummy",
        secret="dummy",
        endpoint_url=server.proxy.url,
        use_listings_cache=False,
        skip_instance_cache=True,
        config_kwargs={"retries": {"max_attempts": 0}, "read_timeout": 1, "connect_timeout": 1},
    )


def test_what_is_written_is_read_and_a_name_is_given_once(server, files):
    files.pipe(f"{BUCKET}/once/a", BODY)
    assert files.cat(f"{BUCKET}/once/a") == BODY
    assert server.keys("once") == ["once/a"]
    with pytest.raises(FileExistsError):
        files.pipe(f"{BUCKET}/once/a", b"other", mode="create")
    assert server.read("once/a") == BODY
    with pytest.raises(FileNotFoundError):
        files.cat(f"{BUCKET}/once/b")


@pytest.mark.parametrize("kind", ["refuse", "hang", "full", "cut"])
def test_a_fault_is_an_error_and_passes(kind, server, files):
    files.retries = 1  # s3fs's own, on top of botocore's
    with server.proxy.failing(Fault(kind)), pytest.raises(ERRORS):
        files.pipe(f"{BUCKET}/{kind}/a", BODY)
    assert server.keys(kind) == []
    files.pipe(f"{BUCKET}/{kind}/a", BODY)
    with server.proxy.failing(Fault(kind, ("GET",))), pytest.raises(ERRORS):
        files.cat(f"{BUCKET}/{kind}/a")
    assert files.cat(f"{BUCKET}/{kind}/a") == BODY


def test_an_answer_is_lost_after_the_object_was_stored(server, files):
    files.retries = 1
    with server.proxy.failing(Fault("forget", ("PUT",))), pytest.raises(ERRORS):
        files.pipe(f"{BUCKET}/forget/a", BODY)
    assert server.read("forget/a") == BODY


def test_a_request_arrives_after_its_client_has_given_up(server, files):
    files.retries = 1
    with server.proxy.failing(Fault("late", ("PUT",))), pytest.raises(ERRORS):
        files.pipe(f"{BUCKET}/late/a", BODY)
    while not server.keys("late"):
        time.sleep(0.01)
    assert server.read("late/a") == BODY


def test_lies_pass_every_check_of_the_client_and_of_the_server(server, files):
    with server.proxy.failing(Fault("flip", ("PUT",), "lie/a")):
        files.pipe(f"{BUCKET}/lie/a", BODY)
        files.pipe(f"{BUCKET}/lie/b", BODY)
    assert server.read("lie/a") == flipped(BODY)
    assert server.read("lie/b") == BODY
    with server.proxy.failing(Fault("flip", ("GET",), "lie/b")):
        assert files.cat(f"{BUCKET}/lie/b") == flipped(BODY)
    server.flip("lie/b")
    assert files.cat(f"{BUCKET}/lie/b") == flipped(BODY)


def test_a_slow_transfer_is_under_way_until_it_is_let_go(server, files):
    server.proxy.switch(Fault("slow", rate=1000))  # it would take five minutes
    thread = threading.Thread(target=files.pipe, args=(f"{BUCKET}/slow/a", BODY))
    thread.start()
    while not server.proxy.count("PUT", "slow/a"):
        time.sleep(0.01)
    assert server.keys("slow") == []
    server.proxy.switch(None)
    thread.join(30)
    assert server.read("slow/a") == BODY
