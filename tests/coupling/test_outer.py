"""Outer optimizers, fragments, a pull by parameter group, and Jacobi order, against plain loops."""

import io
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from consensus import Coupling
from consensus.comm import PeerLostError
from consensus.server import digest
from tests.testing.two_layers import (
    F64,
    LAYERS,
    N,
    Part,
    backward,
    gradient,
    start,
    trained,
    two_layers,
    vector,
)

M, LR, H, STEPS = 2, 0.1, 4, 22


def nesterov(parameters):
    return torch.optim.SGD(parameters, lr=0.7, momentum=0.9, nesterov=True)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.05, betas=(0.8, 0.9), eps=1e-8)


def by_group(model):
    """An optimizer with a pull of its own for each layer."""
    groups = [{"params": model[0].parameters(), "pull": 0.2}, {"params": model[1].parameters()}]
    return torch.optim.SGD(groups, lr=LR)


def heavy_ball(model):
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=0.8)


def look_ahead(model):
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=0.8, nesterov=True)


ELASTIC = {"order": "jacobi", "period": H}
CASES = {
    "diloco": {"pull": 1.0, "outer": nesterov, "period": H, "overlap": False},
    "diloco, late": {"pull": 1.0, "outer": nesterov, "period": H},
    "adam": {"pull": 0.6, "outer": adam, "period": H, "overlap": False},
    "streaming": {"pull": 1.0, "outer": 0.8, "period": 5, "fragments": 2, "overlap": False},
    "streaming, late": {"pull": 0.5, "outer": nesterov, "period": 5, "fragments": 2},
    "groups": {"pull": 0.7, "outer": 0.9, "period": H, "overlap": False, "make": by_group},
    "easgd": {"pull": 0.1, "outer": 0.1 * M, "order": "jacobi"},
    "measgd, heavy ball": {"pull": 0.1, "outer": 0.1 * M, **ELASTIC, "make": heavy_ball},
    "measgd, torch's Nesterov": {"pull": 0.1, "outer": 0.1 * M, **ELASTIC, "make": look_ahead},
    "easgd, moved": {"pull": 0.3, "outer": 0.6, "period": 3, "order": "jacobi", "overlap": False},
}


def on_rank(group):
    """u and z_j after each call, and the digest of u; for each case."""
    found = {}
    for name, options in CASES.items():
        us, zs, stats = trained(group.rank, STEPS, LR, **options)
        found[name] = us, zs, stats, int(digest(torch.from_numpy(us[-1])))
    return found


FOUND = {}


@pytest.fixture
def cases(ranks):
    """u (steps, n), z (steps, M, n) and the stats of rank 0, of each case; from one run."""
    if FOUND:
        return FOUND
    answers = ranks(M, on_rank)
    for name in CASES:
        assert len({answer[name][3] for answer in answers}) == 1, f"u differs: {name}"
    FOUND.update(
        {
            name: (
                answers[0][name][0],
                np.stack([a[name][1] for a in answers], 1),
                answers[0][name][2],
            )
            for name in CASES
        }
    )
    return FOUND


class Nesterov:
    """x -= lr (g + 0.9 v), v = 0.9 v + g, as torch starts it: v = g at first."""

    def __init__(self):
        self.v = np.zeros(N)

    def __call__(self, g, where):
        self.v[where] = 0.9 * self.v[where] + g
        return 0.7 * (g + 0.9 * self.v[where])


class Adam:
    def __init__(self):
        self.m, self.s, self.t = np.zeros(N), np.zeros(N), 0

    def __call__(self, g, where):
        self.t += 1
        self.m = 0.8 * self.m + 0.2 * g
        self.s = 0.9 * self.s + 0.1 * g * g
        m, s = self.m / (1 - 0.8**self.t), self.s / (1 - 0.9**self.t)
        return 0.05 * m / (np.sqrt(s) + 1e-8)


def times(rate):
    return lambda g, where: rate * g


ALL = slice(0, N)
FIRST, SECOND = (slice(*layer) for layer in LAYERS)


