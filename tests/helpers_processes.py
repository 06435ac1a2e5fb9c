"Other processes: started, looked at and waited for, but never for ever."

import subprocess
import sys
import time
from contextlib import suppress
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


def wait_until(holds, what, alive=lambda: True, seconds=PATIENCE, pause=0.002):
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
