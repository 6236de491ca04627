"""Connections to other machines: the kernel ends those that are silent.

``tests/cluster`` takes the power of a machine away and sees the others notice.
"""

import os
import socket

import pytest

from exact_resume import distributed


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="only Linux lists its connections")
def test_each_connection_is_asked_whether_it_lives(monkeypatch):
    monkeypatch.setattr(distributed, "_store", object())
    server = socket.create_server(("127.0.0.1", 0))
    reader, writer = os.pipe()
    client = socket.create_connection(server.getsockname())
    accepted, _ = server.accept()
    before = len(os.listdir("/proc/self/fd"))
    assert client.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0
    distributed.keep_connections_alive()
    for end in (client, accepted):
        assert end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        silent = end.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
        silent += 4 * end.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL)
        assert silent == 60
        assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 60_000
        end.sendall(b"x")
    assert len(os.listdir("/proc/self/fd")) == before
    for end in (client, accepted, server):
        end.close()
    os.close(reader)
    os.close(writer)
