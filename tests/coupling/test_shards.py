"""Workers of several processes: fully_shard or DistributedDataParallel inside, coupled over others.

Two workers of two processes are compared with two workers of one process that sees the batches of
both. test_coupling.py compares the latter with loops.

torch.distributed.fsdp, .tensor and .checkpoint are imported by functions: that takes a second, in
every process that collects the tests.
"""

import copy

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from consensus import Coupling
from consensus.server import digest

F64 = torch.float64
STEPS, KICK, KICKED = 15, 60.0, 12


def network():
    """Layers of 25, 18 and 4 coordinates: of two shards, the second has none of the last layer."""
    torch.manual_seed(0)
    layers = [nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1)]
    return nn.Sequential(*layers).to(F64)


def one_row():
    """The second of two shards has nothing at all."""
    torch.manual_seed(0)
    return nn.Linear(4, 1).to(F64)


def meshes():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("worker", "shard"))
    return mesh["worker"], mesh["shard"]


def fsdp(make, mesh):
    from torch.distributed.fsdp import fully_shard

    model = make()
    if isinstance(model, nn.Sequential):
        fully_shard(model[0], mesh=mesh)
    return fully_shard(model, mesh=mesh)  # the root: the other layers


def ddp(make, mesh):
    return nn.parallel.DistributedDataParallel(make(), process_group=mesh.get_group())


def batch(worker, t):
    generator = torch.Generator().manual_seed(1000 * t + worker)
    x = torch.randn(6, 4, generator=generator, dtype=F64)
    y = torch.sin((2.0 + worker) * x.sum(1, keepdim=True)) + 0.5 * worker
    # One large step that is cut, near the end: rounding is amplified after cuts.
    return x, y + (KICK * (-1) ** worker if t == KICKED else 0.0)


def whole(tensor):
    from torch.distributed.tensor import DTensor

    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def values(model):
    return torch.cat([whole(own).reshape(-1) for own in model.parameters()])


def here(model, shard):
    """The rows of each parameter that the shard of this number has, of two; None: all rows."""
    from torch.distributed.tensor import DTensor

    rows = []
    for own in model.parameters():
        own = own.detach()
        if isinstance(own, DTensor):
            own = own.to_local()
        elif shard is not None:
            own = [*own.chunk(2), own[:0]][shard]
        rows.append(own.reshape(-1).clone())
    return torch.cat(rows)


OPTIMIZERS = {
    "sgd": lambda own: torch.optim.SGD(own, lr=0.05),
    "nesterov": lambda own: torch.optim.SGD(own, lr=0.05, momentum=0.8, nesterov=True),
    "adamw": lambda own: torch.optim.AdamW(own, lr=0.05),
}


def one_step(model, optimizer, coupling, worker, t, rows):
    x, y = batch(worker, t)
    (model(x[rows]) - y[rows]).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    coupling.step()


def trained(model, worker, rows, optimizer, steps, shard, **options):
    """Every fifth z_j and u with the loss of u; the stats; whether u is the same on all workers.

    Of z_j and u the rows of this shard, so that nothing is gathered: that took as long as a step.
    """
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    coupling, seen = Coupling(model, optimizer, **options), []
    for t in range(steps):
        one_step(model, optimizer, coupling, worker, t, rows)
        if t % 5 == 4:
            seen.append(here(model, shard))
            with coupling.consensus(), torch.no_grad():
                seen += [here(model, shard), model(batch(0, 0)[0]).mean().reshape(1)]
    of_u = int(digest(coupling.state_dict()["u"]))
    stats = coupling.stats()
    coupling.close()
    digests = [None] * options["group"].size()
    dist.all_gather_object(digests, of_u, group=options["group"].get_group())
    return torch.cat(seen), stats, len(set(digests)) == 1


def diloco(own):
    return torch.optim.SGD(own, lr=0.7, momentum=0.9, nesterov=True)


