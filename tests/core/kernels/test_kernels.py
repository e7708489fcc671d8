"""The choice of a kernel, and lines 3 and 6 by name."""

import pytest
import torch

from consensus import POTENTIALS, Layerwise
from consensus.core.kernels import choose_kernel, consensus_kernel, native, worker_kernel
from consensus.core.kernels.plain import ExactUpdate, Plain, ProximalStep
from consensus.core.kernels.tiled import Tiled

SMALL, LARGE = 100, 200_000


def tan(n, eta=0.5):
    return Layerwise(POTENTIALS["tan"], [(0, n)], eta)


def test_without_a_compiler_small_vectors_are_plain_and_large_ones_tiled(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    assert type(choose_kernel(tan(SMALL), torch.zeros(SMALL))) is Plain
    assert type(choose_kernel(tan(LARGE), torch.zeros(LARGE))) is Tiled


@pytest.mark.parametrize("n", [SMALL, LARGE])
def test_several_scales_are_plain_on_a_cpu(n):
    weighted = Layerwise(POTENTIALS.make("scaled_quad", weight=[2.0]), [(0, n)])
    weighted.scale = torch.ones(n)
    assert type(choose_kernel(weighted, torch.zeros(n))) is Plain
    widths = tan(n, torch.tensor([[1.0], [2.0]]))
    assert type(choose_kernel(widths, torch.zeros(2, n), configurations=2)) is Plain


@pytest.mark.gpu
def test_a_gpu_has_kernels_for_the_potentials_of_table_2():
    triton = pytest.importorskip("consensus.core.kernels.triton")
    like, widths = torch.zeros(2, SMALL, device="cuda"), torch.tensor([[1.0], [2.0]])
    assert type(choose_kernel(tan(SMALL), like)) is triton.Triton
    assert type(choose_kernel(tan(SMALL, widths), like, configurations=2)) is triton.Triton
    assert type(choose_kernel(tan(SMALL, widths), like)) is Plain
    log_cosh = Layerwise(POTENTIALS["log_cosh"], [(0, SMALL)])
    assert type(choose_kernel(log_cosh, like)) is Plain


def test_names_of_line_3_and_line_6(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    phi, like = tan(SMALL), torch.zeros(SMALL)
    assert type(consensus_kernel("gradient", phi, like, lambda x: x)) is Plain
    assert type(consensus_kernel("exact", phi, like, lambda x: x)) is ExactUpdate
    assert type(worker_kernel("explicit", phi, like)) is Plain
    assert type(worker_kernel("implicit", phi, like)) is ProximalStep
