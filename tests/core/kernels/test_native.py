"""native.c against NumPy, whose operations are rounded one by one, and the choice of it."""

import logging
import math
import os
import shutil
import stat
import subprocess

import numpy as np
import pytest
import torch
from torch import nn

from consensus import Coupling
from consensus.core.flat import FlatLayout
from consensus.core.kernels import native, native_together
from consensus.core.kernels.native_kernel import Native
from consensus.core.kernels.native_together import NativeLinear, NativeRadial, NativeSeparable
from consensus.core.kernels.together import LinearTogether, RadialTogether
from consensus.core.layerwise import Layerwise
from consensus.core.parameters import FlatParameters
from consensus.core.potentials import POTENTIALS
from consensus.server import Server, digest
from tests.testing.two_layers import backward, two_layers

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
SIZES = [(1,), (2, 1, 15), (16, 17), (1023, 1025), (1024,), (3, 2048, 5000)]  # of layers
TYPES = [torch.float32, torch.float64]


class Memory:
    """Parameters at addresses that are aligned to nothing but their type, u and z as arrays."""

    def __init__(self, sizes, dtype, scale=1.0, values=()):
        random = np.random.default_rng(len(sizes))
        self.n, self.dtype = sum(sizes), dtype
        self.model = nn.ParameterList()
        for size in sizes:
            own = torch.zeros(size + 1, dtype=dtype)[1:]
            self.model.append(nn.Parameter(own))
        self.layout = FlatLayout.trainable(self.model, [[str(i)] for i in range(len(sizes))])
        u, z, p, total = random.standard_normal((4, self.n)) * scale
        total[: len(values)] = values
        p[-len(values) or self.n :] = values
        self.u, self.z, self.total = (
            torch.cat([torch.zeros(1, dtype=dtype), torch.from_numpy(x).to(dtype)])[1:]
            for x in (u, z, total)
        )
        self.parameters = FlatParameters(self.model, self.layout)
        self.parameters.write(torch.from_numpy(p).to(dtype))

    def arrays(self):
        """Copies of u, z and p."""
        return self.u.numpy().copy(), self.z.numpy().copy(), self.parameters.vector().numpy()

    def phi(self, name, eta=0.6):
        return Layerwise(POTENTIALS[name], self.layout.layers, eta)


# ---- the formulas


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("keep", [True, False])
def test_the_linear_lines_have_the_bits_of_numpy(library, sizes, dtype, keep):
    """With values that are not finite, and with denormals."""
    number = np.float32 if dtype == torch.float32 else np.float64
    values = [math.inf, math.nan, 1e-40, -1e-310, 3.0, -math.inf, 0.0, -0.0][: sum(sizes) // 2]
    memory = Memory(sizes, dtype, values=values)
    lines = NativeLinear(library, memory.parameters, memory.u, memory.z)
    u, z, p = memory.arrays()
    message = torch.full_like(memory.u, 7.0)
    with np.errstate(all="ignore"), torch.no_grad():
        lines.start(message, False)
        np.testing.assert_array_equal(message.numpy(), u - z)
        lines.start(message, True)
        np.testing.assert_array_equal(message.numpy(), u - p)
        np.testing.assert_array_equal(memory.z.numpy(), p)
        lines.move(memory.total, 0.3, 0.7, keep)
        u = u + number(-0.3) * memory.total.numpy()
        moved = p + number(0.7) * (u - p)
        np.testing.assert_array_equal(memory.u.numpy(), u)
        np.testing.assert_array_equal(memory.parameters.vector().numpy(), moved)
        np.testing.assert_array_equal(memory.z.numpy(), moved if keep else p)
        lines.move(None, 0.0, 0.25, True)
        z = moved if keep else p
        moved = moved + number(0.25) * (u - z)
        np.testing.assert_array_equal(memory.parameters.vector().numpy(), moved)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0])