EXPLICIT = {"implicit": False, "pull": 0.3, "eta": 1.5}
SEPARABLE = {**EXPLICIT, "eta": 1.0}
CASES = [  # wrapper, model, optimizer, potential, options; whether steps are cut
    (fsdp, network, "nesterov", "quad", {"period": 5}, False),
    (fsdp, network, "sgd", "cubic", {**EXPLICIT, "eta": 30.0}, False),
    (fsdp, network, "nesterov", "tan", EXPLICIT, True),
    (fsdp, network, "sgd", "tan", {"period": 5, **EXPLICIT}, True),
    (fsdp, network, "adamw", "quad", {"period": 5, "pull": 1.0, "outer": diloco}, False),
    (fsdp, network, "sgd", "tan", {"order": "jacobi", **EXPLICIT}, True),
    (fsdp, network, "sgd", "log_sep", {"local_pull": 0.1, **SEPARABLE}, True),
    (fsdp, network, "nesterov", "tan_sep", {"period": 5, **SEPARABLE}, True),
    (fsdp, network, "adamw", "tan", {"eta": 0.3}, False),
    (fsdp, network, "adamw", "pseudo_huber", {"eta": 0.1, "overlap": False}, False),
    (fsdp, network, "sgd", "log", {"period": 5, "fragments": 3, "local_pull": 0.1}, False),
    (fsdp, one_row, "sgd", "tan", EXPLICIT, True),
    (fsdp, one_row, "sgd", "tan_sep", SEPARABLE, True),
    (fsdp, one_row, "adamw", "log_sep", {"eta": 0.1, "period": 5}, False),
    (ddp, network, "nesterov", "tan", {"order": "jacobi", **EXPLICIT}, True),
]


def beside_whole_workers(group):
    workers, shards = meshes()
    worker, shard = workers.get_local_rank(), shards.get_local_rank()
    found = []
    for wrap, make, optimizer, potential, options, _ in CASES:
        settings = {"potential": potential, "group": workers, **options}
        half, part = slice(3 * shard, 3 * shard + 3), shard if wrap is fsdp else None
        common = optimizer, STEPS, part
        seen, stats, same = trained(wrap(make, shards), worker, half, *common, **settings)
        expected, of_whole, _ = trained(make(), worker, slice(6), *common, **settings)
        norms = [[*one["distance"].values(), *one["force"].values()] for one in (stats, of_whole)]
        apart = float((seen - expected).abs().max())
        in_norm = max(abs(a - b) for a, b in zip(*norms, strict=True))
        found.append((apart, in_norm, stats["cuts"], of_whole["cuts"], same))
    return found


@pytest.mark.ranks
def test_two_processes_are_a_worker(ranks):
    """Every fifth z_j and u, the loss of u, the norms of `stats`, and the cuts."""
    for answer in ranks(4, beside_whole_workers, timeout=240.0):
        for case, (apart, in_norm, cuts, expected, same) in zip(CASES, answer, strict=True):
            assert apart < 1e-9, case
            assert in_norm < 1e-9, case
            assert cuts == expected, case
            assert (cuts["u"] + cuts["z"] > 0) == case[-1], (case, cuts)
            assert same, f"u differs: {case}"


def average_buffers(group):
    from torch.distributed.fsdp import fully_shard

    workers, shards = meshes()
    model = network()
    model.register_buffer("seen", torch.tensor(float(group.rank), dtype=F64))
    fully_shard(model, mesh=shards)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    coupling = Coupling(model, optimizer, group=workers, buffers="mean", overlap=False)
    coupling.step()
    coupling.close()
    return model.seen.item()


@pytest.mark.ranks
def test_buffers_are_averaged_over_all_processes(ranks):
    assert ranks(4, average_buffers) == [1.5] * 4


# ---- Export and resume


def coupled(shards, workers, make_optimizer, **options):
    """A sharded model, its optimizer and its coupling."""
    model = fsdp(network, shards)
    optimizer = make_optimizer(model.parameters())
    return model, optimizer, Coupling(model, optimizer, group=workers, **options)


