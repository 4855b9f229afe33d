"""Several devices of one site: each works on its own patients, and the sums are added.

Noise is added once, by rank 0, before the sums meet. The sums are integers in float64, so adding
them is exact and the result does not depend on how patients were dealt out.
"""

import os
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as distributed
from torch import Tensor

from crafts_privacy.errors import RankError


class Ranks(Protocol):
    """This process among those that take a step together."""

    rank: int
    count: int

    def sum_(self, sum_D: Tensor, *, failed: bool) -> None:
        """Put the sum over all ranks into ``sum_D``. Every rank calls it once a step.

        Raises:
            RankError: a rank says that it failed, or is gone.
        """

    def least(self, number: int) -> int:
        """Of what all ranks say. Every rank calls it as often as the others.

        Raises:
            RankError: a rank is gone.
        """


class Alone:
    """One process, one device."""

    rank, count = 0, 1

    def least(self, number: int) -> int:
        """See :class:`Ranks`."""
        return number

    def sum_(self, sum_D: Tensor, *, failed: bool) -> None:
        """See :class:`Ranks`; the failure is on its way already."""


class ProcessRanks:
    """Processes of one machine, by torch.distributed (NCCL between GPUs, Gloo otherwise).

    On loopback alone: what they tell each other has no noise yet, and neither library asks who
    connects. Left alone both listen where the machine's name leads.
    """

    def __init__(self, meeting: Path, rank: int, count: int, *, timeout_s: float = 1800.0) -> None:
        """Wait until all are there.

        Args:
            meeting: A file that does not exist yet, in a folder that only this user may enter.
            rank: 0 adds the noise.
            count: Of all processes.
            timeout_s: How long a step waits for the slowest rank.

        Raises:
            RankError: not all came.
        """
        self.rank, self.count = rank, count
        os.environ |= dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), "lo")
        try:
            distributed.init_process_group(
                "cpu:gloo,cuda:nccl" if distributed.is_nccl_available() else "gloo",
                init_method=f"file://{meeting.resolve()}",
                rank=rank,
                world_size=count,
                timeout=timedelta(seconds=timeout_s),
            )
        except RuntimeError as error:
            # torch counts groups in their names; after a failure it would wait under another
            # name than the new processes, for ever.
            distributed.distributed_c10d._world.group_count = 0
            raise RankError("not all devices of this site came up; see the log") from error

    def sum_(self, sum_D: Tensor, *, failed: bool) -> None:
        """See :class:`Ranks`. A rank without patients adds zero: nobody waits in vain."""
        num_failed = torch.tensor(int(failed), device=sum_D.device)
        try:
            distributed.all_reduce(num_failed)
            if not num_failed:
                distributed.all_reduce(sum_D)
        except RuntimeError as error:
            raise RankError("a device of this site is gone; see the log") from error
        if num_failed and not failed:
            raise RankError("another device of this site failed; see the log")

    def least(self, number: int) -> int:
        """See :class:`Ranks`."""
        least = torch.tensor(number)
        try:
            distributed.all_reduce(least, distributed.ReduceOp.MIN)
        except RuntimeError as error:
            raise RankError("a device of this site is gone; see the log") from error
        return int(least)

    def close(self) -> None:
        """Leave."""
        distributed.destroy_process_group()
