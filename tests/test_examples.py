"""The examples run, leave a file, and what they print is so by other programs.

Examples of several processes run on real ranks, end with the same u on all, and a loss that fell.
"""

import base64
import importlib.util
import math
import subprocess
import sys

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from scipy.optimize import minimize

from consensus.comm import Launch, Solo
from consensus.run.plan import make_plan
from consensus.run.trainer import Trainer
from consensus.server import digest
from tests.testing import ROOT
from tests.testing.launch import Ranks
from tests.testing.small_runs import rows_of

FOLDER = ROOT / "examples"
DISTRIBUTED = {"char_gpt", "batchnorm_cnn", "custom_potential", "label_skew", "broken_worker"}
PLUGINS = {"own_folder", "own_images", "own_text", "own_regression", "own_sink"}
torch.set_num_threads(1)


def load(name):
    spec = importlib.util.spec_from_file_location(f"examples_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name, folder, *arguments):
    """The module, and what its main gave; the picture is looked for."""
    module = load(name)
    answer = module.main(["--output", str(folder / "new"), *arguments])
    assert (folder / "new" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    return module, answer


def test_every_example_is_tested():
    names = {"robust_regression", "tv_denoising", "consensus_logistic", "fsdp2", "load_model"}
    names |= {"elastic_loop"}
    assert {path.stem for path in FOLDER.glob("*.py")} == names | DISTRIBUTED | PLUGINS
    assert [path.stem for path in FOLDER.glob("*.ipynb")] == ["two_potentials"]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_short_and_say_how_they_are_started(path):
    text = path.read_text(encoding="utf-8")
    start = "torchrun --standalone --nproc-per-node=4" if path.stem in DISTRIBUTED else ""
    if path.stem in PLUGINS:
        assert f"python -m consensus.train workers=4 'plugins=[{path.stem}]'" in text
    else:
        assert f"{start} examples/{path.name}" in text
    assert len(text.splitlines()) < (80 if "torchrun" in text else 120)


def test_the_model_of_a_run_needs_torch_alone(make_config, tmp_path, capsys):
    """`load_model` finds the test error in the last row of a run of the main example."""
    short = ["algorithm.iterations=60", "output.eval_every=60", "stationarity.every=null"]
    config = make_config("experiment=digits", *short, f"output.run_dir={tmp_path / 'run'}")
    row = Trainer(make_plan(config, Launch()), Solo()).run()
    module = load("load_model")
    assert "consensus" not in vars(module), "torch and scikit-learn suffice"
    capsys.readouterr()
    module.main([str(tmp_path / "run")])
    assert capsys.readouterr().out == f"test error {row['test_error']:.2f} %\n"
    assert row["test_error"] < 80.0, "60 iterations beat guessing, so the model is not the start"


def test_robust_regression(tmp_path, capsys):
    module, rows = run("robust_regression", tmp_path, "--size", "60")
    errors = {label: error for label, _, error, _ in rows}
    fits = {label: x.numpy() for label, x, _, _ in rows}
    for name in ("quad", "tan_sep", "log_sep"):
        assert errors[f"envelope of truncated, {name}"] < 0.1 < 0.1 * errors["least squares"]
        assert errors[f"envelope of |r|, {name}"] < 0.5 * errors["Huber (scikit-learn)"]
    printed = capsys.readouterr().out
    assert all(f"{label} " in printed for label in fits)
    a, b, _ = module.data(60, 20, torch.Generator().manual_seed(0))
    a, b = a.numpy(), b.numpy()

    def huber(x):  # the envelope of |.| with phi = w^2, by hand
        r = np.abs(a @ x - b)
        loss = np.where(r <= module.LAM / 2, r**2 / module.LAM, r - module.LAM / 4).sum()
        return loss + 0.5 * module.NU * x @ x

    best = minimize(huber, fits["envelope of |r|, quad"] + 0.1, method="BFGS")
    np.testing.assert_allclose(fits["envelope of |r|, quad"], best.x, atol=1e-3)


def test_tv_denoising(tmp_path, capsys):
    module, rows = run("tv_denoising", tmp_path, "--size", "32", "--budget", "400")
    ratios = {label: ratio for label, ratio, _, _ in rows}
    assert capsys.readouterr().out.count("PSNR") == len(rows) == 6
    for name in ("quad", "tan", "log"):
        found = ratios[f"truncated, {name}"]
        assert found > ratios["noisy"] + 8.0
        assert found > ratios["least squares, quad"] + 3.0
    clean = module.picture(32)
    assert module.psnr(clean + 0.1, clean) == pytest.approx(20.0)


def test_differences_are_those_of_numpy():
    module = load("tv_denoising")
    u = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z = module.differences().apply(u).numpy()
    np.testing.assert_array_equal(z[:-1, :, 0], np.diff(u.numpy(), axis=0))
    np.testing.assert_array_equal(z[:, :-1, 1], np.diff(u.numpy(), axis=1))
    assert (z[-1, :, 0] == 0).all()
    assert (z[:, -1, 1] == 0).all()


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("robust_regression", lambda m, c: m.absolute(c)),
        ("robust_regression", lambda m, c: m.truncated(c)),
        ("tv_denoising", lambda m, c: m.data_term(c, 0.02)),
        ("tv_denoising", lambda m, c: m.data_term(c, math.inf)),
    ],
    ids=["absolute", "truncated", "data term", "least squares"],
)
def test_proximal_operators_are_minimizers(name, function):
    # One coordinate at a time, against a fine grid.
    grid = torch.linspace(-3, 3, 1201, dtype=torch.float64)
    g = function(load(name), torch.tensor([0.25], dtype=torch.float64))
    costs = torch.stack([g.value(y.view(1)) for y in grid])
    for x in np.linspace(-1.5, 2.0, 36):
        for step in (0.05, 0.7, 4.0):
            point = g.prox(torch.tensor([x], dtype=torch.float64), step)
            at_point = g.value(point) + (point - x).square().sum() / (2 * step)
            assert at_point <= (costs + (grid - x).square() / (2 * step)).min() + 1e-12


