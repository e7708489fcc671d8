"""ElasticCoupling: processes are killed, leave and join; the others go on as a plain loop does.

The expected u is that of a loop over all workers in this process, given who took part in which
call. The sums are in shared memory: a process that was killed after it had begun one is in it.
"""

import json
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from consensus import ElasticCoupling
from tests.testing.elastic_loop import LR, network, samples
from tests.testing.launch import Ranks

LOOP = "tests.testing.elastic_loop"
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
TAN = {"potential": "tan", "eta": 4.0, "implicit": False}
STEPS = 400


class Loops(Ranks):
    """Processes of an elastic loop, one for each list of arguments."""

    def __init__(self, arguments: list[list[str]], settings: dict, cwd: Path, joins=None, **env):
        env = {**ALONE, "CONSENSUS_MEMBERS": str(len(arguments)), **env}
        if joins is not None:
            env["MASTER_PORT"] = str(joins.port)
        cwd.mkdir(exist_ok=True)
        self.own = [[json.dumps(settings), *own] for own in arguments]
        super().__init__(len(arguments), [], cwd, env, module=LOOP)

    def arguments(self, rank, overrides):
        return self.own[rank]


def seen(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.rglob("seen*.json"))]


def force(w: Tensor, settings: dict) -> Tensor:
    """q(w) = (eta^2 / 2) grad phi(w) for one layer."""
    if settings.get("potential", "quad") == "quad":
        return w
    return w / torch.cos((w @ w) / settings["eta"] ** 2) ** 2


def expected(notes: list[dict], settings: dict, overlap: bool) -> dict[int, Tensor]:
    """u after each call, by a plain loop over the workers that took part."""
    period, pull = settings.get("period", 1), settings.get("pull", 0.5)
    members = {t: tuple(own) for note in notes for t, own, *_ in note["rows"]}
    start = torch.cat([p.detach().reshape(-1) for p in network().parameters()])
    u, z, found = start.clone(), {}, {}
    joined = {note["first"] - (0 if overlap else 1): note["number"] for note in notes}
    for t in range(max(members)):
        moved = {}
        if t in joined and t > 0:  # where line 3 begins, and it trains from the next iteration on
            z[joined[t]] = u.clone()
            moved[joined[t]] = torch.zeros_like(u)
        for j in members[t + 1]:
            if j not in z:
                z[j] = u.clone()
        model = network()
        for j, z_j in z.items():
            if not overlap and j in moved:
                continue
            torch.nn.utils.vector_to_parameters(z_j, model.parameters())
            gradients = torch.autograd.grad(
                mse_loss(model(samples(j, t)[0]), samples(j, t)[1]), list(model.parameters())
            )
            moved[j] = -LR * torch.cat([g.reshape(-1) for g in gradients])
        finishes = (t % period == 0) if overlap else ((t + 1) % period == 0)
        if finishes:
            if not overlap:
                z = {j: z[j] + moved[j] for j in z}
            own = members[t + 1]
            u = u - torch.stack([force(u - z[j], settings) for j in own]).mean(0)
            for j in z:
                d = moved[j] if overlap else 0.0
                z[j] = z[j] + d + pull * force(u - z[j], settings)
        else:
            z = {j: z[j] + moved[j] for j in z}
        z = {j: z_j for j, z_j in z.items() if j in members[t + 1]}
        found[t + 1] = u
    return found


@pytest.mark.parametrize(
    ("settings", "overlap"),
    [({"period": 3}, True), ({**TAN, "period": 2}, True), ({"period": 2, "overlap": False}, False)],
)
def test_the_others_go_on_as_a_plain_loop(tmp_path, settings, overlap):
    others = ["--steps", str(STEPS), "--pause", "0.005"]
    first = [["--kill", "50"], others, [*others, "--leave", "150"]]
    with Loops(first, settings, tmp_path) as loops:
        deadline = time.monotonic() + 60.0
        while loops.codes[0] is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        late = [[*others, "--lr", "0.5"]]  # a stale learning rate: that of the others counts
        with Loops(late, settings, tmp_path / "more", joins=loops) as more:
            assert more.wait(60) == [0], more.err(0)
            assert loops.wait(60) == [-9, 0, 0], loops.err(1)
    notes = seen(tmp_path)
    sizes = {len(own) for note in notes for _, own, *_ in note["rows"]}
    assert sizes >= {3, 2}
    of_call: dict[int, set] = {}
    for note in notes:
        for t, _, _, bits in note["rows"]:
            of_call.setdefault(t, set()).add(bits)
    assert all(len(bits) == 1 for bits in of_call.values()), "one u on all processes, after each"
    wanted = expected(notes, settings, overlap)
    assert max(wanted) == STEPS
    for note in notes:
        for t, _, u, _ in note["rows"]:
            own = torch.tensor(u, dtype=torch.float64)
            torch.testing.assert_close(own, wanted[t], rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("setting", "value", "allowed"),
    [
        ("delay", 1, "`delay` is 1; allowed: 0, where members change"),
        ("buffers", "mean", "`buffers` is mean; allowed: local, where members change"),
    ],
)
def test_settings_that_need_fixed_processes_are_refused(setting, value, allowed):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=allowed):
        ElasticCoupling(model, optimizer, **{"period": 2, setting: value})
