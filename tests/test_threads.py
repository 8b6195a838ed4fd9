"""How many threads: the user's wish, a rank's share of the cores, a container's quota."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import minidl
from minidl.backend import threads
from minidl.backend.native import native
from minidl.data import DataLoader, Dataset

LAUNCHER = [*threads.LOCAL_RANKS, "SLURM_NODEID", "MINIDL_NUM_THREADS", *threads.OF_BLAS]
REPORT = """
import json, minidl, threadpoolctl
blas = [pool["num_threads"] for pool in threadpoolctl.threadpool_info()
        if pool["user_api"] == "blas"]
print(json.dumps([minidl.get_num_threads(), blas]))
"""


@pytest.fixture(autouse=True)
def same_number_afterwards(monkeypatch):
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    before = minidl.get_num_threads()
    yield
    minidl.set_num_threads(before)


def report(code: str = REPORT, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if k not in LAUNCHER}
    return subprocess.run(
        [sys.executable, "-c", code], env={**inherited, **environment}, text=True,
        capture_output=True, timeout=60,
    )  # fmt: skip


def test_set_and_get():
    for n in (3, 1, 2):
        minidl.set_num_threads(n)
        assert minidl.get_num_threads() == n
        if native:
            assert native.get_num_threads() == n
    for wrong in (0, -1, 1.5, "2"):
        with pytest.raises(ValueError, match="expected an integer of at least 1"):
            minidl.set_num_threads(wrong)
    assert minidl.get_num_threads() == 2


def test_the_users_wish_comes_first():
    ours, _ = json.loads(report(MINIDL_NUM_THREADS="3", OMPI_COMM_WORLD_LOCAL_SIZE="2").stdout)
    assert ours == 3
    for wrong in ("0", "many", "-2", "1.5"):
        done = report(MINIDL_NUM_THREADS=wrong)
        assert done.returncode != 0
        assert f"MINIDL_NUM_THREADS={wrong}: expected a number from 1 on" in done.stderr


@pytest.mark.parametrize("name", threads.LOCAL_RANKS)
def test_ranks_share_the_cores(name):
    """As many ranks as cores have one thread each, in NumPy's BLAS too."""
    ranks = str(threads.cores())
    ours, blas = json.loads(report(**{name: ranks}).stdout)
    assert ours == 1
    if int(ranks) > 1:
        assert set(blas) == {1}
        _, blas = json.loads(report(**{name: ranks}, OPENBLAS_NUM_THREADS="2").stdout)
        assert set(blas) == {2}  # whoever sets BLAS's own variable knows better


def test_the_list_of_slurm():
    def ranks(text, node):
        return threads.local_ranks({"SLURM_STEP_TASKS_PER_NODE": text, "SLURM_NODEID": node})

    assert [ranks("4(x2),3", str(node)) for node in range(4)] == [4, 4, 3, 1]
    assert ranks("16", "0") == 16
    assert ranks("", "0") == 1
    assert threads.local_ranks({"SLURM_STEP_TASKS_PER_NODE": "2"}) == 2


@pytest.mark.parametrize(
    ("mask", "launcher", "ranks", "share"),
    [
        (16, 16, 1, 16),
        (16, 16, 4, 4),  # not bound
        (4, 16, 4, 4),  # bound to four cores each
        (8, 16, 4, 4),  # two by two to a socket
        (1, 16, 4, 1),  # to a core
        (2, 2, 4, 1),  # more ranks than cores
        (3, 3, 2, 1),
    ],
)
def test_a_ranks_share(monkeypatch, mask, launcher, ranks, share):
    monkeypatch.setattr(threads, "local_ranks", lambda: ranks)
    monkeypatch.setattr(threads, "cores", lambda process=0: launcher if process else mask)
    assert threads.default_num_threads() == share


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux binds processes")
def test_a_bound_process_keeps_to_its_cores():
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n" + REPORT
    assert json.loads(report(code).stdout)[0] == 1


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, threads.MOST),
        ({"sys/fs/cgroup/cpu.max": "max 100000\n"}, threads.MOST),
        ({"sys/fs/cgroup/cpu.max": "400000 100000\n"}, 4),
        ({"sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),  # one and a half
        (
            {
                "proc/self/cgroup": "0::/pod/box\n",
                "sys/fs/cgroup/pod/cpu.max": "300000 100000\n",
                "sys/fs/cgroup/pod/box/cpu.max": "max 100000\n",
            },
            3,
        ),
        (
            {
                "proc/self/cgroup": "1:cpu:/\n0::/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            2,
        ),
        (
            {
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            threads.MOST,
        ),
    ],
)
def test_a_containers_quota(tmp_path, files, quota):
    assert threads.cgroup_quota(write(tmp_path, files)) == quota


class ThreadsOfTheWorker(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return minidl.get_num_threads()


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_a_worker_of_the_loader_has_one(context):
    minidl.set_num_threads(3)
    loader = DataLoader(
        ThreadsOfTheWorker(), batch_size=2, num_workers=2, multiprocessing_context=context
    )
    assert [n for batch in loader for n in batch.tolist()] == [1] * 4
    assert minidl.get_num_threads() == 3
