"""Fused gradient-descent and Adam steps: one pass over memory, the same bits everywhere."""

from ._core import __version__, available_isas, get_isa, set_isa
from .functional import adam_step, adamw_step, gd_step
from .loss_scaler import LossScaler
from .optim import GD, SGD, Adam, AdamW, Optimizer
from .step_info import StepInfo
from .threads import get_num_threads, num_threads, set_num_threads

__all__ = [
    "GD",
    "SGD",
    "Adam",
    "AdamW",
    "LossScaler",
    "Optimizer",
    "StepInfo",
    "__version__",
    "adam_step",
    "adamw_step",
    "available_isas",
    "gd_step",
    "get_isa",
    "get_num_threads",
    "num_threads",
    "set_isa",
    "set_num_threads",
    "show_config",
]


def show_config() -> None:
    """Print what ``python -m fusedstep info`` prints: version, instruction sets, threads."""
    from .commands.info import show_config

    show_config()