def test_the_prox_of_total_variation_shortens():
    f = load("tv_denoising").total_variation(0.5)
    z = torch.tensor([[3.0, 4.0], [0.1, 0.0], [0.0, 0.0]], dtype=torch.float64)
    expected = [[3.0 * 0.8, 4.0 * 0.8], [0.0, 0.0], [0.0, 0.0]]  # 5 - 1 = 4 of 5
    np.testing.assert_allclose(f.prox(z, 2.0), expected, atol=1e-15)
    assert float(f.value(z)) == pytest.approx(0.5 * 5.1)


def test_consensus_logistic(tmp_path, capsys):
    from sklearn.linear_model import LogisticRegression  # 2 s: not where tests are collected

    options = ("--machines", "3", "--cases", "60")
    module, (best, rows) = run("consensus_logistic", tmp_path, *options)
    assert capsys.readouterr().out.count("CONVERGED") == len(rows) == 18
    x, y = module.shards(3, 60)
    model = LogisticRegression(
        C=1.0 / (180 * module.RIDGE), fit_intercept=False, tol=1e-10, max_iter=10000
    ).fit(x.reshape(180, -1).numpy(), y.reshape(-1).numpy())
    u = torch.from_numpy(model.coef_[0])
    pooled = float(module.losses(u.expand(3, -1), x, y).sum())
    assert best == pytest.approx(pooled, rel=1e-8), "scikit-learn finds the same minimum"
    for name in ("quad", "cubic", "tan", "tan_sep", "log", "log_sep"):
        gaps = [gap for other, _, gap, _, _ in rows if other == name]
        values = [value for other, _, _, value, _ in rows if other == name]
        assert gaps == sorted(gaps, reverse=True), "smaller lam, nearer to the pooled problem"
        assert 0.0 <= gaps[-1] < 1e-2 * best
        # u = z_j = u* is feasible in (15), so its minimum is below, and it grows as lam falls
        assert values == sorted(values)
        assert values[-1] <= best


def outputs(notebook, kind):
    """The outputs of one type, such as `image/png`, of all cells of a notebook."""
    found = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [o.data[kind] for o in found if kind in o.get("data", {})]


