"""Coupling with what users bring: optimizers, scalers, compilers, schedulers, checkpoints, kills.

A loop of the user is a function that makes the models and optimizers of worker j and one iteration.
The ranks couple it; `by_hand` runs the same loop for all workers in one process and couples their
parameters by the formulas for the quadratic potential.
"""

import copy
import functools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from consensus import Coupling
from consensus.server import digest
from tests.testing import user_loop
from tests.testing.launch import Ranks

M, STEPS = 2, 14
F64 = torch.float64
OPTIONS = {"pull": 0.3, "outer": 0.8, "period": 3}


def vector(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def network(bias=True, dtype=F64):
    torch.manual_seed(3)
    layers = nn.Linear(6, 5, bias=bias), nn.Tanh(), nn.Linear(5, 3, bias=bias)
    return nn.Sequential(*layers).to(dtype)


def batch(j, t, dtype=F64):
    generator = torch.Generator().manual_seed(1000 * j + t)
    x = torch.randn(8, 6, dtype=dtype, generator=generator)
    return x, (2.0 + j) * x[:, :3].sin()


def coupled(group, loops, options):
    """u and z_j after each call, of each coupled model of each loop, and the digests of u."""
    return [couple(loop(group.rank), options) for loop in loops]


def couple(loop, options):
    parts, iterate = loop
    couplings = [Coupling(model, optimizer, **options) for model, optimizer in parts]
    us, zs = [], []
    for t in range(STEPS):
        iterate(t)
        for coupling in couplings:
            coupling.step()
        zs.append(torch.cat([vector(model) for model, _ in parts]))
        us.append(torch.cat([coupling.state_dict()["u"] for coupling in couplings]))
    for coupling in couplings:
        coupling.close()
    return torch.stack(us).numpy(), torch.stack(zs).numpy(), int(digest(torch.cat(us)))


class Average:
    """The copies z (M, n) of one model and u (n,), by the formulas."""

    def __init__(self, models, pull, outer, period, overlap):
        self.models, self.pull, self.outer = models, pull, outer
        self.period, self.overlap = period, overlap
        self.z = torch.stack([vector(model) for model in models])
        self.u = self.z[0].clone()
        self.mean = self.z.mean(0) if overlap else None

    def step(self, t):
        d = torch.stack([vector(model) for model in self.models]) - self.z
        self.communicate()
        self.z = self.z + d
        if (t + 1) % self.period == 0:
            self.mean = self.z.mean(0)
            if not self.overlap:
                self.communicate()
        for model, own in zip(self.models, self.z, strict=True):
            nn.utils.vector_to_parameters(own.clone(), model.parameters())

    def communicate(self):
        if self.mean is not None:
            self.u = self.u + self.outer * (self.mean - self.u)
            self.z = self.z + self.pull * (self.u - self.z)
        self.mean = None


def by_hand(loop, pull, outer, period, overlap):
    """As `coupled` for one loop, with z of all workers: (T, n), (T, M, n)."""
    workers = [loop(j) for j in range(M)]
    models = zip(*([model for model, _ in parts] for parts, _ in workers), strict=True)
    averages = [Average(own, pull, outer, period, overlap) for own in models]
    us, zs = [], []
    for t in range(STEPS):
        for _, iterate in workers:
            iterate(t)
        for average in averages:
            average.step(t)
        us.append(torch.cat([average.u for average in averages]))
        zs.append(torch.cat([average.z for average in averages], 1))
    return torch.stack(us).numpy(), torch.stack(zs).numpy()


def check_on_ranks(ranks, loops, overlap, atol=1e-12):
    answers = ranks(M, coupled, loops, OPTIONS | {"overlap": overlap})
    for i, loop in enumerate(loops):
        assert len({answer[i][2] for answer in answers}) == 1, f"u differs: {loop}"
        us, zs = by_hand(loop, **OPTIONS, overlap=overlap)
        assert np.abs(us[-1] - us[0]).max() > 1e-4, f"u stands still: {loop}"
        for j, (own_us, own_zs, _) in enumerate(answer[i] for answer in answers):
            np.testing.assert_allclose(own_us, us, rtol=0, atol=atol, err_msg=f"{loop}")
            np.testing.assert_allclose(own_zs, zs[:, j], rtol=0, atol=atol, err_msg=f"{loop}")


# ---- Optimizers


def optimizers():
    """The optimizers of torch.optim for dense parameters, those of later versions too."""
    found = [value for value in vars(torch.optim).values() if isinstance(value, type)]
    without = (torch.optim.Optimizer, torch.optim.SparseAdam)  # it takes sparse gradients only
    return [one for one in found if issubclass(one, torch.optim.Optimizer) and one not in without]


VARIANTS = [
    *((one.__name__, {}) for one in optimizers()),
    *((name, {"fused": True}) for name in ("SGD", "Adagrad", "Adam", "AdamW")),
    ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}),
    ("SGD", {"maximize": True, "foreach": True}),
    ("AdamW", {"amsgrad": True}),
    ("LBFGS", {"line_search_fn": "strong_wolfe"}),
]


