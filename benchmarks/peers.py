"""torchft's LocalSGD and DiLoCo as loops of benchmarks/loops.py.

Each process is a replica group of one rank, with a store and a manager of its own; the
lighthouse, which forms the quorum, runs in rank 0. Both methods act in hooks of the optimizer.
"""

import importlib.util
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.harness import TIMEOUT_S, Problem
from benchmarks.loops import Loop
from consensus.comm import Group

PACKAGES = ("accelerate", "torchft")
INSTALL = "pip install '.[peers]' installs them, in a clone of this repository"


def missing() -> list[str]:
    """The packages of the extra that are not installed here."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def require() -> None:
    """End the command with exit code 1 and one line, unless the packages are there."""
    if absent := missing():
        raise SystemExit(f"`--peers` needs {' and '.join(absent)}; {INSTALL}")


class Torchft(Loop):
    """The loop with a method of torchft.

    Args:
        problem: The model and the images.
        group: The processes.
        period: Iterations from one synchronization to the next.
        make: Makes the context of the method from this loop, whose manager is there.
    """

    def __init__(
        self, problem: Problem, group: Group, period: int, make: Callable[["Torchft"], Any]
    ) -> None:
        super().__init__(problem, group, period)
        os.environ.setdefault("RUST_LOG", "error")  # otherwise ten lines for each synchronization
        from torchft import Manager, ProcessGroupGloo
        from torchft._torchft import LighthouseServer

        self.lighthouse = None
        if group.rank == 0:
            self.lighthouse = LighthouseServer(bind="0.0.0.0:0", min_replicas=group.size)
        address = group.share(None if self.lighthouse is None else self.lighthouse.address())
        self.store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        limit = timedelta(seconds=TIMEOUT_S)
        self.manager = Manager(
            pg=ProcessGroupGloo(timeout=limit),
            load_state_dict=self.module.load_state_dict,
            state_dict=self.module.state_dict,
            min_replica_size=group.size,
            use_async_quorum=False,  # DiLoCo requires it
            timeout=limit,
            quorum_timeout=limit,
            rank=0,
            world_size=1,
            store_addr="localhost",
            store_port=self.store.port,
            lighthouse_addr=address,
            replica_id=f"replica_{group.rank}",
            hostname="localhost",
            init_sync=False,  # the weights are equal
        )
        self.context = make(self)
        self.context.__enter__()

    def close(self) -> None:
        self.context.__exit__(None, None, None)
        self.group.barrier()
        self.manager.shutdown()
        if self.lighthouse is not None:
            self.lighthouse.shutdown()


def local_sgd(loop: Torchft) -> Any:
    """torchft's LocalSGD."""
    from torchft.local_sgd import LocalSGD

    return LocalSGD(loop.manager, loop.module, loop.optimizer, loop.period)


def diloco(loop: Torchft) -> Any:
    """torchft's DiLoCo, one fragment, one message."""
    from torchft.local_sgd import DiLoCo

    outer = torch.optim.SGD(loop.module.parameters(), lr=0.7, momentum=0.9, nesterov=True)
    return DiLoCo(
        loop.manager, [loop.module], loop.optimizer, outer, loop.period, use_bucketization=True
    )
