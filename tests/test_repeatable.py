"""Lines 3 and 5 after a loss: repeated without a trace, or taken from a rank that has finished."""

import pytest
import torch

from consensus.algorithm import Consensus
from consensus.comm import PeerLostError, Pending, Solo
from consensus.core.kernels import consensus_kernel
from consensus.core.kernels.outer_step import FlatOptimizerStep
from consensus.core.layerwise import Layerwise
from consensus.core.potentials import POTENTIALS
from consensus.repeatable import RepeatableOracle, RepeatableServer, begin_at_consensus
from consensus.server import Server
from consensus.worker import Worker

N, LAYERS = 7, [(0, 3), (3, 7)]


class Losing(Solo):
    """One process whose collectives fail `losses` times: first the sum, then the minimum."""

    def __init__(self, losses: int, minima: int = 0) -> None:
        super().__init__()
        self.losses, self.minima = losses, minima

    def start_sum(self, tensor):
        def wait():
            if self.losses:
                self.losses -= 1
                raise PeerLostError("rank 1 is gone")
            return tensor

        return Pending(wait)

    def min_(self, tensor):
        if self.minima:
            self.minima -= 1
            raise PeerLostError("rank 1 is gone")
        return tensor


class Drawing:
    """An oracle whose gradient is another one each time, in the memory of the points."""

    def __init__(self) -> None:
        self.position = 0

    def draw(self):
        self.position += 1
        return self.position

    def gradient(self, points, batch):
        return points.mul_(0.1).add_(batch)

    def state_dict(self):
        return {"position": torch.tensor([self.position] * 2)}

    def load_state_dict(self, state):
        self.position = int(state["position"][0])


def numbers(*shape):
    return torch.linspace(-0.4, 0.5, N).double().expand(*shape, N).clone()


def make(name, group, server=RepeatableServer, oracle=None, outer=None):
    phi = Layerwise(POTENTIALS.make(name), LAYERS, 1.0)
    u = numbers()
    phi = phi.to(u)
    kernel = consensus_kernel("gradient", phi, u, group.sum_)
    if outer:
        kernel = FlatOptimizerStep(kernel, u, "SGD", outer, cut=phi.bounded)
    z = u + 0.05 * torch.arange(2.0).double().view(2, 1)
    worker = Worker(z, oracle or Drawing(), phi, kappa=0.5)
    own = server(u, phi, group, kernel)
    # A bounded domain is left by such steps, so that the ranks agree on shorter ones.
    how = {"tau": 20.0 if phi.bounded else 0.1, "sigma": 0.01, "lam": 0.5}
    return Consensus(own, worker, **how)


def state_of(algorithm):
    return {key: value.clone() for key, value in algorithm.state_dict().items()}


CASES = [("quad", None), ("tan", None), ("tan", {"lr": 0.3, "momentum": 0.9})]


@pytest.mark.parametrize(("name", "outer"), CASES)
@pytest.mark.parametrize("losses", [(1, 0), (2, 0), (0, 1), (1, 1)])
def test_an_iteration_that_is_repeated_is_one_that_was_never_disturbed(name, outer, losses):
    oracle = RepeatableOracle(Drawing())
    disturbed = make(name, Losing(0), oracle=oracle, outer=outer)
    plain = make(name, Solo(), server=Server, outer=outer)
    for t in range(3):
        before = state_of(disturbed)
        group = Losing(*losses)
        disturbed.server.regroup(group)
        for _ in range(sum(losses) + 1):
            try:
                disturbed.step(t)
                break
            except PeerLostError:
                after = state_of(disturbed)
                assert all(torch.equal(after[key], before[key]) for key in before)
                disturbed.server.regroup(group)
        assert group.losses == 0
        assert t > 0 or not disturbed.phi.bounded or group.minima == 0
        oracle.release()
        plain.step(t)
        assert disturbed.server.finished == t + 1
        found, expected = state_of(disturbed), state_of(plain)
        assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("order", ["gauss_seidel", "jacobi"])
def test_the_result_of_another_rank_is_taken_and_line_6_uses_it(order):
    oracle = RepeatableOracle(Drawing())
    behind, ahead = make("quad", Losing(1), oracle=oracle), make("quad", Solo())
    behind.order = ahead.order = order
    with pytest.raises(PeerLostError):
        behind.step(0)
    ahead.step(0)
    state = {key: value.clone() for key, value in ahead.server.state_dict().items()}
    behind.server.take(lambda: behind.server.load_state_dict(state))
    assert not torch.equal(behind.u, ahead.u), "not before line 3, which Jacobi's line 6 looks at"
    behind.step(0)
    oracle.release()
    found, expected = state_of(behind), state_of(ahead)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert behind.server.finished == ahead.server.finished == 1


def test_the_state_of_an_oracle_is_that_at_the_start_of_the_iteration():
    oracle = RepeatableOracle(Drawing())
    assert oracle.state_dict()["position"].tolist() == [0, 0]
    batch = oracle.draw()
    points = numbers(1)
    first = oracle.gradient(points, batch).clone()
    points.fill_(9.0)  # the memory in which the inner oracle returned it
    assert torch.equal(oracle.gradient(points, oracle.draw()), first)
    assert oracle.state_dict()["position"].tolist() == [0, 0]
    oracle.release()
    assert oracle.state_dict()["position"].tolist() == [1, 1]
    assert oracle.draw() == 2


def test_a_worker_begins_at_u():
    algorithm = make("quad", Solo())
    algorithm.step(0)
    state, before = state_of(algorithm), state_of(algorithm)
    begin_at_consensus(state, 1, 17)
    assert torch.equal(state["worker/z"][1], before["server/u"])
    assert not state["worker/v"][1].any()
    assert int(state["worker/cuts"][1]) == 0
    assert state["worker/oracle/position"].tolist() == [1, 17]
    for key in ("worker/z", "worker/v"):
        assert torch.equal(state[key][0], before[key][0])
    assert torch.equal(state["server/u"], before["server/u"])
