"""Starts the ranks of a job with mpirun, and sees that none of its processes is left behind."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

LIMIT = 120  # seconds, for a whole job
_MARK = "FUSEDSTEP_TEST_JOB"


def mpirun():
    """Return the mpirun of this Python's environment, else the one on the path."""
    own = Path(sys.executable).parent / "mpirun"
    found = own if own.exists() else shutil.which("mpirun")
    pytest.importorskip("mpi4py", reason="mpi4py is not installed: pip install mpi4py mpich")
    if not found:
        pytest.skip("there is no mpirun: pip install mpich")
    return str(found)


class Job:
    """A job under mpirun: ``with Job(2, "script.py", "arguments") as job: ...``."""

    def __init__(self, ranks, *arguments, **environment):
        self._mark = uuid.uuid4().hex
        self.process = subprocess.Popen(
            [mpirun(), "-n", str(ranks), sys.executable, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            start_new_session=True,
            env={
                **os.environ,
                _MARK: self._mark,
                "FUSEDSTEP_NUM_THREADS": "1",
                # Open MPI refuses by default to run as root, and more ranks than cores.
                "OMPI_ALLOW_RUN_AS_ROOT": "1",
                "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
                "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
                **environment,
            },
        )

    def pids(self, script=None):
        """Return the processes of this job: all, or the ranks, that run `script`."""
        found = []
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError):  # of another user, or gone
                if folder.name.isdecimal() and self._mark in (folder / "environ").read_text():
                    command = (folder / "cmdline").read_text().split("\0")
                    if script is None or (command[0] == sys.executable and script in command):
                        found.append(int(folder.name))
        return found

    def kill(self, pids):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def finish(self, timeout=LIMIT):
        """Wait for the end; return exit status, stdout, stderr."""
        out, err = self.process.communicate(timeout=timeout)
        return self.process.returncode, out, err

    def __enter__(self):
        return self

    def __exit__(self, *failure):
        # mpirun may end a little before what it started.
        deadline = time.monotonic() + (0 if failure[0] else 10)
        while (left := self.pids()) and time.monotonic() < deadline:
            time.sleep(0.05)
        self.kill(left)
        self.process.communicate()
        assert failure[0] or not left, f"processes left behind: {left}"


def run(ranks, *arguments, **environment):
    """Run a job to its end; return its stdout."""
    with Job(ranks, *arguments, **environment) as job:
        status, out, err = job.finish()
        assert status == 0, f"{out}\n{err}"
    return out
