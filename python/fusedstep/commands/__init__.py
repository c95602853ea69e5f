"""The subcommands of ``python -m fusedstep``."""
