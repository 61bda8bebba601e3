"""The processes that torchrun or srun started, and how they share a clip.

W ranks = B branches x S ranks      branch 1 computes the negative prompt while branch 0 computes the prompt, or the
                                    other way round where the pipeline has both in one batch (Mochi), in that order;
                                    the S ranks of a branch share the tokens (`train.attention.sequence`)
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import SLURMEnvironment

from radial.cli.ranks import Rank
from train.attention.sequence import SequenceGroup
from train.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun or srun started."""

    world: int
    rank: int
    device: torch.device

    @classmethod
    def join(cls) -> Ranks:
        """Joins the other processes, if there are any."""
        cuda, here = torch.cuda.is_available(), Rank.here()
        # srun may give each task a GPU that is the only one it sees
        device = torch.device("cuda", here.local % torch.cuda.device_count()) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        if here.world > 1 and not dist.is_initialized():
            if here.started_by == "srun":
                _meet_at_first_node()
            # the first rank decodes and writes while the others wait
            backend, patience = "nccl" if cuda else "gloo", timedelta(hours=12)
            dist.init_process_group(backend, rank=here.index, world_size=here.world, timeout=patience)
        if not dist.is_initialized():
            return cls(1, 0, device)
        return cls(dist.get_world_size(), dist.get_rank(), device)

    def share(self, item: Any) -> Any:
        """The first rank's."""
        if self.world == 1:
            return item
        box = [item]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]


def _meet_at_first_node() -> None:
    """Where the tasks of an srun meet, unless the job's script sets it: on a port of the step's own."""
    first = SLURMEnvironment.resolve_root_node_address(os.environ["SLURM_STEP_NODELIST"])
    os.environ.setdefault("MASTER_ADDR", first)
    step = int(os.environ["SLURM_JOB_ID"]) + int(os.environ["SLURM_STEP_ID"])
    os.environ.setdefault("MASTER_PORT", str(20000 + step % 20000))


@dataclass(frozen=True)
class Split:
    """How ranks share the work.

    Attributes:
        sequence: the ranks that share this rank's tokens; None: this rank has them all.
        branches: 2 where the negative prompt has ranks of its own.
        branch: this rank's.
        partner: this rank and the one with the same tokens in the other branch.
    """

    sequence: SequenceGroup | None = None
    branches: int = 1
    branch: int = 0
    partner: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, world: int, rank: int, size: int | None, guidance: bool | None, guided: bool, heads: int) -> Split:
        """The split of ``world`` ranks; every rank must call it.

        Args:
            size: ranks that share a clip's tokens; None: what the branches leave.
            guidance: give the negative prompt half of the ranks; None: if that can be.
            guided: whether there is a negative prompt.
            heads: of the model.

        Raises:
            UserError: the numbers do not fit together.
        """
        if guidance and not guided:
            raise UserError("split_guidance is true, but guidance is off: there is no negative prompt to give ranks to")
        can_pair = guided and guidance is not False and world % 2 == 0
        branches = 2 if can_pair and size in (None, world // 2) else 1
        size = world // branches if size is None else size
        if branches * size != world or (guidance and branches == 1):
            possible = [str(world // 2)] * can_pair + [str(world)] * (not guidance)
            raise UserError(
                f"sequence is {size} on {world} ranks, expected {' or '.join(possible) or 'an even number'}"
            )
        if heads % size:
            sizes = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
            raise UserError(f"sequence is {size}, expected a divisor of the model's {heads} heads: {sizes}")
        sequence = SequenceGroup.of(size) if world > 1 else None
        partner = None
        for first in range(size) if branches == 2 else ():
            group = dist.new_group([first, first + size])
            if rank % size == first:
                partner = group
        return cls(sequence, branches, rank // size, partner)
