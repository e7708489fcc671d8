"""A replacement of a CUDA graph for tests without a GPU.

A tape repeats the operations of one call on the same memory, runs no Python code of the step, and
refuses operations whose result the host reads.
"""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HOST_READS = {torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal}


class HostReadError(RuntimeError):
    pass


class Tape(TorchDispatchMode):
    """The recorded operations of a function, for replay on the same memory."""

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
                # Views and results of in-place operations are up to date already.
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def taped(algorithm, *others):
    """A recorder that leaves the state and the other tensors unchanged, as a CUDA graph does."""

    def record(step):
        kept = [*algorithm.state_dict().values(), *others]
        before = [tensor.clone() for tensor in kept]
        with Tape() as tape:
            step()
        for tensor, value in zip(kept, before, strict=True):
            tensor.copy_(value)
        return tape.replay

    return record
