"""Python programs that begin at once: forked from the process that starts them.

A new interpreter reads torch for three seconds, one that trains reads its compiler for as long
again, and the tests would start more than a hundred: torchrun and its processes, loader workers,
fork servers. Within `forked_starts()` who starts this interpreter, by subprocess or
multiprocessing, gets a fork of himself: a process of its own, with the folder, the environment, the
streams and the session that were asked for. It has torch and its like but nothing of ours; that it
reads from its files, as a new interpreter does.

A program in words (`python -c ...`) still gets a new interpreter, as such tests look at what it
imports, or at how it ends; but for those of multiprocessing. All do on other systems than Linux,
where torch does not survive a fork.
"""

import _posixsubprocess
import atexit
import builtins
import gc
import importlib
import io
import json
import logging
import multiprocessing
import os
import random
import runpy
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import contextmanager, suppress
from functools import cache
from itertools import dropwhile
from multiprocessing import forkserver, process, resource_tracker, util
from types import ModuleType
from unittest import mock

real_fork_exec = _posixsubprocess.fork_exec
FORKED_WORDS = "from multiprocessing."  # how programs in words begin that are forked
EARLY = [  # what trainings import, and not before they need it: as long again as torch itself
    "matplotlib.pyplot",
    "sklearn.linear_model",
    "timm.data",
    "torch._dynamo",  # the first optimizer imports it
    "torch.distributed.fsdp",
]
MainProcess = type(multiprocessing.current_process())
inherited: list = []  # what a fork must neither use nor lose


@contextmanager
def forked_starts():
    "Within this, programs of this interpreter are forks."
    if sys.platform != "linux":
        yield
        return
    new_interpreter()  # while there are any
    for name in EARLY:
        importlib.import_module(name)
    with (
        mock.patch("_posixsubprocess.fork_exec", fork_exec),  # for multiprocessing
        mock.patch("subprocess._fork_exec", fork_exec),
    ):
        yield


@cache
def new_interpreter() -> dict:
    "Where it looks for modules, but for what the environment adds, and how it takes odd letters."
    code = (
        "import json, sys; print(json.dumps({'path': sys.path[1:], 'errors': sys.stdout.errors}))"
    )
    words = [sys.executable, "-c", code]
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONIOENCODING")}
    return json.loads(subprocess.run(words, env=env, capture_output=True, check=True).stdout)


def program_of(words: list[str]) -> tuple[str, list[str]] | None:
    "How the program is given (-c, -m, file) and its own words; None: it needs a new interpreter."
    if words[0] != sys.executable:
        return None
    rest = list(dropwhile(lambda word: word in ("-u", "-B"), words[1:]))
    if rest[:1] == ["-m"]:
        return "-m", rest[1:]
    if rest[:1] == ["-c"] and rest[1].startswith(FORKED_WORDS):
        return "-c", rest[1:]
    if rest and not rest[0].startswith("-"):
        return "file", rest
    return None


def fork_exec(*request):
    "In the place of `_posixsubprocess.fork_exec`, which starts all programs; its child's number."
    words = [os.fsdecode(word) for word in request[0]]
    program = program_of(words)
    if program is None:
        return real_fork_exec(*request)
    pid = os.fork()
    if pid == 0:
        live(program, "-u" in words[1:3], *request[3:22])
    return pid


def live(program, unbuffered, *request):
    "The whole life of a fork."
    status = 1
    try:
        become_a_process(*request)
        forget_the_parent(unbuffered)
        status = run_to_its_end(lambda: run_program(*program))
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(status)


def become_a_process(
    pass_fds,
    cwd,
    env,
    stdin,
    _in,
    _out,
    stdout,
    _err,
    stderr,
    _started_read,
    started,  # a pipe: the parent waits until it closes
    restore_signals,
    start_new_session,
    process_group,
    gid,
    groups,
    uid,
    umask,
    preexec_fn,
):
    "What the system does between fork and exec, with the words of `fork_exec`."
    for fd, source in enumerate([os.dup(fd) if fd >= 0 else -1 for fd in (stdin, stdout, stderr)]):
        if source >= 0:
            os.dup2(source, fd)
    # Not closed: objects of the parent would later close what has got the same number.
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):  # the one that lists them
            if fd > 2 and fd != nothing and (fd == started or fd not in pass_fds):
                os.fstat(fd)
                os.dup2(nothing, fd, inheritable=False)
    if start_new_session:
        os.setsid()
    if process_group >= 0:
        os.setpgid(0, process_group)
    assert gid is groups is uid is None and umask == -1, "nobody has asked for this yet"
    if cwd is not None:
        os.chdir(cwd)
    if env is not None:
        os.environb.clear()
        os.environb.update(pair.split(b"=", 1) for pair in env)
    reset_signals()
    if preexec_fn is not None:
        preexec_fn()