def test_norms_are_sums_in_double(library, sizes, dtype, scale):
    memory = Memory(sizes, dtype, scale)
    lines = NativeRadial(library, memory.parameters, memory.u, memory.z, memory.phi("cubic"), 0.1)
    u, z, p = memory.arrays()
    message = torch.empty(memory.n + len(sizes), dtype=dtype)
    for own, read in ((z, False), (p, True)):
        lines.start(message, read)
        w = (u - own).astype(np.float64)
        wanted = [math.fsum(x * x for x in w[a:b]) for a, b in memory.layout.layers]
        np.testing.assert_allclose(lines._squares[:], wanted, rtol=1e-14)


@pytest.mark.parametrize("name", ["tan", "cubic", "huber"])
@pytest.mark.parametrize("sizes", [(5, 3), (1025, 700)], ids=str)
def test_values_that_are_not_finite_are_passed_on(library, name, sizes):
    """To the whole layer, as by torch, and to no other."""
    memory = Memory(sizes, torch.float64, 1e-2, values=[math.nan])
    memory.total[0] = 0.0
    message = torch.ones(memory.n + len(sizes), dtype=torch.float64)
    lines = NativeRadial(library, memory.parameters, memory.u, memory.z, memory.phi(name), 0.1)
    with torch.no_grad():
        lines.start(message, True)
        lines.move(message, 0.1, 0.1, True)
    finite = np.arange(memory.n) < sizes[0]
    for found in (message[: memory.n], memory.u, memory.z):
        np.testing.assert_array_equal(np.isfinite(found.numpy()), finite)


def test_a_sum_of_weights_that_is_0(library):
    """The sum of c w is 0 as well, and u stays: of |x|^3, whose c underflows near 0."""
    memory = Memory((40, 3), torch.float32)
    message = torch.zeros(memory.n + 2)
    lines = NativeRadial(library, memory.parameters, memory.u, memory.z, memory.phi("cubic"), 0.1)
    u = memory.u.clone()
    with torch.no_grad():
        lines.move(message, 0.5, 0.1, True)
    assert torch.equal(memory.u, u)


