"""MNIST: reading, downloading, and errors of missing or damaged files."""

import fcntl
import gzip
import hashlib
import http.server
import signal
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from consensus.problem import DATASETS, DataUnavailableError

FILES = {
    "train-images-idx3-ubyte": 12,
    "train-labels-idx1-ubyte": 12,
    "t10k-images-idx3-ubyte": 5,
    "t10k-labels-idx1-ubyte": 5,
}


def pixel(i, row, column):
    return (7 * i + 28 * row + column) % 256


def idx_file(name):
    """The bytes of a tiny file of MNIST: labels 9, 0, 1, ...; pixels of a known pattern."""
    count = FILES[name]
    if "labels" in name:
        return struct.pack(">2i", 2049, count) + bytes((9 + i) % 10 for i in range(count))
    pixels = (pixel(i, r, c) for i in range(count) for r in range(28) for c in range(28))
    return struct.pack(">4i", 2051, count, 28, 28) + bytes(pixels)


def check_tiny(dataset):
    """Assert that a data set has the content of the tiny files."""
    for images, labels, count in (
        (dataset.train.inputs, dataset.train.targets, 12),
        (dataset.test.inputs, dataset.test.targets, 5),
    ):
        assert images.shape == (count, 1, 28, 28)
        assert images.dtype == torch.float32
        assert labels.dtype == torch.int64
        assert labels.tolist() == [(9 + i) % 10 for i in range(count)]
        assert float(images[4, 0, 3, 5]) == np.float32(pixel(4, 3, 5)) / np.float32(255)
        assert float(images.min()) == 0
        assert float(images.max()) == 1


@pytest.fixture
def raw(tmp_path):
    """The folder MNIST/raw under tmp_path with four tiny files."""
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name in FILES:
        (folder / name).write_bytes(idx_file(name))
    return folder


@pytest.fixture
def mirror(monkeypatch):
    """A server with the tiny files in place of the mirrors, which records its requests.

    `mirror.broken` holds the names that it truncates, `mirror.delay_s` slows it down.
    """
    packed = {f"{name}.gz": gzip.compress(idx_file(name)) for name in FILES}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.removeprefix("/")
            self.server.requests.append(name)
            time.sleep(self.server.delay_s)
            content = packed[name]
            if name in self.server.broken:
                content = content[:-20]
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.broken, server.delay_s = [], set(), 0.0
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}/"
    checksums = [(name, hashlib.md5(content).hexdigest()) for name, content in packed.items()]
    monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", [url])
    monkeypatch.setattr("torchvision.datasets.MNIST.resources", checksums)
    monkeypatch.setenv("no_proxy", "*")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def no_network(monkeypatch):
    """Mirrors whose names do not resolve: `.invalid` never does (RFC 2606)."""
    monkeypatch.setattr(
        "torchvision.datasets.MNIST.mirrors", ["https://mnist.invalid/", "http://mnist2.invalid/"]
    )
    monkeypatch.setenv("no_proxy", "*")


def unavailable(root):
    """The message of the error that `mnist(root)` must raise, which must be one line."""
    with pytest.raises(DataUnavailableError) as caught:
        DATASETS.make("mnist", root=str(root))
    message = str(caught.value)
    assert "\n" not in message
    assert "`data.root`" in message
    assert str(root.resolve() / "MNIST" / "raw") in message
    assert "data=digits" in message
    return message


def leftovers(root):
    """All files and folders below `root` except the lock."""
    return sorted(path.name for path in root.rglob("*") if path.name != ".mnist.lock")


def test_mnist_from_files(tmp_path, raw):
    check_tiny(DATASETS.make("mnist", root=str(tmp_path)))
    assert leftovers(tmp_path) == sorted(["MNIST", "raw", *FILES])
    assert not (tmp_path / ".mnist.lock").exists()


@pytest.mark.parametrize(
    ("folder", "rename", "packed"),
    [
        ("MNIST/raw", lambda name: f"{name}.gz", True),
        ("MNIST/raw", lambda name: name.replace("-idx", ".idx"), False),
        ("MNIST/raw", lambda name: name.replace("-idx", ".idx") + ".gz", True),
        (".", lambda name: name, False),
        (".", lambda name: f"{name}.gz" if "t10k" in name else name, None),
    ],
)
def test_mnist_in_the_shapes_in_which_people_have_it(tmp_path, no_network, folder, rename, packed):
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    for name in FILES:
        content, new = idx_file(name), rename(name)
        packing = new.endswith(".gz")
        assert packed in (None, packing)
        (tmp_path / folder / new).write_bytes(gzip.compress(content) if packing else content)
    before = sorted(tmp_path.rglob("*"))
    check_tiny(DATASETS.make("mnist", root=str(tmp_path)))
    assert sorted(tmp_path.rglob("*")) == before, "nothing is written"


