"""Sums in int8 with error feedback: a quarter of the bytes of float32 for any number of processes.

Each process rounds its message to blocks.py. What the rounding loses is kept, and is added to its
next message (Seide et al. 2014, "1-bit stochastic gradient descent"; Karimireddy et al. 2019, arXiv
1901.09847). With more than two processes there are two phases (Tang et al. 2021, "1-bit Adam",
arXiv 2102.02888):

    x_r = message of rank r + e_r           q_r = the rounded x_r           e_r = x_r - q_r

    P = 2   the q_r are exchanged, and both add them                            total = q_0 + q_1
    P > 2   rank r gets piece r of every q, adds, and rounds the sum c_r         total = rounded c_r
            it sends that to all, and adds what is lost to piece r of e_r

So every loss is in one e_r: over T sums the totals differ from the exact ones by the sum over r of
e_r at the start minus that at the end, whatever T is. All ranks decode the same bytes in the same
order.
"""

import itertools
from collections import deque
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from consensus.comm.blocks import BLOCK, Decoder, Encoder, Packet
from consensus.comm.exchanged_sum import AHEAD, Exchange
from consensus.comm.group import Pending, RepeatedSum
from consensus.comm.rendezvous import in_thread

if TYPE_CHECKING:
    from consensus.comm.process_group import ProcessGroup


class Int8Sum(RepeatedSum):
    """A repeated sum in int8. The total is written to `message`.

    Args:
        group: The processes, connected by Gloo.
        message: The summand, on the CPU.
        exact: How many of the last numbers are sent as they are.

    Attributes:
        residual: e_r, what the messages so far lack; 0 at the start. (numel - exact,)
    """

    residual: Tensor

    def __init__(self, group: "ProcessGroup", message: Tensor, exact: int) -> None:
        self._group, self.message = group, message
        rank, size, dtype = group.rank, group.size, message.dtype
        n, others = len(message) - exact, [r for r in range(size) if r != rank]
        numbers, self._exact = message.split([n, exact])
        self.residual = torch.zeros_like(numbers)
        blocks = -(-n // BLOCK)
        ends = [min(n, blocks * r // size * BLOCK) for r in range(size + 1)]
        pieces = [slice(*both) for both in itertools.pairwise(ends)] if size > 2 else [slice(0, n)]
        sent = [Packet(piece.stop - piece.start, exact, dtype) for piece in pieces]
        self._packets = sent
        pairs = zip(sent, pieces, strict=True)
        self._encoders = [Encoder(x, self.residual[own], numbers[own]) for x, own in pairs]
        of = {r: r if size > 2 else 0 for r in range(size)}  # the piece that a rank adds
        mine = pieces[of[rank]]
        self._first = Exchange(group, {r: sent[of[r]].bytes for r in others})
        self._turns: deque[tuple[list[Packet], list[Decoder]]] = deque()
        for _ in range(AHEAD):
            packets = [Packet(mine.stop - mine.start, exact, dtype) for _ in range(size)]
            packets[rank] = sent[of[rank]]
            adders = [Decoder(x, numbers[mine], add=r > 0) for r, x in enumerate(packets)]
            self._turns.append((packets, adders))
            self._first.expect({r: packets[r].bytes for r in others})
        self._others, self._second = others, None
        if size > 2:
            self._total, self._lost = numbers[mine], self.residual[mine]
            totals = [Packet(piece.stop - piece.start, 0, dtype) for piece in pieces]
            pairs = zip(totals, pieces, strict=True)
            self._decoders = [Decoder(packet, numbers[own]) for packet, own in pairs]
            self._left = torch.zeros_like(self._total)  # of the total, by its rounding
            self._encode_total = Encoder(totals[rank], self._left, self._total)
            self._second = Exchange(group, {r: totals[rank].bytes for r in others})
            self._memory = {r: totals[r].bytes for r in others}

    @property
    def num_bytes(self) -> int:
        """Bytes of an encoded message."""
        return sum(packet.bytes.nbytes for packet in self._packets)

    def start(self) -> Pending:
        """Encode the message and begin to send it."""
        for packet, encode in zip(self._packets, self._encoders, strict=True):
            encode()
            packet.exact.copy_(self._exact)
        with self._group.reporting("sum"):
            if self._second is not None:
                self._second.expect(self._memory)
            self._first.send()
        # Somebody has to begin the second phase when the first has ended.
        if self._second is None:
            return Pending(self._finish)
        return Pending(in_thread(self._finish, "sum").result)

    def _finish(self) -> Tensor:
        with self._group.reporting("sum"):
            self._first.wait()
            self._add()
            if self._second is not None:
                self._second.send()
                self._second.wait()
                for decode in self._decoders:
                    decode()
        return self.message

    def _add(self) -> None:
        """Add the messages in the order of ranks, and announce their memory again."""
        packets, adders = self._turns[0]
        self._turns.rotate(-1)
        for add in adders:
            add()
        torch.sum(torch.stack([packet.exact for packet in packets]), 0, out=self._exact)
        self._first.expect({r: packets[r].bytes for r in self._others})
        if self._second is not None:
            self._encode_total()
            self._lost += self._left
            self._left.zero_()
