"""deterministic=true: one sequence of bits on every layout whose blocks are nodes of the tree."""

import re

import pytest
import torch

import consensus
from consensus.comm import Launch, ProcessGroup, Solo
from consensus.run.checks import ConfigError
from consensus.run.plan import make_plan, set_determinism
from consensus.run.trainer import Trainer
from consensus.server import digest
from tests.testing.small_runs import without_clocks

RUN = ["device=cpu", "deterministic=true", "algorithm.batch_size=4", "output.eval_every=2"]
RUN += ["algorithm.iterations=4", "output.tensorboard=false", "output.checkpoint_every=2"]
SMALL = "model=logistic"

CASES = {
    "quad": ["potential=quad", SMALL, "workers=12"],
    "cubic": ["potential=cubic", SMALL, "workers=8", "algorithm.order=jacobi"],
    "tan": ["potential=tan", "potential.eta=0.02", "model=lenet5", "workers=4"],
    "log, cut": ["potential=log", "potential.eta=0.01", SMALL, "workers=8", "algorithm.sigma=0.05"],
    "tan_sep, cut": ["potential=tan_sep", "potential.eta=0.003", SMALL, "workers=4"],
    "implicit": ["potential=log_cosh", SMALL, "workers=8", "algorithm.coupling=implicit"],
    "exact": ["potential=tan_sep", SMALL, "workers=4", "algorithm.u_update=exact"],
    "exact, radial": ["potential=tan", SMALL, "workers=4", "algorithm.u_update=exact"],
    "ddp": ["algorithm=ddp", "potential=quad", SMALL, "workers=8"],
    "outer": ["algorithm=diloco", "algorithm.period=2", SMALL, "workers=4"],
    "delay": ["potential=quad", SMALL, "workers=8", "algorithm.period=3", "algorithm.delay=2"],
    "delay, cut": [
        *("potential=log", "potential.eta=0.01", SMALL, "workers=4", "algorithm.sigma=0.05"),
        *("algorithm.period=2", "algorithm.delay=1"),
    ],
    "stragglers": ["potential=tan", SMALL, "workers=4", "algorithm.step_every=[1,2,1,3]"],
    "nine": ["potential=quad", SMALL, "workers=9"],
    "stationarity": [
        "potential=tan",
        SMALL,
        "workers=4",
        "stationarity.every=4",
        "stationarity.samples=99",
    ],
}


def train(group, configs, shared_memory):
    """Train to the end. For each config the rows without clocks, and the digests of own z_j."""
    own, launch = group, Launch(group.rank, group.size, group.rank, group.size)
    if group.size > 1:
        own = ProcessGroup(group.handle, group.device, 60.0, shared_memory=shared_memory, tree=True)
    threads = torch.get_num_threads()
    set_determinism(configs[0])
    try:
        return [_train(Trainer(make_plan(config, launch), own)) for config in configs]
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
        if own is not group:
            own.close()


def _train(trainer):
    trainer.run()
    rows = [without_clocks(row) for row in trainer.rows]
    for row in rows:
        row.get("stationarity", {}).pop("seconds", None)
    return rows, [int(digest(z)) for z in trainer.algorithm.worker.z]


def run(ranks, size, configs, shared_memory=True):
    """For each config the rows, which are the same on all ranks, and the digests of all z_j."""
    found = []
    for answers in zip(*ranks(size, train, configs, shared_memory), strict=True):
        rows = answers[0][0]
        assert all(theirs == rows for theirs, _ in answers), "the ranks differ"
        found.append((rows, [one for _, own in answers for one in own]))
    return found


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The cases on one process."""
    folder = tmp_path_factory.mktemp("one")
    configs = [compose(name, folder) for name in CASES]
    return dict(zip(CASES, train(Solo(), configs, True), strict=True))


def compose(name, folder, *others):
    where = folder / name.replace(", ", "_")
    return consensus.compose(*RUN, *CASES[name], f"output.run_dir={where}", *others)


@pytest.mark.ranks
@pytest.mark.parametrize(("size", "shared_memory"), [(2, True), (2, False), (4, True), (3, False)])
def test_layouts_have_the_same_bits(reference, ranks, tmp_path, size, shared_memory):
    names = ["nine"] if size == 3 else [name for name in CASES if name != "nine"]
    if not shared_memory:
        names = names[::3]  # Gloo adds two or four numbers along the same tree, but not three
    elif size == 2:  # four ranks take all cases, and their sums contain those of two
        names = names[::2]
    configs = [compose(name, tmp_path) for name in names]
    for name, found in zip(names, run(ranks, size, configs, shared_memory), strict=True):
        assert found == reference[name], name
        if "cut" in name:
            assert found[0][-1]["cuts_u"] > 0
            assert found[0][-1]["cuts_z"] > 0


@pytest.mark.ranks
def test_a_run_continues_on_another_layout_to_the_same_bits(reference, ranks, tmp_path):
    """One run, on 2, then 4, then 2 processes."""
    names = ["tan", "cubic", "outer"]
    for size, iterations in ((2, 1), (4, 3), (2, 4)):
        others = f"algorithm.iterations={iterations}", "resume=auto"
        configs = [compose(name, tmp_path, *others) for name in names]
        found = run(ranks, size, configs)
    for name, (rows, digests) in zip(names, found, strict=True):
        wanted, all_digests = reference[name]
        assert (rows[-1], digests) == (wanted[-1], all_digests)


@pytest.mark.parametrize(
    ("overrides", "size", "line"),
    [
        (["workers=12"], 3, "`workers` is 12; allowed: with deterministic=true on 1, 2, 4 or 12 "),
        (["workers=6"], 3, "`workers` is 6; allowed: with deterministic=true on 1, 2 or 6 "),
        (["workers=9"], 3, None),
        (["workers=12", "deterministic=false"], 3, None),
        ([], 7, None),
    ],
)
def test_a_layout_between_the_nodes_is_refused(make_config, overrides, size, line):
    config = make_config(*RUN, SMALL, *overrides)
    if line is None:
        make_plan(config, Launch(0, size, 0, size))
        return
    with pytest.raises(ConfigError, match=re.escape(line)):
        make_plan(config, Launch(0, size, 0, size))


def test_compressed_sums_are_refused(make_config):
    line = "`group.compress` is bf16; allowed: null with deterministic=true"
    with pytest.raises(ConfigError, match=re.escape(line)):
        make_config(*RUN, "group.compress=bf16")