def with_optimizer(j, name, options):
    """A loop with an optimizer of torch.optim, called with a closure."""
    model = network(bias=name != "Muon")  # Muon takes matrices only
    if name == "LBFGS":  # a longer history amplifies rounding by 10^5 in these iterations
        options = {"max_iter": 2, "history_size": 2, **options}
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.02, **options)

    def iterate(t):
        x, y = batch(j, t)

        def closure():
            optimizer.zero_grad()
            loss = mse_loss(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)

    return [(model, optimizer)], iterate


@pytest.mark.ranks
@pytest.mark.parametrize("overlap", [False, True])
def test_every_optimizer_of_torch(ranks, overlap):
    assert {"SGD", "AdamW", "LBFGS", "Muon"} <= {name for name, _ in VARIANTS}
    loops = [functools.partial(with_optimizer, name=name, options=own) for name, own in VARIANTS]
    check_on_ranks(ranks, loops, overlap)


# ---- What stands between the loss and the optimizer step


def accumulated(j):
    """Two backward passes a step, clipping, parameter groups and two schedulers."""
    model = network()
    groups = [{"params": model[0].parameters(), "lr": 0.05}, {"params": model[2].parameters()}]
    optimizer = torch.optim.AdamW(groups, lr=0.02)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    schedule = torch.optim.lr_scheduler.ChainedScheduler([warmup, cosine])

    def iterate(t):
        for part in range(2):
            x, y = batch(j, 100 * part + t)
            (mse_loss(model(x), y) / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        schedule.step()

    return [(model, optimizer)], iterate


def adversarial(j):
    """Two coupled models whose losses depend on each other, as in a GAN."""
    generator = network()
    critic = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    of_generator = torch.optim.Adam(generator.parameters(), lr=0.01, betas=(0.5, 0.9))
    of_critic = torch.optim.RMSprop(critic.parameters(), lr=0.01)

    def iterate(t):
        x, y = batch(j, t)
        of_critic.zero_grad()
        (critic(generator(x).detach()).mean() - critic(y).mean()).backward()
        of_critic.step()
        if t % 2:
            of_generator.zero_grad()
            (-critic(generator(x)).mean()).backward()
            of_generator.step()

    return [(generator, of_generator), (critic, of_critic)], iterate


SKIPPED = (3, 4, 8)


def scaled(j, fused):
    """GradScaler, which skips some steps of worker 1 only."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=3)
    scales = [256.0]

    def iterate(t):
        x, y = batch(j, t)
        loss = mse_loss(model(x), y) * (math.inf if j == 1 and t in SKIPPED else 1.0)
        before = vector(model)
        scaler.scale(loss).backward()
        if not fused:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
        skipped = j == 1 and t in SKIPPED
        assert torch.equal(vector(model), before) == skipped
        assert (scales[-1] == 0.5 * scales[-2]) == skipped

    return [(model, optimizer)], iterate


@pytest.mark.ranks
@pytest.mark.parametrize("overlap", [False, True])
def test_clipping_schedulers_scalers_and_two_models(ranks, overlap):
    scalers = [functools.partial(scaled, fused=fused) for fused in (False, True)]
    check_on_ranks(ranks, [accumulated, adversarial, *scalers], overlap)


def autocast(j, dtype):
    """Mixed precision: float32 parameters, and matrix products in bfloat16 or float16."""
    model = network(dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=dtype is torch.float16)

    def iterate(t):
        x, y = batch(j, t, torch.float32)
        if j == 1 and t in SKIPPED and scaler.is_enabled():
            x = x * 1e6  # infinite in float16
        with torch.autocast("cpu", dtype=dtype):
            out = model(x)
            assert out.dtype == dtype
        scaler.scale(mse_loss(out.float(), y)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return [(model, optimizer)], iterate


@pytest.mark.ranks
def test_autocast(ranks):
    """Both round u in float32, and the loss sees weights of 8 or 11 bits."""
    loops = [functools.partial(autocast, dtype=one) for one in (torch.bfloat16, torch.float16)]
    check_on_ranks(ranks, loops, overlap=True, atol=1e-3)


# ---- torch.compile, copies


def compiled(j, how):
    """`accumulated` with a compiled model; Coupling gets the wrapper or the module inside."""
    ((model, optimizer),), _ = accumulated(j)
    if how == "in place":
        model.compile(backend="eager")
    run = torch.compile(model, backend="eager") if how in ("wrapper", "inside") else model

    def iterate(t):
        x, y = batch(j, t)
        optimizer.zero_grad()
        mse_loss(run(x), y).backward()
        optimizer.step()

    return [(run if how == "wrapper" else model, optimizer)], iterate


@pytest.mark.parametrize("how", ["wrapper", "inside", "in place"])
def test_a_compiled_model_has_the_bits_of_a_plain_one(how):
    options = OPTIONS | {"potential": "tan", "eta": 0.1}
    plain, other = (couple(compiled(0, name), options) for name in ("plain", how))
    assert plain[2] == other[2]
    np.testing.assert_array_equal(other[1], plain[1])


def test_a_compiled_model_is_u_inside_consensus():
    ((wrapper, optimizer),), iterate = compiled(0, "wrapper")
    coupling = Coupling(wrapper, optimizer, **OPTIONS)
    for t in range(5):
        iterate(t)
        coupling.step()
    x, _ = batch(0, 0)
    state = coupling.consensus_state_dict()
    assert list(state) == list(wrapper.state_dict())
    plain = network()
    plain.load_state_dict({name.removeprefix("_orig_mod."): own for name, own in state.items()})
    copied = wrapper(x)
    with coupling.consensus(), torch.no_grad():
        torch.testing.assert_close(wrapper(x), plain(x), rtol=0, atol=1e-15)
    assert torch.equal(wrapper(x), copied)
    assert not torch.allclose(copied, plain(x))


def test_an_averaged_model_follows_u():
    """A deep copy by torch.optim.swa_utils takes u inside `consensus`, and stays as it is."""
    ((model, optimizer),), iterate = accumulated(0)
    coupling = Coupling(model, optimizer, **OPTIONS)
    averaged, us = torch.optim.swa_utils.AveragedModel(model), []
    for t in range(6):
        iterate(t)
        coupling.step()
        with coupling.consensus():
            averaged.update_parameters(model)
            snapshot = copy.deepcopy(model)
        us.append(coupling.state_dict()["u"])
        assert torch.equal(vector(snapshot), us[-1])
    torch.testing.assert_close(vector(averaged), torch.stack(us).mean(0), rtol=0, atol=1e-14)


# ---- torch.distributed.checkpoint and kills


def checkpointed(group, folder, how):
    """z_j, u and the digest of u without and with a pass through a checkpoint in the middle."""
    found = []
    for resumed in (False, True):
        ((model, optimizer),), iterate = accumulated(group.rank)
        coupling = Coupling(model, optimizer, "tan", eta=0.2, period=4)
        for t in range(8):
            iterate(t)
            coupling.step()
        if resumed:  # a sum is on its way
            save_or_load(False, group.rank, folder, how, (model, optimizer, coupling))
            coupling.close()
            ((model, optimizer),), iterate = accumulated(group.rank)
            coupling = Coupling(model, optimizer, "tan", eta=0.2, period=4)
            save_or_load(True, group.rank, folder, how, (model, optimizer, coupling))
        for t in range(8, 14):
            iterate_without_schedule(model, optimizer, group.rank, t)
            coupling.step()
        u = coupling.state_dict()["u"]
        found.append((vector(model).numpy(), u.numpy(), int(digest(u))))
        coupling.close()
    return found


def iterate_without_schedule(model, optimizer, j, t):
    x, y = batch(j, t)
    optimizer.zero_grad()
    mse_loss(model(x), y).backward()
    optimizer.step()


def save_or_load(loads, rank, folder, how, parts):
    """All in one directory. A name holds one value for all ranks, so each rank has its own name."""
    # Here: it imports sympy, in every process that collects the tests.
    from torch.distributed.checkpoint import load, save
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    act = load if loads else save
    model, optimizer, coupling = parts
    of_model, of_optimizer = get_state_dict(model, optimizer)
    name = f"worker{rank}"
    if how == "one state":
        state = {"model": of_model, "optimizer": of_optimizer, "coupling": coupling.state_dict()}
        act({name: state}, checkpoint_id=folder)
        of_coupling = state["coupling"]
    else:
        state = {"model": of_model, "optimizer": of_optimizer}
        act({name: state, f"coupling{rank}": coupling}, checkpoint_id=folder)
        of_coupling = None  # torch has loaded it
    if loads:
        own, others = state["model"], state["optimizer"]
        set_state_dict(model, optimizer, model_state_dict=own, optim_state_dict=others)
        if of_coupling is not None:
            coupling.load_state_dict(of_coupling)


@pytest.mark.ranks
@pytest.mark.parametrize("how", ["one state", "the coupling as an object"])
def test_distributed_checkpoint(ranks, tmp_path, how):
    answers = ranks(M, checkpointed, tmp_path / "checkpoint", how)
    for straight, resumed in answers:
        np.testing.assert_array_equal(resumed[0], straight[0])
        np.testing.assert_array_equal(resumed[1], straight[1])
    assert len({digest for answer in answers for *_, digest in answer}) == 1
    assert not np.array_equal(answers[0][0][0], answers[1][0][0]), "the copies differ"


def start(folder, *arguments):
    folder.mkdir(exist_ok=True)
    return Ranks(M, [str(folder), *arguments], folder, module=user_loop.__name__)


def results(folder):
    return [torch.load(folder / f"result{rank}.pt") for rank in range(M)]


@pytest.mark.ranks
def test_a_killed_run_continues_to_the_same_bits(tmp_path):
    with start(tmp_path / "straight") as run:
        assert run.wait(60) == [0, 0], run.err(0)
    with start(tmp_path / "killed", "--kill", "1", "--at", "14") as run:
        assert run.wait(60) == [1, -9], run.err(0)
        assert "rank 1" in run.err(0)
    with start(tmp_path / "killed") as run:
        assert run.wait(60) == [0, 0], run.err(0)
        assert "from iteration 12" in run.out(0)
    straight, continued = results(tmp_path / "straight"), results(tmp_path / "killed")
    for own, other in zip(straight, continued, strict=True):
        assert own.keys() == other.keys()
        assert [key for key in own if not torch.equal(own[key], other[key])] == []
    assert int(digest(straight[0]["u"])) == int(digest(straight[1]["u"]))
    assert not torch.equal(straight[0]["z"], straight[1]["z"])
