"""Time optimizer steps: fusedstep, its peers on equal arrays, and the memory limit."""

from .run import add_arguments, main

__all__ = ["add_arguments", "main"]
