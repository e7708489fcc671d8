"""Workers of several processes: fully_shard or DistributedDataParallel inside, coupled over others.

Two workers of two processes are compared with two workers of one process that sees the batches of
both. test_coupling.py compares the latter with loops.
"""

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from consensus import Coupling
from consensus.server import digest

F64 = torch.float64
STEPS, KICK, KICKED = 50, 60.0, 45


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
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def values(model):
    return torch.cat([whole(own).reshape(-1) for own in model.parameters()])


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


def trained(model, worker, rows, optimizer, steps, **options):
    """Every fifth z_j and u with the loss of u; the stats; whether u is the same on all workers."""
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    coupling, seen = Coupling(model, optimizer, **options), []
    for t in range(steps):
        one_step(model, optimizer, coupling, worker, t, rows)
        if t % 5 == 4:
            seen.append(values(model))
            with coupling.consensus(), torch.no_grad():
                seen += [values(model), model(batch(0, 0)[0]).mean().reshape(1)]
    of_u = int(digest(coupling.state_dict()["u"]))
    stats = coupling.stats()
    coupling.close()
    digests = [None] * options["group"].size()
    dist.all_gather_object(digests, of_u, group=options["group"].get_group())
    return torch.cat(seen), stats, len(set(digests)) == 1


EXPLICIT = {"implicit": False, "pull": 0.3, "eta": 1.5}
SEPARABLE = {**EXPLICIT, "eta": 1.0}
CASES = [  # wrapper, model, optimizer, potential, options; whether steps are cut
    (fsdp, network, "nesterov", "quad", {"period": 5}, False),
    (fsdp, network, "sgd", "cubic", {**EXPLICIT, "eta": 30.0}, False),
    (fsdp, network, "nesterov", "tan", EXPLICIT, True),
    (fsdp, network, "sgd", "tan", {"period": 5, **EXPLICIT}, True),
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
        half = slice(3 * shard, 3 * shard + 3)
        seen, stats, same = trained(wrap(make, shards), worker, half, optimizer, STEPS, **settings)
        expected, of_whole, _ = trained(make(), worker, slice(6), optimizer, STEPS, **settings)
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