def loop(outer, pull, period, late, parts=((ALL, 0),), jacobi=False):
    """u and z by the formulas for `quad`, with parts that communicate at offsets of the period."""
    z, u = np.stack([start()] * M), start()
    summed = {}  # of a part: the copies whose sum is on its way
    us, zs = [], []

    def communicate(part, copies):
        old = u[part].copy()
        u[part] -= outer(old - copies.mean(0), part)
        z[:, part] += pull[part] * ((old if jacobi else u[part]) - copies)

    if late:
        summed = {i: z[:, part].copy() for i, (part, offset) in enumerate(parts) if offset == 0}
    for t in range(STEPS):
        z -= LR * np.stack([gradient(j, t, own) for j, own in enumerate(z)])
        for i, copies in summed.items():
            communicate(parts[i][0], copies)
        summed = {}
        for i, (part, offset) in enumerate(parts):
            if (t + 1) % period == offset:
                if late:
                    summed[i] = z[:, part].copy()
                else:
                    communicate(part, z[:, part].copy())
        us.append(u.copy())
        zs.append(z.copy())
    return np.stack(us), np.stack(zs)


# The second layer is the larger one: the first fragment. Offsets are 0 and 5 // 2.
STREAMED = ((SECOND, 0), (FIRST, 2))


def even(pull):
    return np.full(N, pull)


EXPECTED = {
    "diloco": lambda: loop(Nesterov(), even(1.0), H, False),
    "diloco, late": lambda: loop(Nesterov(), even(1.0), H, True),
    "adam": lambda: loop(Adam(), even(0.6), H, False),
    "streaming": lambda: loop(times(0.8), even(1.0), 5, False, STREAMED),
    "streaming, late": lambda: loop(Nesterov(), even(0.5), 5, True, STREAMED),
    "groups": lambda: loop(times(0.9), np.where(np.arange(N) < 3, 0.2, 0.7), H, False),
    "easgd": lambda: loop(times(0.1 * M), even(0.1), 1, True, jacobi=True),
    "easgd, moved": lambda: loop(times(0.6), even(0.3), 3, False, jacobi=True),
}


@pytest.mark.ranks
@pytest.mark.parametrize("name", EXPECTED)
def test_named_methods_are_their_loops(cases, name):
    us, zs, _ = cases[name]
    wanted_us, wanted_zs = EXPECTED[name]()
    np.testing.assert_allclose(us, wanted_us, rtol=0, atol=1e-14)
    np.testing.assert_allclose(zs, wanted_zs, rtol=0, atol=1e-14)


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("name", "period", "kappa"),
    [("easgd", 1, 0.0), ("measgd, heavy ball", H, 0.8), ("measgd, torch's Nesterov", H, 0.8)],
)
def test_elastic_averaging_is_the_published_one(cases, name, period, kappa):
    """Zhang, Choromanska, LeCun 2015: x_j += v_j - a (x_j - c), c += a sum_j (x_j - c).

    v_j = kappa v_j - lr g_j. torch's Nesterov SGD has x_j + kappa v_j as its parameters: it moves
    them by kappa v_j - lr g_j after v_j, and the elastic force acts there.
    """
    us, zs, _ = cases[name]
    x, c, v = np.stack([start()] * M), start(), np.zeros((M, N))
    for t in range(STEPS):
        pull = 0.1 * (x - c) if t % period == 0 else np.zeros((M, N))
        step = LR * np.stack([gradient(j, t, own) for j, own in enumerate(x)])
        v = kappa * v - step
        x = x + (kappa * v - step if "Nesterov" in name else v) - pull
        c = c + pull.sum(0)
        np.testing.assert_allclose(zs[t], x, rtol=0, atol=1e-14)
        np.testing.assert_allclose(us[t], c, rtol=0, atol=1e-14)


@pytest.mark.ranks
def test_stats_of_parts(cases):
    us, zs, stats = cases["streaming, late"]
    assert stats["communications"] == 9  # sums finished after calls 0, 5, ..., 20 and 2, ..., 17
    assert set(stats["distance"]) == {"0", "1"}
    # z of the larger layer was last set in call 21, which finished the sum begun in call 20
    assert stats["distance"]["1"] == pytest.approx(np.linalg.norm((us[-1] - zs[20, 0])[SECOND]))
    assert stats["force"] == pytest.approx(stats["distance"])


# ---- potentials, weights of layers, states


