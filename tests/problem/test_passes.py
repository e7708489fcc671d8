"""Passes in threads against the same passes one after another, bit for bit."""

import threading

import pytest
import torch
from torch import nn
from torch.nn.functional import dropout

from consensus.core.flat import FlatLayout
from consensus.problem import Risk, build_model
from consensus.problem.passes import Threads, copy_without_parameters

K, B = 5, 4


@pytest.fixture
def cores(monkeypatch):
    """`cores(number)`: what torch may use, until the test ends; its threads wait passively."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def problem(model):
    """K points (K, n) around the start of a model, and a minibatch for each."""
    random = torch.Generator().manual_seed(0)
    start = FlatLayout.of(model).flatten(model)
    points = start + 0.1 * torch.randn(K, len(start), generator=random, dtype=start.dtype)
    images = torch.rand(K, B, 1, 28, 28, generator=random, dtype=start.dtype)
    return points, images, torch.randint(10, (K, B), generator=random)


class Watched(nn.Module):
    """A linear model that notes which thread runs it, and with how many of torch's."""

    def __init__(self, seen):
        super().__init__()
        self.fc = nn.Linear(784, 10)
        self.seen = seen

    def forward(self, images):
        self.seen.append((threading.current_thread().name, torch.get_num_threads()))
        return self.fc(images.flatten(1))


class Seen(list):
    """A list that is the same list in copies of its owner."""

    def __deepcopy__(self, memo):
        return self


@pytest.mark.parametrize("name", ["lenet5", "mlp", "logistic"])
def test_threads_give_the_bits_of_one_core(name, cores):
    risk = Risk(build_model(name, seed=0, dtype=torch.float32), "sum")
    problems = [problem(risk.model)]
    points, images, labels = problems[0]
    problems.append((points.flip(0), images, labels))
    cores(1)
    expected = [(risk.gradient(*numbers), risk.losses.clone()) for numbers in problems]
    cores(2)
    risk.gradient(*problems[0])  # the first time, one after another
    for _ in range(3):
        for numbers, (gradients, losses) in zip(problems, expected, strict=True):
            assert torch.equal(risk.gradient(*numbers), gradients)
            assert torch.equal(risk.losses, losses)
    out = problems[0][0].clone()
    assert torch.equal(risk.gradient(out, images, labels, out=out), expected[0][0])


def test_as_many_threads_as_there_are_cores_or_workers(cores):
    seen = Seen()
    risk = Risk(Watched(seen), "mean")
    points, images, labels = problem(risk.model)

    def threads(workers):
        seen.clear()
        risk.gradient(points[:workers], images[:workers], labels[:workers])
        assert len(seen) == workers
        return (
            {name.split("_")[0] for name, _ in seen},
            {number for _, number in seen},
            len(set(seen)),
        )

    cores(4)
    assert threads(K) == ({"MainThread"}, {4}, 1), "the first time"
    for _ in range(3):
        names, each, count = threads(K)
        assert (names, each) == ({"pass"}, {1})
        assert 1 <= count <= 4  # a thread that is quick takes the share of one that has not begun
    assert threads(2)[:2] == ({"pass"}, {2})
    assert threads(1) == ({"MainThread"}, {4}, 1)
    cores(1)
    assert threads(K) == ({"MainThread"}, {1}, 1)


def test_where_torchs_threads_spin_there_are_no_others(cores, monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY")
    seen = Seen()
    risk = Risk(Watched(seen), "sum")
    cores(2)
    for _ in range(3):
        risk.gradient(*problem(risk.model))
    assert set(seen) == {("MainThread", 2)}


def functional_dropout(images):
    return dropout(images, 0.5)


class Drawing(Watched):
    def forward(self, images):
        return super().forward(functional_dropout(images))


class Counting(Watched):
    def __init__(self, seen):
        super().__init__(seen)
        self.register_buffer("count", torch.zeros(()))


class Uncopyable(Watched):
    def __init__(self, seen):
        super().__init__(seen)
        self.lock = threading.Lock()


@pytest.mark.parametrize("model", [Drawing, Counting, Uncopyable])
def test_what_threads_could_not_do_runs_one_after_another(model, cores):
    cores(3)
    seen = Seen()
    risk = Risk(model(seen), "sum")
    numbers = problem(risk.model)
    for _ in range(3):
        risk.gradient(*numbers)
    assert set(seen) == {("MainThread", 3)}
    assert len(seen) == 3 * K


def test_a_failing_pass_is_raised_when_the_others_are_done(cores):
    cores(2)
    run = Threads(nn.Linear(1, 1))
    done = []
    run([lambda _: None] * 2)

    def fails(_):
        raise ValueError("of this pass")

    def slow(_):
        both.wait()
        done.append(1)

    both = threading.Barrier(2)

    def late_failure(model):
        both.wait()
        fails(model)

    with pytest.raises(ValueError, match="of this pass"):
        run([late_failure, slow])
    assert done == [1]
    run([lambda _: done.append(2)] * 2)
    assert done == [1, 2, 2]


def test_copies_hold_no_parameters_and_keep_ties():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    copied = copy_without_parameters(model)
    assert {p.device.type for p in copied.parameters()} == {"meta"}
    assert copied[1].weight is copied[0].weight
    assert [p.device.type for p in model.parameters()] == ["cpu"] * 3
