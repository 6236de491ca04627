"""Images in shards in a bucket: read by ranges, also in data workers, while the network fails."""

import threading

import pytest
from test_datamodule import Steps, batches, equal
from test_stream import OPTIONS, draw, make_shards, opened, place_of, stream

from s3_proxy import Fault
from s3_server import BUCKET, s3_server
from sturdy.data.datamodule import folder_data
from sturdy.data.shard_store import ShardError
from sturdy.data.shards import main
from sturdy.data.stream import StreamData

for package in ("webdataset", "s3fs", "moto", "flask"):
    pytest.importorskip(package, reason=f"{package} is not installed")


@pytest.fixture
def bucket(monkeypatch):
    with s3_server() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.mark.slow
def test_a_bucket_is_read_as_the_folder(bucket, tmp_path):
    for k in range(24):
        draw(tmp_path / "photos" / "ab"[k % 2] / f"{k:02d}.png", k)
    shards = make_shards(tmp_path / "photos", tmp_path / "shards")
    for path in [*shards.glob("*.tar"), shards / "index.npz"]:
        bucket.write(f"set/{path.name}", path.read_bytes())
    url = f"s3://{BUCKET}/set"
    expected = batches(opened(folder_data, tmp_path / "photos"), 8)

    def remote(**options):
        """As ``opened``, whose cache lies beside the root."""
        data = StreamData(root=url, cache=tmp_path / "cache", **(OPTIONS | options))
        data.trainer = Steps()
        data.open()
        return data

    data = remote()
    assert equal(batches(data, 8), expected)
    # Forked after this process has connected: workers must connect anew.
    assert equal(batches(remote(num_workers=2), 8), expected)

    with bucket.proxy.failing(Fault("cut", methods=("GET",), match=".tar")):
        threading.Timer(1.0, lambda: bucket.proxy.switch(None)).start()
        assert equal(batches(data, 3), expected[:3])

    out = tmp_path / "index"  # an index of a bucket that is only read
    assert main(["index", url, str(out)]) == 0
    bucket.write("set/index.npz", (out / "index.npz").read_bytes())
    assert equal(batches(remote(), 3), expected[:3])

    shard, offset, size = place_of(shards, "b/05.png")
    content = bytearray(shard.read_bytes())
    content[offset + size // 2] ^= 1
    bucket.write(f"set/{shard.name}", bytes(content))
    with pytest.raises(ShardError, match="is not what the index says"):
        stream(data)
    bucket.client().delete_object(Bucket=BUCKET, Key=f"set/{shard.name}")
    with pytest.raises(ShardError, match=f"the shard {shard.name} is gone"):
        stream(data)
