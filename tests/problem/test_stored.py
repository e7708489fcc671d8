"""Samples in storage: read ahead to the same bits as in memory, in every layout and after a resume.

The runs train logistic regression on 40 digits.
"""

import gc
import importlib
import multiprocessing
import os
import random
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import IterableDataset, Subset, TensorDataset, get_worker_info
from torch.utils.data._utils import signal_handling

import consensus.run.trainer
from consensus.algorithm import Consensus
from consensus.comm import Launch
from consensus.problem import (
    LOSSES,
    Dataset,
    Minibatches,
    MinibatchRisk,
    Risk,
    SampleError,
    Samples,
    build_model,
    stream_seed,
)
from consensus.problem.reader import read
from consensus.problem.stored import ReadAhead
from consensus.replay import obstacle_to_replay
from consensus.run.checks import ConfigError
from consensus.run.health import HealthCheck
from consensus.run.limits import MachineError, machine_failures
from consensus.run.plan import make_plan
from consensus.run.signals import RunStopped
from consensus.run.trainer import Trainer
from consensus.sweep.population_trainer import Member, populations
from tests.testing.launch import Ranks
from tests.testing.small_runs import rows_of, same_rows

PLUGIN = "tests.testing.stored_digits"
SMALL = [
    *("model=logistic", "device=cpu", "workers=4", "algorithm.batch_size=3", "potential=tan"),
    *("algorithm.iterations=12", "output.eval_every=8", "output.checkpoint_every=100"),
    *("dtype=float64", "output.tensorboard=false"),
    *("data.validation=0.25", "data.partition=label_skew", "data.alpha=5"),
]


def samples(count=12):
    x = torch.arange(count * 6.0).view(count, 1, 2, 3)
    return Samples(x, torch.arange(count) % 3)


@pytest.fixture(autouse=True, scope="module")
def plugin():
    """The plugin, imported here so that its data sets are entries for this module alone."""
    return importlib.import_module(PLUGIN)


def loaders():
    """The loader processes of this process, which have not ended."""
    kind = multiprocessing.get_context("fork").Process  # ranks of other tests are of another
    return [child for child in multiprocessing.active_children() if isinstance(child, kind)]