def reset_signals():
    "As exec and a new interpreter leave them: what was ignored stays so."
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def forget_the_parent(unbuffered: bool):
    "Its exit functions, streams, children, our modules, its state of chance and of torch."
    gc.freeze()  # its objects are not ours to end
    atexit._clear()
    atexit.register(util._exit_function)
    atexit.register(logging.shutdown)
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        inherited.append(getattr(sys, name))
        setattr(sys, name, stream(fd, unbuffered))
        setattr(sys, f"__{name}__", getattr(sys, name))
    sys.excepthook = sys.__excepthook__
    sys.displayhook = sys.__displayhook__
    for name in ("get_ipython", "display"):
        vars(builtins).pop(name, None)
    if "faulthandler" in sys.modules:
        sys.modules["faulthandler"].disable()
    forget_logging()
    forget_processes()
    forget_modules()
    forget_chance()


def stream(fd: int, unbuffered: bool):
    "A standard stream as a new interpreter opens it, None if it is closed."
    try:
        os.fstat(fd)
    except OSError:
        return None
    encoding, _, errors = os.environ.get("PYTHONIOENCODING", "").partition(":")
    errors = "backslashreplace" if fd == 2 else errors or new_interpreter()["errors"]
    if fd == 0:
        return open(0, encoding=encoding or "utf-8", errors=errors, closefd=False)
    unbuffered = unbuffered or bool(os.environ.get("PYTHONUNBUFFERED"))
    binary = open(fd, "wb", buffering=0 if unbuffered else -1, closefd=False)
    options = dict(line_buffering=fd == 2, write_through=unbuffered)
    return io.TextIOWrapper(binary, encoding or "utf-8", errors, **options)


def forget_logging():
    "The root's handlers are pytest's; others write to the stream that was there at their birth."
    inherited.extend(logging.root.handlers)
    logging.root.handlers.clear()
    for reference in logging._handlerList:
        handler = reference()
        if handler and "stream" in vars(handler) and not isinstance(handler, logging.FileHandler):
            handler.stream = sys.stderr


def forget_processes():
    "A fork is nobody's multiprocessing child, and has none."
    inherited.extend([process._children, process._current_process])
    process._children = set()
    process._current_process = MainProcess()
    process._parent_process = None
    util._finalizer_registry.clear()
    forkserver._forkserver.__init__()
    resource_tracker._resource_tracker.__init__()
    multiprocessing.context._default_context._actual_context = None


def forget_modules():
    "All that is not installed: ours and the tests'."
    installed = (sys.prefix, sys.base_prefix)
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and not file.startswith(installed):
            inherited.append(sys.modules.pop(name))
    sys.meta_path[:] = [f for f in sys.meta_path if not type(f).__module__.startswith("_pytest")]


def forget_chance():
    "Seeds, threads, and what a figure looks like."
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    if torch := sys.modules.get("torch"):
        torch.manual_seed(67280421310721)  # that of a new interpreter
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count()))
        torch.set_grad_enabled(True)
    if matplotlib := sys.modules.get("matplotlib"):
        matplotlib.rc_file_defaults()


def run_program(kind: str, words: list[str]):
    "As Python does: `-c` words, `-m` a module, or a file."
    main = sys.modules["__main__"] = ModuleType("__main__")
    inherited.append(main)
    sys.argv = ["-c" if kind == "-c" else words[0], *words[1:]]
    first = {"-c": "", "-m": os.getcwd(), "file": os.path.dirname(os.path.abspath(words[0]))}[kind]
    added = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:] = [first, *added, *new_interpreter()["path"]]
    if kind == "-m":
        sys.modules.pop(words[0], None)
        runpy._run_module_as_main(words[0])
        return
    if kind == "file":
        main.__file__ = words[0]
        with io.open_code(words[0]) as file:
            code = compile(file.read(), words[0], "exec")
    else:
        code = compile(words[0], "<string>", "exec")
    exec(code, vars(main))


def own_frames(place):
    "A traceback from where the program itself begins."
    while place and place.tb_frame.f_code.co_filename == __file__:
        place = place.tb_next
    return place


def run_to_its_end(program: Callable) -> int:
    "What Python does with what a program raises, and before it ends; the exit status."
    status = 0
    try:
        program()
    except SystemExit as e:
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
        status = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException as e:
        sys.last_value = e
        e.__traceback__ = own_frames(e.__traceback__)
        sys.excepthook(type(e), e, e.__traceback__)
        status = 1
        if isinstance(e, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            status = -signal.SIGINT
    threading._shutdown()
    atexit._run_exitfuncs()
    for out in filter(None, (sys.stdout, sys.stderr)):
        with suppress(OSError, ValueError):
            out.flush()
    if status == -signal.SIGINT:
        os.kill(os.getpid(), signal.SIGINT)
    return status & 0xFF
