"A fork that stands in for a new interpreter behaves as one."

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from contextlib import nullcontext

import pytest
from helpers_processes import PATIENCE, wait_until
from quick_starts import forked_starts

import beit_nb

WHO = """
import atexit, json, os, random, signal, sys
import beit_nb

atexit.register(print, "an exit function")
print(json.dumps(dict(
    name=__name__,
    argv=sys.argv[1:],
    path=sys.path,
    cwd=os.getcwd(),
    environment={k: v for k, v in os.environ.items() if k not in ("LINES", "COLUMNS")},
    heard=sys.stdin.read(),
    session=os.getsid(0) == os.getpid(),
    handlers=[str(signal.getsignal(n)) for n in sorted(signal.valid_signals())],
    encoding=[sys.stdout.encoding, sys.stdout.errors, sys.stderr.errors],
    helpers=[m for m in sys.modules if m.startswith(("helpers", "test_", "conftest"))],
    marked=hasattr(beit_nb, "a_mark"),
)))
sys.stderr.write("a word")
"""
ENDS = {
    "well": "",
    "status": "sys.exit(7)",
    "words": "sys.exit('no more')",
    "error": "1 / 0",
    "interrupt": "raise KeyboardInterrupt",
    "at once": "os._exit(5)",
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
}


@pytest.fixture
def program(tmp_path):
    def write(source):
        (tmp_path / "program.py").write_text(source)
        return [sys.executable, str(tmp_path / "program.py")]

    return write


def said_by_both(words, **options):
    "What a new interpreter and a fork make of a program: status, stdout and stderr."
    with forked_starts():  # what it imports early changes the environment, once
        said = []
    for begin in (nullcontext, forked_starts):
        with begin():
            options = dict(capture_output=True, text=True, timeout=PATIENCE) | options
            ended = subprocess.run(words, **options)
        said.append((ended.returncode, ended.stdout, ended.stderr))
    return said


@pytest.mark.parametrize("end", ENDS)
def test_a_fork_ends_as_an_interpreter_does(program, end):
    new, fork = said_by_both(program(f"{WHO}\n{ENDS[end]}"), input="hello")

    assert fork == new and "a word" in new[2]


@pytest.mark.parametrize("place", ["environment", "folder", "session", "signals"])
def test_a_fork_gets_what_was_asked_for(program, tmp_path, monkeypatch, place):
    "And nothing of this process: no module of ours, no handler, no variable that is gone."
    monkeypatch.setattr(beit_nb, "a_mark", True, raising=False)
    monkeypatch.setenv("GONE", "not in the child")
    path = os.environ.get("PYTHONPATH", "")
    env = dict(os.environ, PYTHONPATH=path, PYTHONIOENCODING="ascii:replace", MINE="a=b")
    del env["GONE"]
    options = {
        "environment": dict(env=env),
        "folder": dict(cwd=tmp_path),
        "session": dict(start_new_session=True),
        "signals": {},
    }
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    ignored = signal.signal(signal.SIGUSR2, signal.SIG_IGN)

    new, fork = said_by_both([*program(WHO), "two words", "3"], input="", **options[place])

    signal.signal(signal.SIGUSR1, before)
    signal.signal(signal.SIGUSR2, ignored)
    first, second = (json.loads(said[1].splitlines()[0]) for said in (new, fork))
    assert second == first
    assert first["name"] == "__main__" and not first["helpers"] and not first["marked"]
    assert fork == new


def test_modules_and_words(tmp_path):
    "`-m` forks; words stay with new interpreters, which know nothing that we have imported."
    (tmp_path / "a_module.py").write_text("import sys; print(__name__, sys.argv[1:], dir()[-1])")

    new, fork = said_by_both([sys.executable, "-u", "-m", "a_module", "x"], cwd=tmp_path)
    _, words = said_by_both([sys.executable, "-c", "import sys; print('torch' in sys.modules)"])

    assert new == fork == (0, "__main__ ['x'] sys\n", "")
    assert words[1] == "False\n"


def test_a_fork_is_a_process_of_its_own(program):
    "It can be killed, and whoever reads from it notices."
    with forked_starts():
        child = subprocess.Popen(
            program("import time; print('here', flush=True); time.sleep(300)"),
            stdout=subprocess.PIPE,
        )
    assert child.stdout.readline() == b"here\n" and child.pid != os.getpid()
    child.kill()
    assert child.stdout.read() == b"" and child.wait(PATIENCE) == -signal.SIGKILL


def doubled(x):
    return 2 * x, os.getppid()


@pytest.mark.parametrize("start", ["spawn", "forkserver"])
def test_multiprocessing_too(start):
    context = multiprocessing.get_context(start)
    with forked_starts(), context.Pool(1) as pool:
        result, parent = pool.apply(doubled, (21,))
        child = multiprocessing.active_children()[0].pid
    multiprocessing.forkserver._forkserver._stop()

    assert result == 42 and (parent == os.getpid()) == (start == "spawn")
    wait_until(lambda: not os.path.exists(f"/proc/{child}"), "it ends")