def running(pid):
    """Whether a process is there, and not one that has ended and waits for its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def gone(pids, within_s=30.0):
    """Whether processes end in time."""
    pids, deadline = list(pids), time.monotonic() + within_s
    while any(map(running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(running, pids))


# ---- samples by number


def test_the_interface_is_that_of_samples():
    """On the same numbers, uint8 pixels and a dict of inputs, each operation gives the same."""
    pixels = torch.arange(60, dtype=torch.uint8).view(10, 3, 2)
    tokens, y = torch.arange(20, dtype=torch.int32).view(10, 2), torch.rand(10, dtype=torch.float64)

    class Pairs:
        def __len__(self):
            return 10

        def __getitem__(self, i):
            return {"image": pixels[i], "tokens": tokens[i].numpy()}, (float(y[i]), y[i] > 0.5)

    memory = Samples({"image": pixels, "tokens": tokens}, (y, y > 0.5))
    both = [Dataset(train, train).to("cpu", torch.float32) for train in (memory, Pairs())]
    assert [data.num_classes for data in both] == [None, None]
    assert both[0].remarks == both[1].remarks != ()
    index = torch.tensor([7, 2, 2, 9])
    for use in (
        lambda s: [s[3:5], s.select(index), *s.split(4), *s.split(3, index)],
        lambda s: [*s.subset(index).split(9)],
        lambda s: [x for rank in range(3) for x in s.share(rank, 3).split(2)],
    ):
        expected, found = (use(data.train) for data in both)
        assert len(found) == len(expected)
        for one, other in zip(expected, found, strict=True):
            assert len(one) == len(other)
            for x, x_other in zip(one.tensors(), other.tensors(), strict=True):
                assert x.dtype == x_other.dtype
                assert torch.equal(x, x_other)
    held = [data.hold_out(0.3) for data in both]
    assert len(held[1].train) == 7
    for name in ("train", "validation"):
        expected, found = (next(data.splits[name].split(10)).targets[0] for data in held)
        assert torch.equal(expected, found)
    assert len(both[1].train.share(11, 12)) == 0
    assert list(both[1].train.share(11, 12).split(5)) == []


def test_images_of_pil_become_channels_of_pixels():
    array = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)

    class Images:
        classes = ("one", "two")

        def __len__(self):
            return 2

        def __getitem__(self, i):
            return (Image.fromarray(array), Image.fromarray(array[:, :, 0])), i

    data = Dataset(Images(), Images())
    assert data.num_classes == 2
    color, gray = data.to("cpu", torch.float64).train[:2].inputs
    torch.testing.assert_close(color[1], torch.tensor(array).double().permute(2, 0, 1) / 255)
    torch.testing.assert_close(gray[0, 0], torch.tensor(array[:, :, 0]).double() / 255)


class Listed(TensorDataset):
    """Of torch, with an attribute `targets`."""

    def __init__(self, found, targets):
        super().__init__(found.inputs, found.targets)
        self.targets = targets


def test_classes_are_those_that_the_dataset_lists():
    found = samples()
    plain = TensorDataset(found.inputs, found.targets)
    for targets in (found.targets, found.targets.tolist(), found.targets.numpy()):
        listed = Listed(found, targets)
        data = Dataset(listed, listed)
        assert data.num_classes == 3
        assert data.labels.tolist() == found.targets.tolist()
        part = Dataset(Subset(listed, [4, 2]), listed)
        assert part.labels.tolist() == [1, 2]
        assert data.hold_out(0.5).labels.tolist() == [
            int(y) for part in data.hold_out(0.5).train.split(1) for y in part.targets
        ]
    assert Dataset(plain, plain, num_classes=3).labels is None
    with pytest.raises(ValueError, match="`num_classes` of the data set is None; allowed: a num"):
        Dataset(plain, plain)
    few = Dataset(plain, plain, num_classes=2)
    with pytest.raises(SampleError, match=r"classes of .* `train` go from 0 to 2; allowed: 0 to 1"):
        few.train[:3]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (lambda i: torch.zeros(2), "sample 0 of `train`: TypeError: float32 (2,); allowed: a pair"),
        (lambda i: (torch.zeros(2 + i % 2), 0), "sample 1 of `train`: (float32 (3,), int), and "),
        (lambda i: (None, 0), "sample 0 of `train`: TypeError: default_collate: batch must"),
        (lambda i: ("a word", 0), "the samples of `train` are no tensors: a str among the samples"),
        (lambda i: [][i], "sample 0 of `train`: IndexError: list index out of range"),
    ],
)
def test_a_sample_that_cannot_be_read_is_named(item, message):
    class Odd:
        classes = range(3)

        def __len__(self):
            return 4

        def __getitem__(self, i):
            return item(i)

    with pytest.raises(SampleError, match=re.escape(message)) as error:
        Dataset(Odd(), samples()).train[:3]
    assert "\n" not in str(error.value)


def test_a_stream_is_refused(plugin):
    class Stream(IterableDataset):
        def __iter__(self):
            yield torch.zeros(2), 0

    with pytest.raises(ValueError, match="`train` of the data set has Stream; allowed: Samples, o"):
        Dataset(Stream(), samples())


# ---- reading ahead


def sources(*workers, size=30):
    return [Minibatches(torch.arange(size), 4, 7, j) for j in workers]


def noisy(processes):
    x = torch.zeros(40, 1, 28, 28)
    stored = importlib.import_module(PLUGIN).Stored(Samples(x, torch.arange(40) % 3), noise=True)
    return Dataset(stored, stored, num_classes=3).loaded_by(processes).hold_out(0.25)


def test_a_straggler_reads_its_minibatch_again():
    y = torch.arange(30)
    stored = importlib.import_module(PLUGIN).Stored(Samples(torch.rand(30, 1, 28, 28), y))
    train = Dataset(stored, stored, num_classes=30).train
    slow = [Minibatches(torch.arange(30), 4, 7, 0, every=3)]
    reader, usual = ReadAhead(train, slow), sources(0)[0]
    wanted = [usual.draw().tolist() for _ in range(3)]
    found, rests = [], []
    for _ in range(9):
        found.append(reader.draw().targets.tolist())
        rests.append(slow[0].rests)
    reader.close()
    assert found == [batch for batch in wanted for _ in range(3)]
    assert rests == 3 * [False, True, True]


def drain(reader, draws=11):
    for _ in range(draws):
        reader.draw()


def test_augmentation_is_a_function_of_seed_worker_and_draw():
    """And of the place in the minibatch: whatever the processes, the layout and the position."""

    def drawn(processes, *workers, first=0):
        reader = ReadAhead(noisy(processes).train, sources(*workers))
        for source in reader.minibatches:
            source.position = first
        found = [reader.draw().inputs.view(len(workers), 4, -1) for _ in range(first, 6)]
        assert [source.position for source in reader.minibatches] == [6] * len(workers)
        for source in reader.minibatches:  # as after a resume
            source.position = 4
        assert torch.equal(reader.draw().inputs.view(len(workers), 4, -1), found[4 - first])
        reader.close()
        assert loaders() == []
        return torch.stack(found, 1)  # (workers, draws, 4, 784)

    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    whole = drawn(0, 0, 1, 2, 3)
    assert torch.equal(drawn(2, 0, 1, 2, 3), whole)
    assert torch.equal(torch.cat([drawn(0, 0, 1), drawn(2, 2, 3)]), whole)
    assert torch.equal(drawn(1, 2, first=3)[0], whole[2, 3:])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert random.getstate() == before[2]
    assert len({image.sum().item() for image in whole.view(-1, 784)}) == 4 * 6 * 4
    # by hand: the third sample of the second minibatch of worker 3, an image of zeros
    seed = stream_seed(7, "sample", 3, 2, 2)
    random.seed(seed)
    generator = np.random.RandomState(seed % 2**32)
    expected = torch.randn(784, generator=torch.Generator().manual_seed(seed))
    expected = expected + generator.standard_normal() + random.random()
    torch.testing.assert_close(whole[3, 1, 2], expected)
    random.setstate(before[2])


def test_evaluations_draw_the_same_numbers_each_time():
    expected = torch.cat([x.inputs for x in noisy(0).validation.split(10)])
    assert torch.equal(torch.cat([x.inputs for x in noisy(2).validation.split(3)]), expected)
    shares = [noisy(0).validation.share(rank, 4) for rank in range(4)]
    assert torch.equal(torch.cat([s[:9].inputs for s in shares]), expected)
    assert loaders() == []


@pytest.mark.parametrize("processes", [0, 2])
def test_a_failure_while_reading_ahead_names_the_sample_and_ends_the_loaders(processes, plugin):
    broken = plugin.Stored(samples(40), bad=33)
    data = Dataset(broken, broken, num_classes=3).loaded_by(processes)
    reader = ReadAhead(data.train, sources(0, size=40))
    with pytest.raises(SampleError, match=r"^sample 33 of `train`: OSError: image 33 is trunc"):
        drain(reader)
    assert loaders() == []
    with pytest.raises(SampleError, match=r"^sample 33 of `test`: OSError: image 33 is trunc"):
        list(data.test.split(2))
    assert loaders() == []


def test_limits_of_the_machine_are_told(plugin):
    class Greedy(plugin.Stored):
        def __getitem__(self, i):
            if i == 0:
                return super().__getitem__(i)
            raise MemoryError if i == 1 else OSError(24, "Too many open files")

    data = Dataset(Greedy(samples()), samples())
    for number, line in ((1, "out of memory"), (2, "too many open files")):
        with pytest.raises(MachineError, match=line), machine_failures():
            data.train[number : number + 1]


def test_a_loader_process_that_is_killed_is_told(plugin):
    class Killed(plugin.Stored):
        def __getitem__(self, i):
            if i == 5 and loaders() == []:  # in the loader process
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__getitem__(i)

    data = Dataset(Killed(samples()), samples()).loaded_by(1)
    before = signal.getsignal(signal.SIGCHLD)
    told = r"^a loader process has failed \(.*; process \d+: killed by SIGKILL\); memory is a fre"
    with pytest.raises(SampleError, match=told):
        list(data.train.split(2))
    assert signal.getsignal(signal.SIGCHLD) == before
    assert gone([process.pid for process in loaders()])


def test_a_loader_process_that_dies_at_its_start_is_told(monkeypatch):
    """In the first use of a process torch raises it in whatever asks for the first requests."""
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)

    def requests():
        (child,) = loaders()
        child.kill()
        time.sleep(5.0)  # which the signal of its death ends
        yield [0], [0]

    told = r"^a loader process has failed \(.*killed by signal: Killed.*\); memory"
    with pytest.raises(SampleError, match=told):
        list(read([(torch.zeros(2), 0)], requests(), 1, False))
    assert loaders() == []


class Collecting:
    """Samples that are read in a loader process which collects its garbage before."""

    def __getitem__(self, index):
        assert get_worker_info() is not None
        gc.collect()
        return torch.full((2,), float(index)), index


def read_beside_garbage(group):
    """Samples by a loader process that inherits a closed group of Gloo in a cycle of references."""
    gc.collect()
    gc.disable()
    try:
        side = group.side()
        cycle = [side.handle]
        cycle.append(cycle)
        side.close()
        del side, cycle
        return [y.tolist() for _, y in read(Collecting(), [([1, 2], [0, 0])], 1, False)]
    finally:
        gc.enable()


@pytest.mark.ranks
def test_a_loader_process_does_not_destroy_the_garbage_of_its_parent(ranks):
    """It hangs as it waits for the threads of the group, which it does not have."""
    assert ranks(2, allowed_to_start, read_beside_garbage, timeout=30.0) == [[[1, 2]]] * 2


class Tells:
    """An object in a cycle of references that writes which process destroys it."""

    def __init__(self, pipe):
        self.pipe, self.cycle = pipe, self

    def __del__(self):
        os.write(self.pipe, b"%d\n" % os.getpid())


@pytest.fixture
def before_each_fork():
    """A function that sets what is called before this process forks, until the test ends."""
    calls = []
    os.register_at_fork(before=lambda: calls and calls[0]())  # cannot be taken back
    yield calls.append
    calls.clear()


def test_a_collection_between_the_fork_and_the_start_destroys_nothing(before_each_fork):
    """Hooks of `threading`, `random` and others run in the child before those of this module."""
    reads, writes = os.pipe()
    thresholds = gc.get_threshold()

    def leave_garbage():
        collecting = gc.isenabled()
        gc.disable()
        Tells(writes)
        gc.set_threshold(1)  # the next object begins a collection, if they are allowed
        if collecting:
            gc.enable()

    before_each_fork(leave_garbage)
    try:
        batches = [y.tolist() for _, y in read([(torch.zeros(2), 5)], [([0], [0])], 1, False)]
    finally:
        gc.set_threshold(*thresholds)
    gc.collect()
    os.close(writes)
    with os.fdopen(reads) as told:
        assert told.read().split() == [str(os.getpid())]
    assert batches == [[5]]
    assert gc.isenabled()


def allowed_to_start(group, function):
    importlib.import_module(PLUGIN)  # the ranks of tests are daemons, which may not start any
    return function(group)


def test_losses_and_gradients_of_the_risk_are_those_in_memory(plugin):
    x = torch.rand(40, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    memory = Samples(x, torch.arange(40) % 3)
    model = build_model("logistic", 0, torch.float32, num_classes=3)
    found = []
    for train in (memory, plugin.Stored(memory)):
        data = Dataset(train, train).to("cpu", torch.float32)
        oracle = MinibatchRisk(Risk(model, "sum"), data, sources(0, 1))
        point = oracle.risk.layout.flatten(model)
        loss, gradient = oracle.total(point, torch.arange(3, 20), 5)
        inputs, targets = oracle.draw()
        both = oracle.gradient(point.repeat(2, 1), (inputs, targets))
        found.append([loss, gradient, targets, both, oracle.risk.evaluate(point, data.test)])
        assert oracle.total(point, torch.arange(0), 5)[0] == 0
        guess = oracle.risk.loss.guess(data)
        assert guess["loss"] == pytest.approx(np.log(3))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    plain = TensorDataset(x, memory.targets)
    unlisted = Dataset(plain, plain, num_classes=3)
    assert LOSSES.make("cross_entropy").guess(unlisted) == LOSSES.make("mse").guess(unlisted) == {}


# ---- runs


def train(group, config, stop_in=None):
    """Train to the end, or to the end of iteration `stop_in`; the digest of u."""
    torch.set_num_threads(1)
    plan = make_plan(config, Launch(group.rank, group.size, group.rank, group.size))
    trainer = Trainer(plan, group)
    step, often = Consensus.step, HealthCheck.CHECK_EVERY_S

    def interrupted(self, t):
        step(self, t)
        if t == stop_in and group.rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    consensus.run.trainer.draw_pictures = lambda *_: None
    Consensus.step, HealthCheck.CHECK_EVERY_S = interrupted, 0.0
    try:
        trainer.run()
    except RunStopped as stopped:
        if f"stopped at iteration {stop_in + 1} with a checkpoint" not in str(stopped):
            raise
    finally:
        Consensus.step, HealthCheck.CHECK_EVERY_S = step, often
    assert loaders() == []
    return trainer.algorithm.verify()


def train_all(group, runs):
    importlib.import_module(PLUGIN)  # in the ranks
    return [train(group, config, stop_in) for config, stop_in in runs]


@pytest.mark.ranks
def test_runs_equal_those_in_memory_in_every_layout_and_continue_to_the_same_bits(
    ranks, make_config, tmp_path
):
    def config(run, *more):
        noise = [] if "memory" in run else [f"+data.options.noise={'noisy' in run}"]
        name = "some_digits" if "memory" in run else "stored_digits"
        return make_config(
            *SMALL, f"data.name={name}", *noise, f"output.run_dir={tmp_path / run}", *more
        )

    two, auto = "data.loader_workers=2", "resume=auto"

    def runs(size):
        yield config(f"memory{size}"), None
        yield config(f"stored{size}", two), None
        yield config(f"noisy{size}"), None
        if size == 2:
            yield config("noisy_twice", two), None
            yield config("noisy_stopped", two), 9
            yield config("noisy_stopped", auto), None
            yield config("stopped"), 4
            yield config("stopped", two, auto), None

    found = {size: ranks(size, train_all, list(runs(size))) for size in (1, 2, 4)}
    for size, of_ranks in found.items():
        assert of_ranks == [of_ranks[0]] * size, "the replicas of u"
        memory, stored, noisy, *_ = of_ranks[0]
        assert stored == memory != noisy
        # another order of summation
        one, other = (rows_of(tmp_path / f"noisy{n}")[-1]["train_loss"] for n in (1, size))
        assert one == pytest.approx(other, rel=1e-9)
    _, stored, noisy, noisy_twice, _, noisy_again, _, again = found[2][0]
    assert noisy == noisy_twice == noisy_again
    assert stored == again
    assert same_rows(tmp_path / "stored2", tmp_path / "memory2")
    assert same_rows(tmp_path / "stopped", tmp_path / "memory2")
    assert same_rows(tmp_path / "noisy_twice", tmp_path / "noisy2")
    assert same_rows(tmp_path / "noisy_stopped", tmp_path / "noisy2")
    one, other = (rows_of(tmp_path / run)[-1] for run in ("noisy2", "memory2"))
    assert one["validation_loss"] != other["validation_loss"]


def test_what_cannot_be_partitioned_or_read_is_refused(make_config, monkeypatch, plugin):
    def refusal(*more):
        with pytest.raises(ConfigError) as error:
            make_plan(make_config(*SMALL, "data.name=stored_digits", *more), Launch())
        return str(error.value)

    assert refusal("+data.options.bad=0").endswith(
        "sample 0 of `train`: OSError: image 0 is truncated"
    )
    monkeypatch.delattr(plugin.Stored, "__len__", raising=True)
    assert "`train` of the data set has Stored; allowed: Samples, or a pair" in refusal()


def test_populations_and_cuda_graphs_leave_data_in_storage_out(make_config, tmp_path):
    names = ("some_digits", "stored_digits")
    configs = {name: make_config(*SMALL, f"data.name={name}") for name in names}
    members = [Member(name, tmp_path / name, config) for name, config in configs.items()]
    assert [[one.name for one in found] for found in populations(members)] == [["some_digits"]]
    obstacles = []
    for config in configs.values():
        worker = SimpleNamespace(oracle=make_plan(config, Launch()).oracle)
        u = SimpleNamespace(device=torch.device("cuda"))
        algorithm = SimpleNamespace(u=u, closed_form=True, worker=worker)
        obstacles.append(obstacle_to_replay(algorithm, 1))
    assert obstacles == [None, "the samples are read from storage"]


@pytest.mark.ranks
def test_a_failure_of_one_rank_is_one_line_on_all(tmp_path):
    plugin = ["plugins=[tests.testing.stored_digits]", "data.name=stored_digits"]
    bad = ["+data.options.bad=33", "data.loader_workers=1", f"+data.options.pids={tmp_path}"]
    more = ["data.partition=full", "data.validation=0", f"output.run_dir={tmp_path / 'run'}"]
    with Ranks(2, [*SMALL, *plugin, *bad, *more], tmp_path) as run:
        assert run.wait(60) == [1, 1], run.err(0) + run.err(1)
        cause = "sample 33 of `train`: OSError: image 33 is truncated"
        assert run.err(1).splitlines() == [f"consensus.train: rank 1: {cause}"]
        (line,) = run.err(0).splitlines()
        # It may wait for the other in any operation: of the first sum, or before it.
        assert re.match(r"consensus\.train: rank 0: lost a peer in `\w+`: rank 1", line)
        assert line.endswith(f"SampleError: {cause}")
    assert gone(int(path.name) for path in tmp_path.iterdir() if path.name.isdigit())


@pytest.mark.ranks
def test_loader_processes_outlive_stop_signals_and_end_with_their_run(tmp_path):
    """Signals go to all processes, as from a terminal or a scheduler; a killed run leaves none."""
    (tmp_path / "pids").mkdir()
    slow = ["+data.options.slow_s=0.01", f"+data.options.pids={tmp_path / 'pids'}"]
    plugin = ["plugins=[tests.testing.stored_digits]", "data.name=stored_digits", *slow]
    pace = ["algorithm.iterations=100000", "output.eval_every=100000", "data.loader_workers=2"]
    command = [*SMALL, *plugin, *pace, f"output.run_dir={tmp_path / 'run'}", "resume=auto"]

    def started():
        """The loader processes of the first evaluation or training."""
        deadline = time.monotonic() + 60.0
        while len(found := sorted(int(p.name) for p in (tmp_path / "pids").iterdir())) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.5)  # into the training
        return found

    for number, line in ((signal.SIGINT, "SIGINT"), (signal.SIGTERM, "SIGTERM")):
        with Ranks(1, command, tmp_path) as run:
            pids = started()
            for pid in (*pids, run.pids[0]):
                os.kill(pid, number)
            assert run.wait(60) == [75], run.err(0)
            (said,) = run.err(0).splitlines()
            assert said.startswith(f"consensus.train: {line}: stopped at iteration ")
        assert gone(pids)
        for path in (tmp_path / "pids").iterdir():
            path.unlink()
    with Ranks(1, command, tmp_path) as run:
        pids = started()
        run.kill(0)
        assert run.wait(10) == [-signal.SIGKILL]
        assert gone(pids)