@pytest.mark.parametrize("far", [[], [0], [2], [0, 1, 2]])
def test_separable_tiles_near_and_far(library, monkeypatch, far):
    """tan_sep in float32: c is one number where all |w_i| are small, by tiles."""
    monkeypatch.setattr(native_together, "TILE", 1000)
    memory = Memory((700, 1800), torch.float32, 1e-3)
    for tile in far:
        memory.u[1000 * tile + 17] += 0.4 if tile else -0.4
    phi, strength = memory.phi("tan_sep"), 0.2
    lines = NativeSeparable(library, memory.parameters, memory.u, memory.z, phi, strength)
    u, _, p = memory.arrays()
    message = torch.zeros(2 * memory.n + 1)

    def fraction(w):
        return phi.fraction(torch.from_numpy(w).double(), strength).numpy()

    with torch.no_grad():
        lines.start(message, True)
        c = fraction(u - p)
        parts = message.numpy().copy()
        np.testing.assert_allclose(parts[: memory.n], c * (u - p), rtol=1e-5, atol=1e-8)
        np.testing.assert_allclose(parts[memory.n : -1], c, rtol=1e-5)
        assert math.isnan(parts[-1]) == bool(far)
        if not far:
            np.testing.assert_array_equal(parts[memory.n :], parts[-1])
        lines.move(message, 0.5, strength, True)
    u = u - 0.5 * parts[: memory.n] / parts[memory.n : -1]
    w = (u - p).astype(np.float32)
    moved = p + fraction(w) * w
    np.testing.assert_allclose(memory.u.numpy(), u, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(memory.parameters.vector().numpy(), moved, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(memory.z.numpy(), memory.parameters.vector().numpy())


def test_parameters_with_other_strides_and_gradients(library):
    """Channels-last; and a backward pass through values that were overwritten is refused."""
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    layout = FlatLayout.trainable(model)
    parameters = FlatParameters(model, layout)
    p = parameters.vector()
    u, z = p + 0.1, p.clone()
    lines = NativeLinear(library, parameters, u, z)
    loss = model.bias.square().sum()
    with torch.no_grad():
        lines.move(None, 0.0, 0.5, True)
    torch.testing.assert_close(parameters.vector(), p + 0.05)
    torch.testing.assert_close(z, parameters.vector(), rtol=0.0, atol=0.0)
    assert model.weight.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- bits


@needs_compiler
def test_bits_depend_neither_on_the_processor_nor_on_optimization(library, tmp_path):
    """And the source compiles without a warning."""
    path = tmp_path / "plain.so"
    strict = ["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]
    native.compile_to(path, ["cc", *strict, "-O1", "-shared", "-fPIC"])
    found = []
    for own in (library, native.Library(path)):
        for dtype in TYPES:
            memory = Memory((1023, 40, 2500), dtype, 0.01)
            phi = memory.phi("cubic")
            vectors = memory.parameters, memory.u, memory.z
            radial = NativeRadial(own, *vectors, phi, 0.3)
            linear = NativeLinear(own, *vectors)
            message = torch.zeros(memory.n + 3, dtype=dtype)
            with torch.no_grad():
                radial.start(message, True)
                found.append(message.clone())
                radial.move(message, 0.7, 0.2, True)
                linear.move(memory.total, 0.1, 0.3, True)
                linear.replace(True)
            found += [memory.u, memory.z, torch.tensor(radial._squares[:])]
            memory = Memory((1023, 2500), torch.float32, 1e-3)
            near = NativeSeparable(
                own, memory.parameters, memory.u, memory.z, memory.phi("tan_sep"), 0.3
            )
            message = torch.zeros(2 * memory.n + 1)
            with torch.no_grad():
                near.start(message, True)
                near.move(message, 0.7, 0.2, True)
            found += [message, memory.u, memory.z]
    half = len(found) // 2
    for first, second in zip(found[:half], found[half:], strict=True):
        assert torch.equal(first, second)


# ---- the choice


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache of libraries, here and in this process; to optimize one takes seconds."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    flags = [flag.replace("-O3", "-O0") for flag in native.FLAGS]
    monkeypatch.setattr(native, "FLAGS", flags)
    native.library.cache_clear()
    yield tmp_path / "cache" / "consensus"
    native.library.cache_clear()


def test_a_library_is_compiled_once(cache, monkeypatch):
    if native.library() is None:
        pytest.skip("no C compiler")
    (path,) = cache.iterdir()
    assert native.library().path == path
    monkeypatch.setattr(subprocess, "run", None)
    native.library.cache_clear()
    assert native.library().path == path


@needs_compiler
def test_a_damaged_library_is_replaced(cache, monkeypatch, tmp_path):
    name = native.library().path.name
    path = tmp_path / "other" / "consensus" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\x7fELF")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    native.library.cache_clear()
    assert native.library().path == path
    assert path.stat().st_size > 1000


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def no_path(monkeypatch, folder):
    monkeypatch.setenv("PATH", "")


def failing(monkeypatch, folder):
    monkeypatch.setenv("CC", script(folder / "failing", "echo no >&2; exit 1"))


def writing_garbage(monkeypatch, folder):
    text = 'while [ "$1" != -o ]; do shift; done; echo garbage > "$2"'
    monkeypatch.setenv("CC", script(folder / "garbage", text))


def writing_nothing(monkeypatch, folder):
    monkeypatch.setenv("CC", script(folder / "nothing", "exit 0"))


def late(monkeypatch, folder):
    monkeypatch.setattr(native, "TIMEOUT_S", 0.1)
    monkeypatch.setenv("CC", script(folder / "late", "exec sleep 5"))


def unwritable(monkeypatch, folder):
    (folder / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "file"))


def bad_quotes(monkeypatch, folder):
    monkeypatch.setenv("CC", "cc '")


@pytest.fixture
def logged(monkeypatch):
    """The lines that native.py logs as information."""
    lines = []
    logger = logging.getLogger(native.__name__)
    monkeypatch.setattr(logger, "info", lambda text, *args: lines.append(text % args))
    return lines


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    "hinder", [no_path, failing, writing_garbage, writing_nothing, late, unwritable, bad_quotes]
)
def test_without_a_library(monkeypatch, tmp_path, logged, capfd, hinder):
    """One line in the log, nothing printed, and operations of torch."""
    hinder(monkeypatch, tmp_path)
    model = two_layers()
    coupling = Coupling(model, torch.optim.SGD(model.parameters(), 0.1))
    assert type(coupling._parts[0]._together) is LinearTogether
    assert native.library() is None
    (line,) = logged
    assert line.startswith("lines 3 and 6 by torch, not by native.c: ")
    assert capfd.readouterr() == ("", "")
    assert not list((tmp_path / "cache").glob("consensus/compiling-*"))


@pytest.mark.usefixtures("cache")
def test_the_switch(monkeypatch, logged):
    monkeypatch.setenv(native.SWITCH, "0")
    assert native.library() is None
    assert not logged


@needs_compiler
def test_two_processes_compile_at_once(cache):
    """Both get a library that works, and one file is left."""
    ready, go = os.pipe()
    children = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            try:
                os.read(ready, 1)
                os._exit(native.library() is None)
            finally:
                os._exit(2)
        children.append(child)
    os.write(go, b"xx")
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    os.close(ready)
    os.close(go)
    assert codes == [0, 0]
    assert len(list(cache.iterdir())) == 1


@pytest.mark.usefixtures("library")
def test_threads_are_for_large_vectors(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    small, large = torch.zeros(1 << 17), torch.zeros((1 << 17) + 1)
    assert native.agreed(lambda own: own, small) is not None
    assert native.agreed(lambda own: own, large) is None


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("other", [0, 1, 1 << 56])
def test_processes_with_another_source_or_none_are_not_joined(other):
    def smallest(own):
        return torch.minimum(own, torch.tensor([other, -other]))

    assert native.agreed(smallest, torch.zeros(3)) is None


def coupled(group, without):
    """The kinds of both lines and the digest of u, in Coupling and in the trainer's server."""
    before = os.environ.get(native.SWITCH)
    found = []
    try:
        if group.rank in without:
            os.environ[native.SWITCH] = "0"
            native.library.cache_clear()
        for name in ("quad", "tan"):
            model = two_layers()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
            coupling = Coupling(model, optimizer, name, period=2)
            for t in range(20):
                backward(model, group.rank, t)
                optimizer.step()
                coupling.step()
            kind = type(coupling._parts[0]._together).__name__
            found.append((kind, int(digest(coupling.state_dict()["u"]))))
            coupling.close()
        for name in ("quad", "tan"):
            u = torch.linspace(-0.1, 0.1, 1000)
            phi = Layerwise(POTENTIALS[name], [(0, 300), (300, 1000)], 3.0)
            server, z = Server(u, phi, group), (u + 0.01 * torch.cos(u * group.rank))[None]
            for _ in range(5):
                server.finish(server.start(z), 0.3)
            found.append((type(server.kernel).__name__, int(digest(server.u))))
    finally:
        if before is None:
            os.environ.pop(native.SWITCH, None)
        native.library.cache_clear()
    return found


@needs_compiler
@pytest.mark.ranks
@pytest.mark.parametrize("without", [[], [1]])
def test_all_processes_take_the_library_or_none_does(ranks, without):
    first, second = ranks(2, coupled, without)
    kinds = [LinearTogether, RadialTogether] if without else [NativeLinear, NativeRadial]
    kinds += [Native, Native]  # which moves u by torch then
    assert [kind for kind, _ in first] == [kind.__name__ for kind in kinds]
    assert [bits for _, bits in first] == [bits for _, bits in second]
