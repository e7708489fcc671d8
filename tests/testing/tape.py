"""What stands in for a CUDA graph where there is no GPU.

Like one, a tape repeats the operations of one call on the memory that they had, runs no Python of
the step, and refuses a number that the host reads.
"""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HOST_READS = {torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal}


class HostReadError(RuntimeError):
    pass


class Tape(TorchDispatchMode):
    """The operations of a function, to be repeated on the same memory."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in HOST_READS:
            raise HostReadError(str(func))
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, result in self.operations:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                # A view, and what is written in place, is there already.
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def taped(algorithm, *others):
    """As a CUDA graph is recorded: without changing a number, of its state or of the others."""

    def record(step):
        kept = [*algorithm.state_dict().values(), *others]
        before = [tensor.clone() for tensor in kept]
        with Tape() as tape:
            step()
        for tensor, value in zip(kept, before, strict=True):
            tensor.copy_(value)
        return tape.replay

    return record
