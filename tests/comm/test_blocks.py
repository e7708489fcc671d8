"""Blocks of int8 against NumPy and against the bound of the error."""

import numpy as np
import pytest
import torch

from consensus.comm.blocks import BLOCK, TILE, Decoder, Encoder, Packet

SIZES = [1, BLOCK - 1, BLOCK, BLOCK + 1, TILE * BLOCK, 2 * TILE * BLOCK + 3 * BLOCK + 5]
TINY = float(np.finfo(np.float32).tiny)


def numbers(numel, dtype=np.float32):
    random = np.random.default_rng(numel)
    magnitudes = 10.0 ** random.integers(-30, 30, -(-numel // BLOCK))
    return (random.normal(size=numel) * np.repeat(magnitudes, BLOCK)[:numel]).astype(dtype)


def passed(x, added=None):
    """The packet of x + added, what is left of x, and the decoded numbers."""
    left, packet = torch.from_numpy(x.copy()), Packet(len(x), 0, torch.from_numpy(x).dtype)
    added = torch.zeros_like(left) if added is None else torch.from_numpy(added)
    out = torch.full_like(left, 7.0)
    with np.errstate(all="ignore"):
        Encoder(packet, left, added)()
        Decoder(packet, out)()
    return packet, left.numpy(), out.numpy()


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_encoding_is_that_of_numpy_and_the_error_half_a_scale(numel, dtype):
    x = numbers(numel, dtype)
    packet, left, out = passed(x / 2, x / 2)
    assert packet.bytes.nbytes == numel + 4 * -(-numel // BLOCK)
    for b, start in enumerate(range(0, numel, BLOCK)):
        block = slice(start, start + BLOCK)
        scale = np.float32(np.float32(abs(x[block]).max()) / np.float32(127))
        assert packet.scales[b].item() == scale
        expected = np.rint(x[block] / scale)
        assert abs(expected).max() == 127
        np.testing.assert_array_equal(packet.quantized[block], expected.astype(np.int8))
        decoded = expected.astype(dtype) * scale
        np.testing.assert_array_equal(out[block], decoded)
        np.testing.assert_array_equal(left[block], x[block] - decoded)
        assert (abs(out[block] - x[block]) <= 0.5 * scale * (1 + 1e-5)).all()


def test_a_decoder_adds():
    x = numbers(1000)
    packet, _, out = passed(x)
    total = torch.from_numpy(x.copy())
    Decoder(packet, total, add=True)()
    np.testing.assert_array_equal(total, x + out)


def test_zeros_and_the_smallest_numbers():
    x = np.zeros(3 * BLOCK, np.float32)
    x[BLOCK + 1], x[2 * BLOCK :] = 1e-44, TINY
    packet, left, out = passed(x)
    assert (out[:BLOCK] == 0).all()
    assert (left[:BLOCK] == 0).all()
    assert (packet.scales == TINY).all()
    assert out[BLOCK + 1] == 0
    assert left[BLOCK + 1] == x[BLOCK + 1]
    np.testing.assert_array_equal(out[2 * BLOCK :], x[2 * BLOCK :])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_spoils_its_block_and_no_other(value):
    x = numbers(4 * BLOCK)
    x[BLOCK + 3] = value
    out = passed(x)[2]
    assert not np.isfinite(out[BLOCK : 2 * BLOCK]).any()
    out[BLOCK : 2 * BLOCK] = x[BLOCK : 2 * BLOCK] = 0
    assert np.isfinite(out).all()


def test_exact_numbers_have_a_place_of_their_own():
    packet = Packet(5, 2, torch.float64)
    packet.exact.copy_(torch.tensor([1 / 3, 1e300], dtype=torch.float64))
    Encoder(packet, torch.ones(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64))()
    assert packet.exact.tolist() == [1 / 3, 1e300]
    assert packet.bytes.nbytes == 2 * 8 + 4 + 5
