"""The processes of a run: which share of the work each one has, and what they exchange.

Every process runs the same program and comes to the same decisions.  The sequences are dealt out in batches, batch k to process k mod N, so
that each batch is computed as one process alone computes it.  Sums over sequences meet at the process that goes on with them, their owner.
"""

import heapq
import os
from itertools import zip_longest

import torch
import torch.distributed as dist


class World:
    """One process among `size`; by default the only one, for which every exchange gives back what it got."""

    def __init__(self, rank=0, size=1, device=None):
        """device: torch.device of what is exchanged.  torch.distributed must be initialized if size > 1."""
        self.rank, self.size, self.device = rank, size, device
        self.local_rank = int(os.environ.get("LOCAL_RANK", rank)) if size > 1 else 0  # among those on this machine

    @property
    def first(self):
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def own(self, items):
        """This process's share of a sequence of items."""
        return items[self.rank :: self.size]

    # ---- Exchanges: every process has to make the same ones, in the same order ----

    def share(self, value, source=0):
        """The value that one process has, at all of them.  Anything that can be pickled."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, source, device=self.device)
        return box[0]

    def gather(self, value):
        """The values of all processes, in their order, at all of them."""
        if self.size == 1:
            return [value]
        found = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def barrier(self):
        """Wait for all processes."""
        self.gather(None)

    def broadcast(self, tensors, source):
        """{name: tensor} of one process, on the device of each of them; elsewhere `tensors` is ignored."""
        if self.size == 1:
            return tensors
        shapes = self.share({name: (t.dtype, t.shape) for name, t in tensors.items()} if self.rank == source else None, source)
        found = {}
        for name, (dtype, shape) in shapes.items():
            found[name] = tensors[name].contiguous() if self.rank == source else torch.empty(shape, dtype=dtype, device=self.device)
            dist.broadcast(found[name], source)
        return found

    def add(self, tensor, owner=None):
        """Add up a tensor over the processes, in place: at its owner, where others have no use for theirs afterwards; None: at all."""
        self._combine(tensor, owner, dist.ReduceOp.SUM)

    def largest(self, tensor, owner=None):
        """The same with the largest of each element in place of the sum."""
        self._combine(tensor, owner, dist.ReduceOp.MAX)

    def _combine(self, tensor, owner, how):
        if self.size > 1:
            dist.all_reduce(tensor, how) if owner is None else dist.reduce(tensor, owner, how)

    def total(self, number):
        """The sum of a number over the processes."""
        return sum(self.gather(number))

    def collect(self, tensors, owner):
        """Lists of tensors in the order of the batches that they are from, at their owner; elsewhere []."""
        if self.size == 1:
            return tensors
        lists = []
        for rank, shapes in enumerate(self.gather([(t.dtype, t.shape) for t in tensors])):
            if self.rank == owner != rank:
                lists.append([torch.empty(shape, dtype=dtype, device=self.device) for dtype, shape in shapes])
                for tensor in lists[-1]:
                    dist.recv(tensor, rank)
            else:
                lists.append(tensors)
                for tensor in tensors if self.rank == rank != owner else ():
                    dist.send(tensor.contiguous(), owner)
        return in_turn(lists) if self.rank == owner else []

    def owners(self, costs):
        """Which process takes each piece of work, so that the longest way to the end is short.  costs: {piece: work} -> {piece: rank}."""
        loads, found = [(0, rank) for rank in range(self.size)], {}
        for piece in sorted(costs, key=costs.get, reverse=True):
            load, rank = heapq.heappop(loads)
            found[piece] = rank
            heapq.heappush(loads, (load + costs[piece], rank))
        return found


ALONE = World()


def in_turn(lists):
    """What was dealt out by World.own, in its order again."""
    nothing = object()
    return [item for turn in zip_longest(*lists, fillvalue=nothing) for item in turn if item is not nothing]
