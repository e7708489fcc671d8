from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import TCPStore

from consensus.comm import Launch
from consensus.doctor import examination
from consensus.doctor.exchange import Exchange


@pytest.fixture
def examine(make_config, tmp_path, capsys):
    """Exit code and report of one process."""

    def run(*overrides):
        own = [f"output.root={tmp_path}/runs", "model=logistic", *overrides]
        code = examination.examine(make_config(*own), Launch())
        return code, capsys.readouterr().out

    return run


@pytest.fixture
def together():
    """`together(size, function)`: function(exchange) for each member of a store, in threads."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def store():
        return TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)

    def run(size, function):
        members = [Exchange(store(), index, size, 10.0) for index in range(size)]
        with ThreadPoolExecutor(size) as pool:
            return list(pool.map(function, members))

    return run