@pytest.mark.parametrize(
    "damage", [lambda x: x[:-9], lambda x: b"no gzip", lambda x: x[:40] + b"a"]
)
def test_a_damaged_archive_is_named(tmp_path, raw, damage):
    path = raw / "t10k-labels-idx1-ubyte"
    path.unlink()
    archive = raw / f"{path.name}.gz"
    archive.write_bytes(damage(gzip.compress(bytes(100_000))))
    assert f"{archive} is damaged (" in unavailable(tmp_path)


def test_a_refusal_lists_what_is_there(tmp_path, no_network):
    assert f"({tmp_path / 'none'} has nothing)" in unavailable(tmp_path / "none")
    (tmp_path / "mnist.npz").touch()
    assert f"({tmp_path} has mnist.npz, none)" in unavailable(tmp_path)
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    assert f"({folder} has nothing)" in unavailable(tmp_path)
    for i in range(7):
        (folder / f"file{i}").touch()
    assert f"({folder} has file0, file1, file2, file3, file4 and 2 more)" in unavailable(tmp_path)
    (folder / "t10k-labels.idx1-ubyte.gz").touch()
    assert "(only t10k-labels.idx1-ubyte.gz)" in unavailable(tmp_path)


def test_mnist_from_files_needs_no_write_permission_and_no_lock(tmp_path, raw):
    with open(tmp_path / ".mnist.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as if a download were under way
        raw.chmod(0o555)
        check_tiny(DATASETS.make("mnist", root=str(tmp_path)))
        raw.chmod(0o755)


def test_mnist_root_may_be_relative(tmp_path, raw, monkeypatch):
    monkeypatch.chdir(tmp_path.parent)
    check_tiny(DATASETS.make("mnist", root=tmp_path.name))


def test_mnist_is_downloaded_quietly(tmp_path, mirror, capfd):
    root = tmp_path / "not" / "yet"
    check_tiny(DATASETS.make("mnist", root=str(root)))
    assert sorted(mirror.requests) == sorted(f"{name}.gz" for name in FILES)
    assert leftovers(root) == sorted(["MNIST", "raw", *FILES])
    assert capfd.readouterr() == ("", "")
    check_tiny(DATASETS.make("mnist", root=str(root)))
    assert len(mirror.requests) == 4


@pytest.mark.usefixtures("mirror")
def test_mnist_is_downloaded_on_its_own_file_system(tmp_path, monkeypatch):
    """Files cannot be moved into place from a temporary folder that lies elsewhere."""
    with monkeypatch.context() as patch:  # pytest itself needs temporary files later
        patch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
        check_tiny(DATASETS.make("mnist", root=str(tmp_path)))


def test_mnist_is_downloaded_once_per_node(tmp_path, mirror):
    mirror.delay_s = 0.05
    with ThreadPoolExecutor(4) as pool:  # the lock belongs to the open file: threads exclude, too
        datasets = list(pool.map(lambda _: DATASETS.make("mnist", root=str(tmp_path)), range(4)))
    for dataset in datasets:
        check_tiny(dataset)
    assert len(mirror.requests) == 4


def test_mnist_downloads_only_what_is_absent(tmp_path, raw, mirror):
    (raw / "t10k-labels-idx1-ubyte").unlink()
    check_tiny(DATASETS.make("mnist", root=str(tmp_path)))
    assert mirror.requests == ["t10k-labels-idx1-ubyte.gz"]


def test_mnist_takes_the_next_mirror(tmp_path, mirror, monkeypatch):
    import torchvision

    mirrors = ["http://mnist.invalid/", *torchvision.datasets.MNIST.mirrors]
    monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", mirrors)
    check_tiny(DATASETS.make("mnist", root=str(tmp_path)))


def test_a_broken_download_leaves_nothing_behind(tmp_path, mirror):
    mirror.broken = {"t10k-labels-idx1-ubyte.gz"}
    assert "wrong checksum of t10k-labels-idx1-ubyte.gz" in unavailable(tmp_path)
    assert leftovers(tmp_path) == []
    mirror.broken = set()
    check_tiny(DATASETS.make("mnist", root=str(tmp_path)))


def test_waiting_processes_report_the_failed_download(tmp_path, mirror):
    mirror.delay_s = 1.0  # time enough for all to be waiting
    mirror.broken = {"train-images-idx3-ubyte.gz"}
    with ThreadPoolExecutor(4) as pool:
        messages = list(pool.map(lambda _: unavailable(tmp_path), range(4)))
    assert len(set(messages)) == 1
    assert mirror.requests == ["train-images-idx3-ubyte.gz"]


def test_the_lock_of_a_killed_process_is_free(tmp_path, mirror):
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, sys, time; lock = open(sys.argv[1], 'w'); "
            "fcntl.flock(lock, fcntl.LOCK_EX); print('held', flush=True); time.sleep(60)",
            str(tmp_path / ".mnist.lock"),
        ],
        stdout=subprocess.PIPE,
    )
    with holder, ThreadPoolExecutor(1) as pool:
        assert holder.stdout.readline() == b"held\n"
        waiting = pool.submit(DATASETS.make, "mnist", root=str(tmp_path))
        time.sleep(0.2)
        assert not waiting.done()
        assert mirror.requests == []
        holder.send_signal(signal.SIGKILL)
        check_tiny(waiting.result(timeout=10))


