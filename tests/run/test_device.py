"""The choice of the device."""

import pytest
import torch

from consensus.comm import Launch
from consensus.run.checks import ConfigError
from consensus.run.device import choose_device


def test_devices(make_config, cuda_devices):
    cuda_devices(2)
    auto = make_config("device=auto")
    chosen = [choose_device(auto, Launch(r, 4, r, 4)) for r in range(4)]
    assert chosen == [torch.device("cuda", i) for i in (0, 1, 0, 1)]
    assert choose_device(make_config("device=cpu"), Launch()) == torch.device("cpu")
    cuda_devices(0)
    assert choose_device(auto, Launch()) == torch.device("cpu")
    with pytest.raises(ConfigError) as caught:
        choose_device(make_config("device=cuda"), Launch())
    assert str(caught.value) == "`device` is cuda; allowed: cpu or auto: no CUDA device"