def test_weights_of_layers_follow_their_layer_into_a_fragment():
    """scaled_quad with a weight a layer, explicit: q(w) = weight w, layer by layer."""
    options = {"potential": "scaled_quad", "options": {"weight": [0.5, 0.25]}, "pull": 0.8}
    for fragments in (1, 2):
        torch.manual_seed(0)
        model = two_layers()
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        settings = options | {"period": 2, "overlap": False, "fragments": fragments}
        coupling = Coupling(model, optimizer, **settings)
        z, u = vector(model), vector(model)
        for t in range(8):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 1.0
            z = z + 1.0
            coupling.step()
            for part, offset, weight in ((SECOND, 0, 0.25), (FIRST, fragments - 1, 0.5)):
                if (t + 1) % 2 == offset % 2:
                    u[part] -= weight * (u - z)[part]
                    z[part] += 0.8 * weight * (u - z)[part]
            np.testing.assert_allclose(vector(model), z, rtol=0, atol=1e-14)


def test_an_optimizer_over_u_is_cut_at_the_boundary():
    """tan, one worker: u stays in the domain around z, and the momentum is cut with u."""
    eta, lr = 0.5, 6.0
    model = two_layers()
    outer = {"outer": lambda u: torch.optim.SGD(u, lr=lr, momentum=0.9)}
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    settings = {"eta": eta, "implicit": False, "pull": 0.0, "overlap": False}
    coupling = Coupling(model, optimizer, "tan", **settings, **outer)
    u, z, momentum, cut = vector(model), vector(model), np.zeros(N), 0

    def outside(w):
        return max(w[part] @ w[part] for part in (FIRST, SECOND)) >= eta**2 * np.pi / 2

    def feasible(w, d):
        """The largest step of 1, 1/2, ... along d that stays inside."""
        return next(s for s in 0.5 ** np.arange(60) if not outside(w + s * d))

    for t in range(8):  # rounding grows by a factor of 10 in an iteration
        shift = 0.11 * (-1) ** (t // 3)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += shift
        z = z + feasible(u - z, np.full(N, -shift)) * shift
        coupling.step()
        q = np.zeros(N)
        for part in (FIRST, SECOND):
            w = (u - z)[part]
            q[part] = w / np.cos(w @ w / eta**2) ** 2
        momentum = 0.9 * momentum + q
        s = feasible(u - z, -lr * momentum)
        cut += s < 1
        u, momentum = u - s * lr * momentum, s * momentum
        with coupling.consensus():
            np.testing.assert_allclose(vector(model), u, rtol=0, atol=1e-9)
    assert coupling.stats()["cuts"]["u"] == cut > 1


RESUMED = [
    ("quad", {"outer": nesterov, "pull": 0.4, "period": 2}),
    ("tan", {"outer": adam, "eta": 0.3, "period": 5, "fragments": 2}),
    ("quad", {"outer": 0.8, "period": 4, "fragments": 2, "order": "jacobi", "make": by_group}),
]


def run(t, steps, model, optimizer, coupling):
    for _ in range(steps):
        backward(model, 0, t)
        optimizer.step()
        coupling.step()
        t += 1


@pytest.mark.parametrize(("name", "options"), RESUMED)
def test_a_resumed_run_has_the_same_bits(name, options):
    make = options.get("make", lambda model: torch.optim.SGD(model.parameters(), lr=LR))
    options = {key: value for key, value in options.items() if key != "make"}

    def fresh():
        model = two_layers()
        optimizer = make(model)
        return model, optimizer, Coupling(model, optimizer, name, **options)

    for at in range(3, 9):
        straight, other = fresh(), fresh()
        run(0, at, *straight)
        file = io.BytesIO()
        torch.save([part.state_dict() for part in straight], file)
        file.seek(0)
        run(at, 14 - at, *straight)
        run(100, 3, *other)
        for part, state in zip(other, torch.load(file, weights_only=True), strict=True):
            part.load_state_dict(state)
        run(at, 14 - at, *other)
        assert np.array_equal(vector(other[0]), vector(straight[0]))
        assert torch.equal(other[2].state_dict()["u"], straight[2].state_dict()["u"])


def test_restart_forgets_the_momentum_of_u():
    ends = []
    for restarts in (0, 1):
        model = two_layers()
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        coupling = Coupling(model, optimizer, outer=nesterov, period=2)
        assert [type(o) for o in coupling.outer_optimizers] == [torch.optim.SGD]
        for _ in range(restarts):
            run(50, 7, model, optimizer, coupling)
            nn.utils.vector_to_parameters(torch.from_numpy(start()), model.parameters())
            coupling.restart()
        run(0, 9, model, optimizer, coupling)
        ends.append(vector(model))
    np.testing.assert_array_equal(*ends)


def test_buffers_can_be_recomputed_for_u():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    coupling = Coupling(model, optimizer, pull=0.2, outer=0.3)
    batches = list(torch.randn(4, 16, 3) + 2.0)
    for x in batches:
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        coupling.step()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with coupling.consensus():
        torch.optim.swa_utils.update_bn(batches, model)
        hidden = model[0](torch.cat(batches))
        saved = coupling.consensus_state_dict()
    torch.testing.assert_close(saved["1.running_mean"], hidden.mean(0))
    assert not torch.equal(saved["1.running_mean"], before["1.running_mean"])
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


# ---- refusals and warnings


def make_nothing(parameters):
    return None


def make_half(parameters):
    return torch.optim.SGD(parameters[:1], lr=0.1)


@pytest.mark.parametrize(
    ("match", "options"),
    [
        ("`fragments` is 0; allowed: a whole number >= 1", {"fragments": 0}),
        ("`fragments` is 3; allowed: 1 to 2, with 2 layers", {"fragments": 3, "period": 9}),
        ("`fragments` is 2; allowed: 1 to 1, .* a period of 1", {"fragments": 2}),
        ("`order` is none; allowed: gauss_seidel, jacobi", {"order": "none"}),
        ("`outer` is 'x'; allowed: a number", {"outer": "x"}),
        ("`outer` returned None; allowed: a torch optimizer", {"outer": make_nothing}),
        ("`outer` left out parameters", {"outer": make_half}),
    ],
)
def test_arguments_out_of_range(match, options):
    model = two_layers()
    with pytest.raises(ValueError, match=match) as failure:
        Coupling(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)
    assert "\n" not in str(failure.value)


def test_pulls_of_parameter_groups_out_of_range():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    groups = [{"params": [p], "pull": 0.1 * i} for i, p in enumerate(model.parameters())]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    with pytest.raises(ValueError, match=r"layer `0` has the pulls 0\.0, 0\.1 .* one in a layer"):
        Coupling(model, optimizer)
    names = [[name] for name, _ in model.named_parameters()]
    Coupling(model, optimizer, layers=names).close()
    groups[2]["pull"] = 1.5
    optimizer = torch.optim.SGD(groups, lr=0.1)
    with pytest.raises(ValueError, match=r"`pull` of parameter group 2 is 1\.5; allowed: a number"):
        Coupling(model, optimizer, layers=names)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda model: model.float(), "`0.weight` was changed; it was torch.float64 on cpu"),
        (lambda model: model[1].requires_grad_(False), "`1.weight` was changed"),
        (lambda model: model[2].requires_grad_(True), "`2.weight` was changed; .*, frozen"),
        (
            lambda model: setattr(model[1], "weight", nn.Parameter(torch.zeros(4, dtype=F64))),
            "`1.weight` was replaced by another; make a new Coupling",
        ),
    ],
)
def test_a_model_that_changes_later_is_refused(change, match):
    model = nn.Sequential(Part(3), Part(4), Part(1).requires_grad_(False))
    trained_parameters = [p for p in model.parameters() if p.requires_grad]
    coupling = Coupling(model, torch.optim.SGD(trained_parameters, lr=0.1))
    coupling.step()
    change(model)
    with pytest.raises(RuntimeError, match=match):
        coupling.step()


@pytest.mark.parametrize("eta", [0.05, 50.0])
def test_many_cut_steps_are_said_once_in_a_while(eta):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained(0, 110, LR, potential="tan", eta=eta, implicit=False, pull=0.1, outer=0.1)
    wanted = ["of the last 100 communications were cut"] if eta < 1 else []
    assert [str(w.message)[-len(wanted) :] for w in caught] == [] or wanted
    assert len(caught) == len(wanted)
    for warning in caught:
        assert wanted[0] in str(warning.message)


def step_unequally(group):
    model = two_layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    coupling = Coupling(model, optimizer, timeout_s=2.0)
    said = ""
    try:
        for t in range(5 + 2 * group.rank):
            backward(model, group.rank, t)
            optimizer.step()
            coupling.step()
    except PeerLostError as error:
        said = str(error)
    u = coupling.state_dict()["u"] if group.rank == 0 else None
    coupling.close()
    return said, u


@pytest.mark.ranks
def test_unequal_numbers_of_steps_are_named(ranks):
    (first, _), (second, _) = ranks(2, step_unequally)
    assert first == ""
    assert "after 6 calls of `step`: do all processes call it equally often?" in second
