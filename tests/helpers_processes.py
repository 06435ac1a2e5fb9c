"Other processes: started, looked at and waited for, but never for ever."

import io
import multiprocessing
import resource
import signal
import socket
import subprocess
import sys
import time
from contextlib import redirect_stdout, suppress
from pathlib import Path

PATIENCE = 300  # seconds: what takes longer hangs, on the slowest machine too


def run(*words, ok=0, **options):
    """A command that has ended, with what it said; its exit status must be `ok` (None: any).

    A TimeoutExpired after PATIENCE seconds, or `timeout`.
    """
    options = dict(capture_output=True, text=True, timeout=PATIENCE) | options
    ended = subprocess.run(list(map(str, words)), **options)
    said = f"{ended.stdout}\n{ended.stderr}"
    assert ok in (None, ended.returncode), f"exit status {ended.returncode}\n{said}"
    return ended


def run_python(code, *words, **options):
    "A program in a fresh interpreter that has ended."
    return run(sys.executable, "-c", code, *words, **options)


def said_on_a_full_disk(work):
    """What `work()` prints in a process whose files end after 100 kB.

    A forked one: it has imported already what is imported here.
    """
    context = multiprocessing.get_context("fork")
    listener, speaker = context.Pipe(duplex=False)

    def life():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, -1))
        with redirect_stdout(io.StringIO()) as said:
            work()
        speaker.send(said.getvalue())

    process = context.Process(target=life)
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == 0
    return listener.recv()


def wait_until(holds, what, alive=lambda: True, seconds=PATIENCE, pause=0.01):
    "Look again and again. It fails when the time is over, or when nobody is `alive` to do it."
    deadline = time.monotonic() + seconds
    while not holds():
        assert alive(), f"the process ended, but not yet: {what}"
        assert time.monotonic() < deadline, f"after {seconds} s not yet: {what}"
        time.sleep(pause)


def session_of(pid):
    "The processes of a session that are still there: its leader `pid` and all that it started."
    stats = [p / "stat" for p in Path("/proc").iterdir() if p.name.isdigit()]
    found = []
    for stat in stats:
        with suppress(OSError):
            fields = stat.read_text().rpartition(") ")[2].split()
            if int(fields[3]) == pid and fields[0] != "Z":
                found.append(int(stat.parent.name))
    return found


def children_of(pid):
    "The numbers of the processes that a process started."
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        with suppress(OSError):  # it has ended meanwhile
            if f"\nPPid:\t{pid}\n" in status.read_text():
                found.append(int(status.parent.name))
    return found


def torchrun_environment(n):
    "What torchrun tells its n processes, one dictionary each."
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    shared = dict(
        WORLD_SIZE=str(n),
        LOCAL_WORLD_SIZE=str(n),
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="test",
        TORCHELASTIC_RESTART_COUNT="0",
    )
    return [shared | dict(RANK=str(i), LOCAL_RANK=str(i)) for i in range(n)]