@pytest.mark.usefixtures("no_network")
def test_no_network_is_one_line_within_seconds(tmp_path):
    start = time.monotonic()
    message = unavailable(tmp_path / "data")
    assert time.monotonic() - start < 10
    assert f"is {str(tmp_path / 'data')!r}" in message
    assert "mnist.invalid" in message
    assert leftovers(tmp_path / "data") == []


@pytest.mark.usefixtures("no_network")
def test_a_root_that_cannot_be_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be downloaded" in unavailable(tmp_path / "file")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:3],
        lambda content: content[:7],
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: b"<html>" + content[6:],
        lambda content: content[:2] + b"\x09" + content[3:],
        lambda content: content[:4] + struct.pack(">I", 2**32 - 1) + content[8:],
    ],
    ids=["empty", "magic", "header", "truncated", "longer", "html", "type", "count"],
)
def test_damaged_files_are_one_line(tmp_path, raw, name, damage):
    (raw / name).write_bytes(damage(idx_file(name)))
    message = unavailable(tmp_path)
    assert str(raw / name) in message
    assert "damaged" in message


def test_images_of_another_shape(tmp_path, raw):
    images = raw / "train-images-idx3-ubyte"
    images.write_bytes(struct.pack(">4i", 2051, 12, 14, 56) + images.read_bytes()[16:])
    assert str(images) in unavailable(tmp_path)


@pytest.mark.parametrize("split", ["train", "t10k"])
def test_files_that_do_not_belong_together(tmp_path, raw, split):
    labels = raw / f"{split}-labels-idx1-ubyte"
    labels.write_bytes(struct.pack(">2i", 2049, 3) + bytes([0, 1, 2]))
    assert "3 labels" in unavailable(tmp_path)
    count = FILES[labels.name]
    labels.write_bytes(struct.pack(">2i", 2049, count) + bytes([10] * count))
    assert "damaged" in unavailable(tmp_path)


def test_empty_files(tmp_path, raw):
    (raw / "train-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, 0, 28, 28))
    (raw / "train-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, 0))
    assert "0 images" in unavailable(tmp_path)


@pytest.mark.mnist
def test_real_mnist_is_what_torchvision_reads(mnist_root):
    import torchvision

    data = DATASETS.make("mnist", root=mnist_root)
    for images, labels, train in (
        (data.train.inputs, data.train.targets, True),
        (data.test.inputs, data.test.targets, False),
    ):
        reference = torchvision.datasets.MNIST(mnist_root, train=train, download=False)
        assert torch.equal((images[:, 0] * 255).round().to(torch.uint8), reference.data)
        assert torch.equal(labels, reference.targets)
        assert float(images.max()) == 1
    assert len(data.train) == 60_000
    # the mean and deviation of MNIST that everyone normalizes with
    assert float(data.train.inputs.mean()) == pytest.approx(0.1307, abs=1e-4)
    assert float(data.train.inputs.std()) == pytest.approx(0.3081, abs=1e-4)
    assert torch.bincount(data.train.targets).tolist() == [
        5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949,
    ]  # fmt: skip
