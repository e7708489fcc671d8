"""The loops of other packages do what they are compared for: the mean of the copies, or DiLoCo."""

import os
from unittest import mock

import pytest
import torch

from benchmarks import compare, peers
from benchmarks.harness import Problem
from benchmarks.loops import Accelerate, Coupled, LikeLocalSgd, Loop
from benchmarks.methods import methods

PERIOD = 3
BAR = 2e-7  # of float32, for weights of at most 0.4

needs_accelerate = pytest.mark.skipif("accelerate" in peers.missing(), reason="needs accelerate")
needs_torchft = pytest.mark.skipif("torchft" in peers.missing(), reason="needs torchft")


def weights(loop):
    return torch.cat([p.detach().reshape(-1) for p in loop.module.parameters()])


def trained(group, make):
    """The weights of all ranks before the first communication of a method and after it."""
    problem = Problem()
    alone, method = Loop(problem, group), make(problem, group)
    start = weights(alone)
    for t in range(PERIOD):
        alone.step(t)
        method.step(t)
    sent = method.payload
    found = weights(method)
    method.close()
    return start, group.gather(weights(alone)), group.gather(found), sent


def local_sgd(group, kind):
    # As torchrun sets them: accelerate reads them, and otherwise communicates nothing.
    place = {"LOCAL_RANK": group.rank, "RANK": group.rank, "WORLD_SIZE": group.size}
    with mock.patch.dict(os.environ, {name: str(value) for name, value in place.items()}):
        return trained(group, lambda problem, own: kind(problem, own, PERIOD))


def of_torchft(group, make):
    return trained(group, lambda problem, own: peers.Torchft(problem, own, PERIOD, make))


def coupled(group):
    options = {"potential": "quad", "pull": 1.0, "overlap": False, "period": PERIOD}
    return trained(group, lambda problem, own: Coupled(problem, own, **options))


def check_mean(answers):
    for start, apart, together, sent in answers:
        assert (apart[0] - apart[1]).abs().max() > 1e-5, "the ranks draw other images"
        assert torch.equal(together[0], together[1])
        torch.testing.assert_close(together[0], apart.mean(0), atol=BAR, rtol=0.0)
        assert (together[0] - start).abs().max() > 1e-4
        assert sent == start.nbytes, "one communication in three iterations"


@pytest.mark.ranks
def test_a_loop_like_local_sgd_and_one_that_is_coupled_take_the_mean(ranks):
    check_mean(ranks(2, local_sgd, LikeLocalSgd))
    check_mean(ranks(2, coupled))


@pytest.mark.ranks
@needs_accelerate
def test_local_sgd_of_accelerate_takes_the_mean(ranks):
    check_mean(ranks(2, local_sgd, Accelerate))


@pytest.mark.ranks
@needs_torchft
def test_local_sgd_of_torchft_takes_the_mean(ranks):
    check_mean(ranks(2, of_torchft, peers.local_sgd))


@pytest.mark.ranks
@needs_torchft
def test_diloco_of_torchft_takes_a_nesterov_step(ranks):
    """The first step of SGD with momentum 0.9 and Nesterov moves by 0.7 (1 + 0.9) times the way."""
    for start, apart, together, sent in ranks(2, of_torchft, peers.diloco):
        assert torch.equal(together[0], together[1])
        expected = start - 0.7 * 1.9 * (start - apart.mean(0))
        torch.testing.assert_close(together[0], expected, atol=BAR, rtol=0.0)
        assert sent == start.nbytes


def test_an_absent_package_is_one_line(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as caught:
        compare.main(["--peers"])
    line = "`--peers` needs accelerate and torchft; pip install '.[peers]' installs them, "
    assert caught.value.code == f"{line}in a clone of this repository"


def test_the_peers_are_methods_of_the_table_if_they_are_asked_for():
    others = [name for name in methods(others=True) if name not in methods()]
    kinds = ("accelerate local sgd", "torchft local sgd", "torchft diloco")
    assert others == [f"{kind}, period {period}" for kind in kinds for period in (1, 10)]