def export(group, folder):
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        set_model_state_dict,
    )

    workers, shards = meshes()
    worker, shard = workers.get_local_rank(), shards.get_local_rank()
    half = slice(3 * shard, 3 * shard + 3)
    model, optimizer, coupling = coupled(shards, workers, OPTIMIZERS["sgd"], eta=0.3)
    for t in range(4):
        one_step(model, optimizer, coupling, worker, t, half)
    with torch.no_grad():
        model(batch(0, 0)[0])  # the root keeps its gathered parameters
    state = coupling.consensus_state_dict()
    with coupling.consensus():
        options = StateDictOptions(full_state_dict=True)
        expected = get_model_state_dict(model, options=options)  # on rank 0 of each worker
    full = {name: own.full_tensor() for name, own in state.items()}
    same = all(torch.equal(full[name], own) for name, own in expected.items())
    places = [(own.placements, own.shape == full[name].shape) for name, own in state.items()]
    before = values(model)
    checkpoint.save({"model": state}, checkpoint_id=folder)
    plain = {"model": network().state_dict()}
    checkpoint.load(plain, checkpoint_id=folder)
    set_model_state_dict(model, state)
    now = torch.cat([own.reshape(-1) for own in full.values()])
    loaded = torch.cat([own.reshape(-1) for own in plain["model"].values()])
    facts = [torch.equal(values(model), now), torch.equal(loaded, now)]
    facts.append(not torch.equal(before, now))
    coupling.close()
    return same, set(places), facts, full


@pytest.mark.ranks
def test_u_is_exported_as_dtensors(ranks, tmp_path):
    """As `get_model_state_dict` inside `consensus()`; a plain model reads a checkpoint of it."""
    from torch.distributed.tensor import Shard

    answers = ranks(4, export, str(tmp_path / "checkpoint"))
    for same, places, facts, full in answers:
        assert same
        assert places == {((Shard(0),), True)}
        assert facts == [True, True, True]
        assert all(torch.equal(own, answers[0][3][name]) for name, own in full.items())


RESUMED = [
    ("nesterov", {"potential": "tan", "implicit": False, "eta": 1.5, "period": 2}),
    ("adamw", {"potential": "tan", "eta": 0.3}),
    ("adamw", {"potential": "log_sep", "eta": 0.3, "period": 3, "fragments": 2}),
]


def resume(group):
    workers, shards = meshes()
    worker, shard = workers.get_local_rank(), shards.get_local_rank()
    half, found = slice(3 * shard, 3 * shard + 3), []
    for optimizer, options in RESUMED:
        ends = []
        for stop in (None, 5):
            model, own, coupling = coupled(shards, workers, OPTIMIZERS[optimizer], **options)
            for t in range(9):
                if t == stop:
                    states = copy.deepcopy(
                        [model.state_dict(), own.state_dict(), coupling.state_dict()]
                    )
                    coupling.close()
                    model, own, coupling = coupled(
                        shards, workers, OPTIMIZERS[optimizer], **options
                    )
                    for target, state in zip((model, own, coupling), states, strict=True):
                        target.load_state_dict(state)
                one_step(model, own, coupling, worker, t, half)
            state = coupling.state_dict()
            coupling.close()
            ends.append([values(model), state["u"], state["z"]])
        found.append(all(map(torch.equal, *ends)))
    return found


@pytest.mark.ranks
def test_sharded_workers_resume_to_the_same_bits(ranks):
    assert ranks(4, resume) == [[True] * len(RESUMED)] * 4


def in_bfloat16(group):
    """Given gradients, sharded and whole: all operations are elementwise, so bits are equal."""
    from torch.distributed.tensor import Shard, distribute_tensor

    workers, shards = meshes()
    worker, found = workers.get_local_rank(), []
    for potential in ("quad", "tan_sep"):
        ends = []
        for spread in (True, False):
            model = network().bfloat16()
            model = fsdp(lambda model=model: model, shards) if spread else model
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            coupling = Coupling(model, optimizer, potential, eta=0.1, period=3, group=workers)
            for t in range(7):
                for i, own in enumerate(model.parameters()):
                    grad = torch.full(own.shape, (-1.0) ** worker * (0.3 + i + t)).bfloat16()
                    own.grad = distribute_tensor(grad, shards, [Shard(0)]) if spread else grad
                optimizer.step()
                coupling.step()
            assert coupling.state_dict()["u"].dtype == torch.float32
            ends.append([values(model), *map(whole, coupling.consensus_state_dict().values())])
            coupling.close()
        found.append(all(map(torch.equal, *ends)))
    return found


@pytest.mark.ranks
def test_shards_in_bfloat16_have_a_float32_u(ranks):
    assert ranks(4, in_bfloat16) == [[True, True]] * 4


# ---- Refusals