@pytest.mark.ranks
def test_two_potentials(tmp_path, monkeypatch):
    """The notebook in few iterations; its table has the last rows of the two runs."""
    path = FOLDER / "two_potentials.ipynb"
    notebook = nbformat.read(path, as_version=4)
    (cell,) = [cell for cell in notebook.cells if cell.source.endswith("\niterations = 200")]
    cell.source = cell.source.replace("iterations = 200", "iterations = 20")
    place = {"metadata": {"path": str(tmp_path)}}
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for folder in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):  # by default in the home folder
        monkeypatch.setenv(folder, str(tmp_path / folder))
    NotebookClient(notebook, kernel_name="python3", resources=place).execute()
    rows = {}
    for run in (tmp_path / "runs").iterdir():
        config = (run / "config.yaml").read_text()
        rows["tan" if "name: tan" in config else "quad"] = rows_of(run)
    shown = [
        f"{name:4}  test error {last['test_error']:5.2f} %  |u - z| {max(last['distance']):.2f}"
        for name, (_, last) in sorted(rows.items())
    ]
    (table,) = [o.text for cell in notebook.cells for o in cell.get("outputs", []) if "text" in o]
    assert table.splitlines() == shown
    for row in rows["tan"]:
        assert max(row["distance"]) < math.sqrt(math.pi / 2) < max(rows["quad"][0]["distance"])
    (picture,) = outputs(notebook, "image/png")
    assert base64.b64decode(picture)[:4] == b"\x89PNG"
    assert outputs(notebook, "text/plain")[-1] == str(28 * 28 * 10 + 10), "weights of all pixels"


def test_the_outputs_of_the_notebook_are_small_and_of_the_code_that_it_has():
    path = FOLDER / "two_potentials.ipynb"
    assert path.stat().st_size < 60_000
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "in one go"


def train_with_fsdp2(group, folder):
    torch.manual_seed(group.rank)
    arguments = ["--output", folder, "--iterations", "60", "--width", "8"]
    return load("fsdp2").main(arguments)


@pytest.mark.ranks
def test_fsdp2(ranks, tmp_path):
    """A plain model with the weights in the file has the loss of u on all four processes."""
    losses = ranks(4, train_with_fsdp2, str(tmp_path))
    assert len(set(losses)) == 1
    model = load("fsdp2").network(8)
    x = torch.linspace(-1.0, 1.0, 201).unsqueeze(1)

    @torch.no_grad()
    def loss():
        return float((model(x) - torch.sin(3.0 * x)).square().mean())

    before = loss()
    model.load_state_dict(torch.load(tmp_path / "fsdp2.pt", weights_only=True))
    assert loss() == pytest.approx(losses[0], rel=1e-5)
    assert loss() < 0.7 * before


def digest_of(tensors):
    return int(digest(torch.cat([tensor.double().reshape(-1) for tensor in tensors])))


def answers(name, size, folder, *arguments):
    """The results of `main` by rank, u, the same on all, and the lines of rank 0."""
    with Ranks(size, [name, *arguments], folder, module="tests.testing.example") as run:
        assert run.wait(90) == [0] * size, run.err(0)
        printed = run.out(0).splitlines()
        assert [run.out(rank) for rank in range(1, size)] == [""] * (size - 1)
    found, states = zip(*(torch.load(folder / f"answer{r}.pt") for r in range(size)), strict=True)
    equal = [key for key in states[0] if "running" not in key]  # statistics since the last average
    assert len({digest_of([state[key] for key in equal]) for state in states}) == 1
    return found, states[0], printed


def on_ranks(name, folder, *arguments):
    """The losses of u, u, and the lines of rank 0, on two ranks."""
    (losses, _), state, printed = answers(name, 2, folder, *arguments)
    assert losses[-1] < 0.9 * losses[0]
    assert len(printed) == len(losses)
    return losses, state, printed


@pytest.mark.ranks
@pytest.mark.parametrize("ddp", [[], ["--ddp"]])
def test_char_gpt(tmp_path, ddp):
    sizes = {"width": 16, "context": 16, "steps": 64, "every": 16, "lr": 0.02}
    small = [f"--{name}={value}" for name, value in sizes.items()]
    losses, state, printed = on_ranks("char_gpt", tmp_path, *small, *ddp)
    assert losses[-1] < math.log(128), "better than a uniform guess"
    n = sum(value.numel() for value in state.values())
    sums = 64 if ddp else 1 + 63 // 16  # that of the start, and those finished by step 64
    assert printed[-1].endswith(f"{sums * 4 * n / 1e6:.1f} MB")


