"""Number of threads: the context manager, and the controller for threadpoolctl."""

import subprocess
import sys

import pytest

import fusedstep as fs


def test_num_threads_is_restored_after_the_block():
    before = fs.get_num_threads()
    with fs.num_threads(before + 1):
        assert fs.get_num_threads() == before + 1
        with pytest.raises(ZeroDivisionError), fs.num_threads(1):
            1 / (fs.get_num_threads() - 1)
        assert fs.get_num_threads() == before + 1
    assert fs.get_num_threads() == before


def test_bad_numbers_of_threads_are_refused():
    before = fs.get_num_threads()
    for bad in (0, -1):
        with pytest.raises(ValueError, match="num_threads"), fs.num_threads(bad):
            pass
    with pytest.raises(TypeError):
        fs.set_num_threads("2")
    assert fs.get_num_threads() == before


def test_threadpoolctl_sees_and_limits_fusedstep():
    threadpoolctl = pytest.importorskip("threadpoolctl")
    with fs.num_threads(3):
        (info,) = threadpoolctl.ThreadpoolController().select(user_api="fusedstep").info()
        assert info["num_threads"] == 3
        assert info["internal_api"] == "fusedstep"
        assert info["version"] == fs.__version__
        for user_api in ("fusedstep", None):
            with threadpoolctl.threadpool_limits(1, user_api=user_api):
                assert fs.get_num_threads() == 1
            assert fs.get_num_threads() == 3


@pytest.mark.parametrize(
    "imports",
    [
        "import fusedstep, threadpoolctl",
        "import threadpoolctl, fusedstep",
        "import fusedstep; from importlib.util import find_spec; find_spec('threadpoolctl')\n"
        "import threadpoolctl",
    ],
)
def test_the_order_of_imports_does_not_matter(imports):
    pytest.importorskip("threadpoolctl")
    code = (
        f"{imports}\n"
        "print([i['user_api'] for i in threadpoolctl.threadpool_info()].count('fusedstep'))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "1", result.stderr


def test_import_works_without_threadpoolctl():
    code = (
        "import sys; sys.modules['threadpoolctl'] = None\n"
        "import fusedstep; print(fusedstep.get_num_threads())\n"
        "try:\n    import threadpoolctl\n"
        "except ModuleNotFoundError:\n    print('missing')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.split()[1:] == ["missing"], result.stderr
