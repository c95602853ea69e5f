"""Optimizers whose state is sharded over ranks, on MPI, NCCL or torch.distributed.

Nothing here is imported by ``import fusedstep``, and no engine before it is used.
"""

from ..step_info import StepInfo
from .checkpoint import Loaded
from .engine import Engine, LocalEngine, Request
from .mpi import MpiEngine
from .nccl import NcclEngine
from .sharded import ShardedOptimizer
from .torch import TorchEngine

__all__ = [
    "Engine",
    "Loaded",
    "LocalEngine",
    "MpiEngine",
    "NcclEngine",
    "Request",
    "ShardedOptimizer",
    "StepInfo",
    "TorchEngine",
]
