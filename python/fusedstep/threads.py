"""Number of threads of the CPU backend, and its controller for threadpoolctl."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from fusedstep import _core

__all__ = ["get_num_threads", "num_threads", "set_num_threads"]


def set_num_threads(n: int) -> None:
    """Set the number of threads that a step on the CPU may use.

    The number holds for the whole process. Results do not depend on it, bit for bit.

    Parameters
    ----------
    n : int
        At least 1.
    """
    _core.set_num_threads(n)


def get_num_threads() -> int:
    """Return the number of threads that a step on the CPU may use.

    At start it is ``FUSEDSTEP_NUM_THREADS``, else ``OMP_NUM_THREADS``, else the number of CPUs this
    process may run on or its cgroup quota, whichever is smaller.
    """
    return _core.get_num_threads()


@contextmanager
def num_threads(n: int) -> Iterator[None]:
    """Use `n` threads inside a ``with`` block, or in a function that this decorates.

    As with `set_num_threads`, the number holds for the whole process while the block runs.

    Examples
    --------
    >>> with fusedstep.num_threads(1):
    ...     optimizer.step(grads)
    """
    before = get_num_threads()
    set_num_threads(n)
    try:
        yield
    finally:
        set_num_threads(before)


def _register_controller(threadpoolctl: ModuleType) -> None:
    if not hasattr(threadpoolctl, "register"):  # before 3.2
        return

    class FusedstepController(threadpoolctl.LibController):  # type: ignore[misc, name-defined]
        user_api = "fusedstep"
        internal_api = "fusedstep"
        # Other packages have a `_core` too; the symbols tell which one is ours.
        filename_prefixes = ("_core",)
        check_symbols = ("fusedstep_get_num_threads", "fusedstep_set_num_threads")

        def get_num_threads(self) -> int:
            return int(self.dynlib.fusedstep_get_num_threads())

        def set_num_threads(self, num_threads: int) -> None:
            self.dynlib.fusedstep_set_num_threads(num_threads)

        def get_version(self) -> str:
            return _core.__version__

    threadpoolctl.register(FusedstepController)


class _RegisterOnImport:
    """Finder that registers the controller as soon as somebody imports threadpoolctl.

    Importing it here would make every `import fusedstep` 5 ms slower, and threadpoolctl sets an
    environment variable when imported, which is not ours to do. Looking for it only once, here,
    would miss programs that import threadpoolctl (or scikit-learn) after fusedstep.
    """

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "threadpoolctl":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        loader: Any = spec.loader
        exec_module = loader.exec_module

        def exec_and_register(module: ModuleType) -> None:
            exec_module(module)
            _register_controller(module)

        loader.exec_module = exec_and_register
        return spec


if "threadpoolctl" in sys.modules:
    _register_controller(sys.modules["threadpoolctl"])
else:
    sys.meta_path.insert(0, _RegisterOnImport())
