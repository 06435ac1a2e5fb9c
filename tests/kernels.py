"""Kernels that begin at once: forked from a process that has imported what lessons import.

A fresh kernel reads torch, matplotlib and their like for five seconds, and there are 80 lessons,
and notebooks in a browser.
Of beit_nb nothing is imported early, and each kernel is still a process and a namespace of its own.
What a lesson starts, torchrun and workers, begins in the same way (quick_starts.py).
Started as a program this file is that process: a line of JSON in, the number of a new kernel out.
"""

import base64
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from functools import cache

import quick_starts
from jupyter_client import AsyncKernelManager
from jupyter_client.provisioning import LocalProvisioner
from jupyter_server.services.kernels.kernelmanager import ServerKernelManager

EARLY = [
    "ipykernel.kernelapp",
    "ipywidgets",
    "matplotlib.pyplot",
    "scipy.interpolate",
    "sklearn.cluster",
    "torchvision.transforms.v2",
]


PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)  # a PNG of 1 x 1


class ForkedKernel:
    "A kernel with what a manager asks of a subprocess.Popen."

    stdin = stdout = stderr = None

    def __init__(self, pid: int):
        self.pid = pid

    def poll(self) -> int | None:
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return 0
        return None

    def wait(self) -> int | None:
        return self.poll()

    def send_signal(self, number: int) -> None:
        with suppress(ProcessLookupError):  # it may end at any moment
            os.kill(self.pid, number)


class ForkedProvisioner(LocalProvisioner):
    async def launch_kernel(self, cmd, *, cwd, env, **_):
        job = {"words": cmd[3:], "cwd": cwd, "env": env}  # after python -m ipykernel_launcher
        server = kernel_server()
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        self.process = ForkedKernel(int(server.stdout.readline()))
        self.pid = self.pgid = self.process.pid
        return self.connection_info


class Forked:
    "What makes a manager's kernels forked ones."

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.provisioner = ForkedProvisioner(
            kernel_id="", kernel_spec=self.kernel_spec, parent=self
        )


class ForkedKernelManager(Forked, AsyncKernelManager):
    "For nbclient."


class ForkedServerKernelManager(Forked, ServerKernelManager):
    "For JupyterLab."


@cache
def kernel_server() -> subprocess.Popen:
    "The process that forks; it ends with this one, as its input does."
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    env = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"} | os.environ
    return subprocess.Popen([sys.executable, __file__], env=env, **pipes)


def be_kernel(words, cwd, env) -> int:
    """What the kernel's own `python -m ipykernel_launcher` would do, in a session of its own.

    The exit status. It ends without taking apart all that was imported: that takes longer than the
    2.5 seconds after which a manager begins to kill.
    """
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # its output is no answer
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv[1:] = words
    with quick_starts.forked_starts():
        launch = sys.modules["ipykernel.kernelapp"].launch_new_instance
        return quick_starts.run_to_its_end(launch)


def paint_no_pages():
    """Figures on the pages of runs are one pixel each, for most lessons train and none looks.

    A page takes as long to paint as forty steps of a small training. Lesson 80 defines how it is
    done, and paints. (`tests/lessons.py`, which saves what readers see, paints everything.)
    """
    from matplotlib.figure import Figure

    paint = Figure.savefig

    def savefig(figure, file, **options):
        if sys._getframe(1).f_globals["__name__"] == "beit_nb.charts":
            file.write(PIXEL)
        else:
            paint(figure, file, **options)

    Figure.savefig = savefig


def serve():
    del sys.path[0]  # this folder: no kernel would find our helpers
    for name in (*EARLY, *quick_starts.EARLY):
        importlib.import_module(name)
    paint_no_pages()
    quick_starts.new_interpreter()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a kernel
    gc.freeze()  # what is imported is nobody's to collect, again and again in each kernel
    for line in iter(sys.stdin.readline, ""):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                status = be_kernel(**json.loads(line))
            finally:
                os._exit(status)
        print(pid, flush=True)


if __name__ == "__main__":
    serve()
