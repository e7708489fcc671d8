"""The GPU benchmark times Algorithm 1, and its tables agree with arithmetic."""

import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch.nn.functional import cross_entropy

from benchmarks import gpu, gpu_models, gpu_vectors, harness
from benchmarks.harness import CPU, Problem
from consensus import POTENTIALS, Layerwise
from consensus.comm import Solo
from consensus.problem import build_model
from consensus.server import Server
from consensus.worker import Worker
from tests.testing import ROOT

# ---- lenet5


@pytest.mark.parametrize("gradients", ["grouped", "products"])
def test_batched_gradients_are_those_of_separate_models(gradients):
    risk = gpu.GRADIENTS[gradients]
    problem = Problem(num_images=100, dtype=torch.float64, make_risk=risk)
    plain = problem.consensus("quad", range(4))
    oracle = plain.worker.oracle
    points = plain.u + 0.01 * torch.randn(4, plain.u.numel(), dtype=torch.float64)
    images, labels = oracle.draw()
    found = oracle.gradient(points.clone(), (images, labels))  # which it overwrites
    for k in range(4):
        model = build_model("lenet5", 0, torch.float64, num_classes=10)
        torch.nn.utils.vector_to_parameters(points[k], model.parameters())
        loss = cross_entropy(model(images[k]), labels[k], reduction="sum")
        loss.backward()
        expected = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
        torch.testing.assert_close(found[k], expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(oracle.losses[k], loss.detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("gradients", gpu.GRADIENTS)
@pytest.mark.parametrize("potential", gpu_vectors.TABLE_2)
def test_off_the_cpu_no_line_asks_the_host(potential, gradients):
    # Tensors on "meta" take every branch that is not for the CPU, and have no number to give.
    risk = gpu.GRADIENTS[gradients](build_model("lenet5", 0, torch.float32), "sum")
    n = risk.layout.size
    u, z = torch.zeros(n, device="meta"), torch.zeros(4, n, device="meta")
    phi = Layerwise(POTENTIALS[potential], risk.layout.layers, eta=0.5)
    server = Server(u, phi, Solo("meta"))
    worker = Worker(z, None, phi, nu=1e-4)
    images = torch.zeros(4, 5, 1, 28, 28, device="meta")
    labels = torch.zeros(4, 5, dtype=torch.int64, device="meta")
    pending = server.start(worker.z, worker.scratch)
    delta = risk.gradient(worker.z, images, labels)
    u = server.finish(pending, 1e-3)
    worker.update(delta, 1e-3, 1e-2, u, u)
    assert worker.z.shape == (4, n)
    with pytest.raises(RuntimeError, match="meta"):
        bool(phi.contains(u))


# ---- vector


def test_vectors_moved_by_hand():
    # One worker. Line 3: u, z -> message; message, u -> u. Line 6: u, delta, v, z -> v, z. Before:
    # u, z for norms; u, z, message for the step of u; u, delta, v, z for the step of z.
    expected = {
        "quad": (3 + 3, 6),
        "cubic": (2 + 3 + 3, 2 + 6),
        "tan": (2 + 3 + 3 + 3, 4 + 6),
        "tan_sep": (3 + 3 + 3, 4 + 6),
        "log": (2 + 3 + 3 + 3, 4 + 6),
        "log_sep": (3 + 3 + 3, 4 + 6),
    }
    for name, vectors in expected.items():
        phi = Layerwise(POTENTIALS[name], [(0, 3), (3, 5)])
        assert (
            tuple(gpu_vectors.vectors_moved(phi, line) for line in ("line 3", "line 6")) == vectors
        )
    quad, tan = (Layerwise(POTENTIALS[name], [(0, 5)]) for name in ("quad", "tan"))
    assert gpu_vectors.vectors_moved(quad, "line 6", num_workers=4) == 1 + 4 * 3 + 4 * 2
    assert gpu_vectors.vectors_moved(tan, "line 3", num_workers=4) == (1 + 4) + (1 + 4 + 1) * 2 + 3


@pytest.mark.parametrize("potential", gpu_vectors.TABLE_2)
def test_the_timed_lines_are_lines_3_and_6(potential):
    n, layers = 1000, 16
    coupling = gpu_vectors.Coupling(CPU, potential, n)
    u, z, delta = (x.clone() for x in (coupling.server.u, coupling.worker.z[0], coupling.delta[0]))
    for start, stop in coupling.phi.layers:
        assert stop - start in (n // layers, n // layers + 1)
        assert (u - z)[start:stop].norm() == pytest.approx(0.3, rel=0.4)
    assert len(coupling.phi.layers) == layers
    coupling.lines["line 3"]()
    phi = POTENTIALS[potential]

    def force(w):
        return torch.cat([phi.grad(w[start:stop]) for start, stop in coupling.phi.layers])

    u = u - harness.TAU * force(u - z)
    torch.testing.assert_close(coupling.server.u, u)
    coupling.lines["line 6"]()
    v = -harness.SIGMA * (delta + harness.NU * z)
    torch.testing.assert_close(coupling.worker.v[0], v, atol=1e-9, rtol=1e-5)
    z = z + v + harness.SIGMA / harness.LAM * force(u - z)
    torch.testing.assert_close(coupling.worker.z[0], z)


@pytest.mark.parametrize("potential", ["tan", "tan_sep"])
def test_a_compiled_line_is_one_graph_and_the_same_line(potential, monkeypatch):
    # The graph is captured as for the compiler, and runs as it is.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    eager = gpu_vectors.Coupling(CPU, potential, 10_000, fused=False)
    captured = gpu_vectors.Coupling(CPU, potential, 10_000, gpu_vectors.Unbranched, fused=False)
    call, why = gpu_vectors.compiled(captured.lines["line 6"])
    assert call is not None, why
    call()
    for _ in range(2):
        eager.lines["line 6"]()
    torch.testing.assert_close(captured.worker.z, eager.worker.z)
    torch.testing.assert_close(captured.worker.v, eager.worker.v, atol=1e-9, rtol=1e-5)


# ---- models


def test_the_models_are_as_large_as_their_names_say():
    with torch.device("meta"):
        resnet, gpt = gpu_models.resnet50(torch.device("meta"), False).model, gpu_models.Gpt()
    resnet50, gpt2 = 25_557_032, 124_439_808  # as published
    untied = -50_257 * 768 + 2 * 25_152 * 768
    assert sum(p.numel() for p in resnet.parameters()) == resnet50
    assert sum(p.numel() for p in gpt.parameters()) == gpt2 + untied
    assert untied / gpt2 < 3e-4
    for model in (resnet, gpt):
        assert list(model.buffers()) == []


def test_a_token_does_not_see_those_after_it():
    model = gpu_models.gpt2(CPU, True).model
    tokens = torch.arange(16).unsqueeze(0)
    changed = tokens.clone()
    changed[0, 10] = 63
    with torch.no_grad():
        same = (model(tokens) == model(changed)).all(1)
    assert same.tolist() == [True] * 10 + [False] * 6


@pytest.mark.parametrize("name", gpu_models.MODELS)
def test_the_oracle_of_a_model_is_its_gradient(name):
    workload = gpu_models.MODELS[name](CPU, True)
    oracle = gpu_models.ResidentBatches(workload)
    point = oracle.risk.layout.flatten(workload.model)
    oracle.draw()
    inputs, labels = oracle.draw()
    assert torch.equal(inputs[0], workload.inputs[1])
    found = oracle.gradient(point.unsqueeze(0), (inputs, labels))
    cross_entropy(workload.model(workload.inputs[1]), workload.labels[1]).backward()
    expected = torch.cat([p.grad.reshape(-1) for p in workload.model.parameters()])
    torch.testing.assert_close(found[0], expected)
    other = gpu_models.ResidentBatches(workload)
    other.load_state_dict(oracle.state_dict())
    assert torch.equal(other.draw()[0], oracle.draw()[0])


def test_the_labels_of_gpt2_are_the_next_tokens():
    workload = gpu_models.gpt2(CPU, True)
    inputs, labels = workload.inputs[0], workload.labels[0].view(workload.inputs[0].shape)
    assert torch.equal(labels[:, :-1], inputs[:, 1:])


# ---- the tables


def test_the_tables(tmp_path, monkeypatch, capsys):
    def no_compiler(*args, **kwargs):
        def call():
            raise RuntimeError("No working C++ compiler found\nand much more")

        return call

    monkeypatch.setattr(torch, "compile", no_compiler)
    monkeypatch.chdir(tmp_path)
    command = "--device cpu --quick --potentials tan --models gpt2 --n 2e4"
    gpu.main([*command.split(), "--json", "rows.json", "--trace", "traces"])
    found = json.loads((tmp_path / "rows.json").read_text())
    printed = capsys.readouterr().out.splitlines()
    modes = [(row["potential"], row["gradients"], row["mode"]) for row in found["lenet5"]]
    assert modes == [
        (potential, gradients, mode)
        for potential in ("tan",)
        for gradients, mode in (
            ("loop", "plain"),
            ("loop", "eager"),
            ("loop", "static"),
            ("streams", "static"),
            ("grouped", "static"),
            ("products", "static"),
        )
    ]
    for row in found["lenet5"]:
        assert row["steps_per_s"] == pytest.approx(1e3 / row["ms"])
        assert row["seconds_for_30000"] == pytest.approx(30 * row["ms"])
        assert row["host_syncs"] is None
    copy = found["vector"]["copy_bytes_per_s"]
    assert found["vector"]["n"] == 20_000
    vectors = {"line 3": 11, "line 6": 10}
    assert len(found["vector"]["rows"]) == 2 * 3
    for row in found["vector"]["rows"]:
        assert row["bytes"] == vectors[row["line"]] * 4 * 20_000
        if row["mode"] == "compiled":
            assert row["ms"] is None
            assert row["absent"] == "No working C++ compiler found"
        else:
            assert row["bytes_per_s"] == pytest.approx(1e3 * row["bytes"] / row["ms"])
            assert row["share_of_copy"] == pytest.approx(row["bytes_per_s"] / copy)
    assert sum(line.endswith("absent: No working C++ compiler found") for line in printed) == 2
    kinds = [(row["dtype"], row["method"]) for row in found["models"]]
    loops = [
        (dtype, method)
        for dtype in ("float32", "bfloat16")
        for method in ("loop", "Coupling quad", "Coupling tan")
    ]
    assert kinds == [*(("float32", x) for x in ("local", "quad", "tan")), *loops]
    for first in (0, 3, 6):
        for row in found["models"][first : first + 3]:
            assert row["ratio"] == pytest.approx(row["ms"] / found["models"][first]["ms"])
    traces = {path.name: path for path in (tmp_path / "traces").iterdir()}
    assert set(traces) == {
        *(f"lenet5-tan-loop-{mode}.json" for mode in ("plain", "eager", "static")),
        *(
            f"lenet5-tan-{gradients}-static.json"
            for gradients in ("streams", "grouped", "products")
        ),
        *(
            f"vector-{potential}-line{line}-{mode}.json"
            for potential in ("tan",)
            for line in (3, 6)
            for mode in ("eager", "fused")
        ),
    }
    events = json.loads(traces["lenet5-tan-loop-static.json"].read_text())["traceEvents"]
    count = sum(event.get("name") == "aten::index_select" for event in events)
    assert count == 5 * 2  # images and labels in each of five steps
    assert sum("aten::convolution_backward" in line for line in printed) >= 1


def test_what_it_refuses(capsys):
    for arguments, message in (
        (["--n", "20.5"], "20.5; allowed: a whole number, at least 16"),
        (["--n", "many"], "invalid whole_number value: 'many'"),
        (["--models", "bert"], "invalid choice: 'bert'"),
    ):
        with pytest.raises(SystemExit) as refused:
            gpu.main(arguments)
        assert refused.value.code == 2
        assert message in capsys.readouterr().err


def test_a_device_that_is_absent_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as refused:
        gpu.main(["--device", "cuda"])
    assert refused.value.code == 2
    assert "`--device` is cuda, and torch finds none; allowed here: cpu" in capsys.readouterr().err


def test_it_needs_torch_alone():
    absent = ("hydra", "omegaconf", "torchvision", "sklearn", "matplotlib", "rich", "tensorboard")
    code = f"import sys; sys.modules.update(dict.fromkeys({absent!r})); import benchmarks.gpu"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


PYTHON = """#!/usr/bin/env bash
case "$*" in
    *cuda.is_available*) exit "${GPU:-1}" ;;
    "-m pytest"*) printf 'one failed\\n'; exit 1 ;;
esac
"""


def gpu_session(folder, **env):
    python = folder / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    return subprocess.run(
        [ROOT / "scripts" / "gpu_session", folder / "out"], cwd=folder, text=True,
        env=os.environ | {"PYTHON": str(python)} | env, capture_output=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "codes"),
    [
        ("840", ["tests: exit code 1"]),
        ("0", [f"{name}: exit code 124" for name in ("tests", "gpu", "population")]),
    ],
)
def test_a_part_that_fails_or_is_late_does_not_keep_the_others_from_running(
    tmp_path, seconds, codes
):
    ended = gpu_session(tmp_path, SECONDS_IN_ALL=seconds)
    assert ended.returncode == 1
    failed = [line.partition(" after")[0] for line in ended.stderr.splitlines()]
    assert failed == [f"scripts/gpu_session: {code}" for code in codes]
    if seconds == "840":
        assert (tmp_path / "out" / "tests.txt").read_text() == "one failed\n"
        assert (tmp_path / "out" / "population.txt").read_text() == ""


def test_a_session_without_a_gpu_is_refused(tmp_path):
    ended = gpu_session(tmp_path, GPU="0")
    assert (ended.returncode, ended.stderr) == (2, "scripts/gpu_session: torch finds no GPU\n")