@pytest.mark.ranks
def test_batchnorm_cnn(tmp_path):
    def start(folder, steps):
        (tmp_path / folder).mkdir(exist_ok=True)
        arguments = ["--folder", "checkpoint", "--steps", str(steps), "--every", "12"]
        return on_ranks("batchnorm_cnn", tmp_path / folder, *arguments)

    straight, state, _ = start("straight", 48)
    start("resumed", 24)
    resumed, again, printed = start("resumed", 48)
    assert resumed == straight[2:]
    assert printed[0].startswith("step 36 ")
    assert [name for name in state if not torch.equal(state[name], again[name])] == []


@pytest.mark.ranks
def test_custom_potential(tmp_path):
    losses, _, _ = on_ranks("custom_potential", tmp_path, "--steps", "300")
    assert losses[-1] < 0.9 * losses[0]
    phi = load("custom_potential").firm(2.0)
    w = torch.linspace(-1, 1, 7, dtype=torch.float64, requires_grad=True)
    squared = w.square().sum()
    value = phi.value(w)
    assert value.item() == pytest.approx((squared + squared**2).item())
    np.testing.assert_allclose(phi.grad(w.detach()), torch.autograd.grad(value, w)[0])


@pytest.mark.ranks
def test_label_skew(tmp_path):
    """Two workers with disjoint classes; `tan` keeps the copies near, whatever they learn."""
    from sklearn.datasets import load_digits

    found, _, printed = answers("label_skew", 2, tmp_path, "--steps", "161")
    assert len(printed) == 1 + len(found[0]) == 5
    module = load("label_skew")
    digits = load_digits()
    ours = [module.shard(worker, 2) for worker in range(2)]
    assert [set(y.tolist()) for _, y, _, _ in ours] == [{0, 1}, {2, 3}]
    rows = np.concatenate([digits.data[digits.target == digit] / 16 for digit in range(4)])
    parts = torch.cat([*(x for x, _, _, _ in ours), ours[0][2]]).double().numpy()
    np.testing.assert_array_equal(np.unique(parts, axis=0), np.unique(rows, axis=0))
    assert len(parts) == len(rows), "no image is in two parts"
    for worker in found:
        apart = {(potential, pull): last for potential, pull, _, _, last in worker}
        assert max(apart["tan", 0.1], apart["tan", 0.3]) < math.sqrt(math.pi / 2)
        assert apart["quad", 1.0] < 0.3 < math.sqrt(math.pi / 2) < apart["quad", 0.3]
    errors = {(potential, pull): error for potential, pull, _, error, _ in found[0]}
    assert errors["tan", 0.3] < 0.5 * errors["quad", 1.0], "averages of distant copies are poor"


def test_elastic_loop(tmp_path):
    """The saved u fits a sine, of which a plain model of this size is capable."""
    script = ["--script", str(FOLDER / "elastic_loop.py"), "--steps", "400"]
    command = [sys.executable, "-m", "consensus.elastic", "--processes", "2", *script]
    command += ["--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "step 0: 2 workers, (0, 1)" in done.stdout
    model = load("elastic_loop").network()
    model.load_state_dict(torch.load(tmp_path / "elastic_loop.pt", weights_only=True))
    x = torch.linspace(-1.0, 1.0, 201).unsqueeze(1)
    loss = float((model(x).detach() - torch.sin(3.0 * x)).square().mean())
    assert f"mean squared error of u: {loss:.2g}" in done.stdout
    assert loss < 0.05 < float(torch.sin(3.0 * x).var())


@pytest.mark.ranks
def test_broken_worker(tmp_path):
    """Robust potentials keep the noise of one worker of four out of u, and `quad` does not."""
    found, _, printed = answers("broken_worker", 4, tmp_path, "--steps", "97")
    assert len(printed) == 1 + len(found[0]) == 4
    for potential, good, broken, _ in found[0]:
        assert good < 20.0
        assert (broken > 40.0) == (potential == "quad")
        assert (broken < good + 3.0) == (potential != "quad")
    for (_, _, _, near), (_, _, _, far) in zip(found[0][1:], found[3][1:], strict=True):
        assert far > 10.0 * near, "the broken worker is left behind"
