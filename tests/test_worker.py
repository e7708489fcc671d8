"""The worker alone: where it differentiates, how it moves, and the state behind it."""

import torch

from consensus import POTENTIALS, Layerwise
from consensus.worker import Worker

F64 = torch.float64
PHI = Layerwise(POTENTIALS["quad"], [(0, 2)])


class Noting:
    """Oracle with gradient 1 that keeps the points it is called with."""

    def __init__(self):
        self.points = []
        self.position = torch.zeros(3, dtype=torch.int64)

    def draw(self):
        self.position += 1
        return int(self.position[0])

    def gradient(self, points, batch):
        self.points.append(points.clone())
        return torch.full_like(points, float(batch))

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position.copy_(state["position"])


def make():
    z = torch.arange(6, dtype=F64).view(3, 2)
    return Worker(z, Noting(), PHI, kappa=0.5, nu=0.25)


def iterate(worker):
    u = torch.zeros(2, dtype=F64)
    worker.update(worker.gradient(worker.draw()), 0.1, 0.05, u, u)


def test_two_iterations_by_hand():
    """Line 5 at z + kappa v; line 6 with the gradient t, nu z and the force 2 (u - z)."""
    worker = make()
    z, v = worker.z.clone(), torch.zeros(3, 2, dtype=F64)
    for t in (1, 2):
        at = z + 0.5 * v
        v = 0.5 * v - 0.1 * (t + 0.25 * z)
        z = z + v + 0.05 * 2 * (0 - z)
        iterate(worker)
        torch.testing.assert_close(worker.oracle.points[-1], at)
        torch.testing.assert_close(worker.z, z)
        torch.testing.assert_close(worker.v, v)
    assert worker.cuts.tolist() == [0, 0, 0]


def test_its_state_is_z_v_the_cuts_and_the_oracle():
    first, second = make(), make()
    iterate(first)
    state = {key: value.clone() for key, value in first.state_dict().items()}
    assert set(state) == {"z", "v", "cuts", "oracle/position"}
    second.load_state_dict(state)
    for worker in (first, second):
        iterate(worker)
    assert torch.equal(first.z, second.z)
    assert torch.equal(first.v, second.v)


def test_the_start_is_copied():
    z = torch.zeros(1, 2, dtype=F64)
    worker = Worker(z, Noting(), PHI)
    worker.z.add_(1.0)
    assert float(z.sum()) == 0.0
