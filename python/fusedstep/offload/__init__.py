"""Optimizers whose state is in host memory, for parameters that live on a GPU (docs/offload.md).

For PyTorch see `fusedstep.offload.torch`. Nothing here is imported by ``import fusedstep``, and no
array library before its arrays are used.
"""

from ..step_info import StepInfo
from .device import Copy, Device, HostDevice
from .optimizer import OffloadedOptimizer

__all__ = ["Copy", "Device", "HostDevice", "OffloadedOptimizer", "StepInfo"]
