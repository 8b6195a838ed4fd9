"""Several hosts on one machine: network namespaces, joined by links of a given rate. Needs root.

Each host has an address of its own and sees the others through a bridge only; Open MPI starts its
daemons there as it would by ssh, and talks TCP.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.test_distributed import HAVE_MPI, MPIRUN, is_open_mpi


def missing() -> str:
    """Why there can be no emulated cluster here, or nothing."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "not root"
    if not all(map(shutil.which, ("ip", "tc", "unshare"))):
        return "no ip, tc or unshare"
    if not HAVE_MPI or not is_open_mpi():
        return "no Open MPI"
    name = f"mdl{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return "" if made else "network namespaces are not allowed here"


needs_cluster = pytest.mark.skipif(bool(why := missing()), reason=f"no emulated cluster: {why}")


class Cluster:
    """Hosts that `cluster` has made."""

    def __init__(self, names: list[str], folder: Path) -> None:
        self.names = names
        self.hosts, self.agent = folder / "hosts", folder / "agent.sh"
        self.hosts.write_text("".join(f"10.77.0.{i + 1} slots=1\n" for i in range(len(names))))
        keep = f"PATH={shlex.quote(os.environ['PATH'])} PYTHONPATH={Path(__file__).parents[1]}"
        prefix = names[0][:-1]
        self.agent.write_text(  # "ssh": HOST COMMAND ...
            "#!/bin/bash\nhost=$1; shift; i=$(( ${host##*.} - 1 ))\n"
            f"exec ip netns exec {prefix}$i unshare -u bash -c "
            f'"hostname node$i; export {keep}; $*"\n'
        )
        self.agent.chmod(0o755)

    def options(self) -> list[str]:
        """mpirun's, for a rank on each host."""
        words = "--prtemca prte_keep_fqdn_hostnames 1 --mca pml ob1 --mca btl self,tcp"
        words += " --mca btl_tcp_if_include 10.77.0.0/24 --mca coll ^han"
        words += " --mca mpi_yield_when_idle 1 --bind-to none"  # (each would take core 0)
        places = ["--prtemca", "plm_ssh_agent", str(self.agent), "--hostfile", str(self.hosts)]
        return [*places, *words.split()]

    def on_first(self, command: list[str]) -> list[str]:
        """The command, on the first host."""
        there = f"hostname node0; exec {shlex.join(command)}"
        return ["ip", "netns", "exec", self.names[0], "unshare", "-u", "bash", "-c", there]

    def mpirun(self, code: str, timeout: float = 120) -> str:
        """Run Python code with a rank on each host; what it prints. No process is left."""
        python = [sys.executable, "-c", textwrap.dedent(code)]
        process = subprocess.Popen(
            self.on_first([str(MPIRUN), *self.options(), "-n", str(len(self.names)), *python]),
            env={**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "MINIDL_NUM_THREADS": "1",
                 "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "MINIDL_DIST_CHECK": "0",
                 "PYTHONPATH": str(Path(__file__).parents[1])},
            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)
            out, err = process.communicate(timeout=20)
            pytest.fail(f"the hosts did not end in {timeout} s:\n{out}\n{err}")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        assert process.returncode == 0, err
        return out


@contextmanager
def cluster(hosts: int, megabits: int, folder: Path) -> Iterator[Cluster]:
    """Hosts joined by links of so many 10⁶ bits a second, in each direction."""
    unique = f"mdl{os.getpid()}"
    switch, names = f"{unique}s", [f"{unique}n{i}" for i in range(hosts)]
    # (A burst of 1.3 ms: with less, large packets are cut up here, which network cards do.)
    shape = f"root tbf rate {megabits}mbit burst {160 * megabits} latency 400ms"

    def run(command: str) -> None:
        subprocess.run(command.split(), check=True, capture_output=True, timeout=30)

    try:
        for name in (switch, *names):
            run(f"ip netns add {name}")
            run(f"ip -n {name} link set lo up")
        run(f"ip -n {switch} link add br0 type bridge")
        run(f"ip -n {switch} link set br0 up")
        for i, name in enumerate(names):
            run(f"ip -n {name} link add eth0 type veth peer name p{i} netns {switch}")
            run(f"ip -n {name} addr add 10.77.0.{i + 1}/24 dev eth0")
            run(f"ip -n {name} link set eth0 up")
            run(f"ip -n {switch} link set p{i} master br0")
            run(f"ip -n {switch} link set p{i} up")
            run(f"tc -n {name} qdisc add dev eth0 {shape}")
            run(f"tc -n {switch} qdisc add dev p{i} {shape}")
        yield Cluster(names, folder)
    finally:
        for name in (*names, switch):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=30)