def hsdp(workers, shards, worker, shard):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("worker", "shard"))
    return fsdp(network, mesh), {}


def over_all(workers, shards, worker, shard):
    return fsdp(network, shards), {"group": None}


def ddp_over_all(workers, shards, worker, shard):
    return nn.parallel.DistributedDataParallel(network()), {}


def partly(workers, shards, worker, shard):
    from torch.distributed.fsdp import fully_shard

    model = network()
    fully_shard(model[0], mesh=shards)
    return model, {}


def first_version(workers, shards, worker, shard):
    """A module of that name: torch's own refuses to be made without an accelerator."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    return type(FullyShardedDataParallel.__name__, (nn.Sequential,), {})(network()), {}


def other_pull_on_one(workers, shards, worker, shard):
    return fsdp(network, shards), {"pull": 0.2 if (worker, shard) == (1, 1) else 0.5}


def wrong_on_one(workers, shards, worker, shard):
    return fsdp(network, shards), {"period": 0 if (worker, shard) == (1, 1) else 1}


def other_weights_in_one_shard(workers, shards, worker, shard):
    model = fsdp(network, shards)
    if (worker, shard) == (1, 1):
        with torch.no_grad():
            next(model.parameters()).to_local().view(-1)[0] += 1e-9
    return model, {}


def other_pull_in_a_shard(workers, shards, worker, shard):
    return fsdp(network, shards), {"pull": 0.2 if shard else 0.5}


def other_pull_with_ddp(workers, shards, worker, shard):
    return ddp(network, shards), {"pull": 0.2 if shard else 0.5}


def optimizer_before(workers, shards, worker, shard):
    from torch.distributed.fsdp import fully_shard

    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return fully_shard(model, mesh=shards), {"optimizer": optimizer}


def nothing_wrong(workers, shards, worker, shard):
    return fsdp(network, shards), {}


REFUSED = {
    hsdp: "parameter `0.weight` is placed as (Replicate(), Shard(dim=0)) on a mesh of 2 dimensions",
    over_all: "`model` is wrapped in DistributedDataParallel or fully_shard over processes of",
    ddp_over_all: "`model` is wrapped in DistributedDataParallel or fully_shard over processes of",
    partly: "parameter `2.weight` is not sharded; allowed: all parameters or none",
    first_version: "`model` has FullyShardedDataParallel modules; allowed: fully_shard",
    other_pull_on_one: "`pull` on rank 1 differs from rank 0 (0.2, 0.5)",
    wrong_on_one: "rank 1: `period` is 0; allowed: a whole number >= 1",
    other_weights_in_one_shard: "process 1: `weights` on rank 1 differs from rank 0",
    other_pull_in_a_shard: "`pull` on rank 1 differs from rank 0 (0.2, 0.5)",
    other_pull_with_ddp: "`pull` on rank 1 differs from rank 0 (0.2, 0.5)",
    optimizer_before: "`optimizer` has 6 parameters that are not the model's",
    nothing_wrong: None,
}


def messages(group, cases):
    workers, shards = meshes()
    said = []
    for case in cases:
        model, options = case(workers, shards, workers.get_local_rank(), shards.get_local_rank())
        optimizer = options.pop("optimizer", None) or torch.optim.SGD(model.parameters(), lr=0.1)
        try:
            Coupling(model, optimizer, "tan", **{"group": workers, **options}).close()
            said.append(None)
        except ValueError as error:
            said.append(str(error))
    return said


@pytest.mark.ranks
def test_all_processes_refuse_alike(ranks):
    for said in ranks(4, messages, list(REFUSED)):
        for text, (case, wanted) in zip(said, REFUSED.items(), strict=True):
            assert text is None if wanted is None else wanted in text, case


def restart_apart(group):
    """One shard of one worker has other weights."""
    workers, shards = meshes()
    model, _, coupling = coupled(shards, workers, OPTIMIZERS["sgd"], potential="tan")
    with torch.no_grad():
        model[0].weight.to_local().view(-1)[0] += group.rank == 3
    with pytest.raises(ValueError, match="`weights` on rank 1 differs"):
        coupling.restart()
    coupling.close()


@pytest.mark.ranks
def test_restart_with_another_shard_is_refused_by_all(ranks):
    ranks(4, restart_apart)
