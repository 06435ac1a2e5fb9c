"""JupyterLab in a headless browser, for tests.

Any Chromium, Chrome or Edge will do: `find_browser` says which one is taken. Where there is none,
conftest.py skips the tests that need one (`BEIT_BROWSER=required` makes that a failure).

`desk` gives a page whose notebook has run, and afterwards insists that nobody complained: no error
output, no word in the browser's console from our code, no request to anywhere but this machine.
`lab` is the server behind it and `chrome` the browser; a test that asks for one of the three is a
browser test. A script (latency.py) opens the same page with the functions behind these fixtures:
`serve_notebooks`, `start_browser`, `open_notebook` and `run_all`.
(PYTEST_DONT_REWRITE: the test files import helpers from here before pytest does.)
"""

import contextlib
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import zlib
from functools import cache
from itertools import chain
from pathlib import Path

import nbformat
import playwright
import pytest
from PIL import Image
from playwright.sync_api import Error, sync_playwright

ROOT = Path(__file__).parents[1]
THEMES = {"light": "JupyterLab Light", "dark": "JupyterLab Dark"}
STDERR = '.jp-RenderedText[data-mime-type="application/vnd.jupyter.stderr"]'
KNOWN = (  # words of JupyterLab itself, on a busy machine
    "too long to activate",
    "ms to activate",
    "did not appear within 10000 ms",  # a cell to which it scrolls
    "Failed to execute 'removeChild'",  # its React; no line of ours removes a child
)

# --------------------------------------------------------------------------------------
# Which browser

COMMANDS = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
    "microsoft-edge",
    "microsoft-edge-stable",
    "msedge",
)
USUAL_PLACES = (  # for those who are not on PATH
    "/usr/bin/chromium",
    "/usr/lib/chromium/chromium",
    "/snap/bin/chromium",
    "/opt/google/chrome/chrome",
    "/opt/microsoft/msedge/msedge",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Microsoft Edge.app/Contents/MacOS/Microsoft Edge",
)
PLAYWRIGHT_BUILDS = (  # below `chromium-<revision>`, on Linux and macOS
    "chrome-linux*/chrome",
    "chrome-mac*/*.app/Contents/MacOS/*",
)
NO_BROWSER = (
    "no Chromium, Chrome or Edge was found; get one with `apt-get install chromium` or "
    "`playwright install chromium`, or set CHROME=/path/to/browser"
)


def playwright_folder() -> Path:
    "Where `playwright install` puts its browsers."
    chosen = os.environ.get("PLAYWRIGHT_BROWSERS_PATH")
    if chosen == "0":  # Playwright's own word for "inside the package"
        return Path(playwright.__file__).parent / "driver" / "package" / ".local-browsers"
    if chosen:
        return Path(chosen)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "ms-playwright"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ms-playwright"


def playwright_browsers() -> list[str]:
    "The Chromiums that Playwright has downloaded, the newest first."
    builds = [b for b in playwright_folder().glob("chromium-*") if b.name[9:].isdigit()]
    builds.sort(key=lambda build: int(build.name[9:]), reverse=True)
    files = [build.glob(place) for build in builds for place in PLAYWRIGHT_BUILDS]
    return [str(file) for file in chain.from_iterable(files)]


@cache
def find_browser() -> str | None:
    """The browser for the tests: $CHROME (a path or a command), else one of Playwright's own, which
    fit it best, else one on PATH, else one in the usual places; None where there is none."""
    asked = os.environ.get("CHROME")
    if asked:
        found = shutil.which(asked)
        if not found:
            pytest.fail(f"CHROME={asked} is no program that can be started", pytrace=False)
        return found
    candidates = (*playwright_browsers(), *COMMANDS, *USUAL_PLACES)
    return next(filter(None, map(shutil.which, candidates)), None)


# --------------------------------------------------------------------------------------
# The server and the browser

ARGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # it can reach this machine only
)


def lab_environment(tmp, **changes):
    "The environment of a JupyterLab whose configuration, data and runtime folders lie below `tmp`."
    python_path = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    own = dict(
        JUPYTER_PLATFORM_DIRS="1",
        JUPYTER_CONFIG_DIR=f"{tmp}/cfg",
        JUPYTER_DATA_DIR=f"{tmp}/data",
        JUPYTER_RUNTIME_DIR=f"{tmp}/run",
        JUPYTERLAB_SETTINGS_DIR=f"{tmp}/cfg/lab/user-settings",
        JUPYTERLAB_WORKSPACES_DIR=f"{tmp}/ws",
        IPYTHONDIR=f"{tmp}/ipy",
        PYTHONPATH=os.pathsep.join(python_path),
        OMP_NUM_THREADS="1",
    )
    environment = dict(os.environ) | own | changes
    environment.pop("MPLBACKEND", None)  # the notebook's own
    return environment


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_until_up(process, url, log, seconds=60):
    "Returns when JupyterLab answers; its log is shown if it does not."
    end = time.time() + seconds
    while time.time() < end:
        assert process.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(url + "/api/status", timeout=2)
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError("JupyterLab did not start in a minute:\n" + log.read_text())


WITH_FORKED_KERNELS = f"""
import sys
sys.path.append({str(ROOT / "tests")!r})
from jupyterlab.labapp import LabApp
forked = "kernels.ForkedServerKernelManager"
LabApp.launch_instance([*sys.argv[1:], f"--MultiKernelManager.kernel_manager_class={{forked}}"])
"""


@contextlib.contextmanager
def serve(tmp, root, *flags, program=("-m", "jupyterlab"), **environment):
    "JupyterLab on `root`, with configuration, data and runtime folders below `tmp`: its address."
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [
        *(sys.executable, *program),
        "--no-browser",
        "--allow-root",
        "--expose-app-in-browser",
        "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.port={port}",
        "--ServerApp.port_retries=0",
        "--IdentityProvider.token=",
        "--ServerApp.password=",
        *flags,
    ]
    log = tmp / "lab.log"
    with open(log, "w") as file:
        process = subprocess.Popen(
            command,
            env=lab_environment(tmp, **environment),
            cwd=root,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
    try:
        wait_until_up(process, url, log)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


@contextlib.contextmanager
def serve_notebooks(tmp, **how):
    """JupyterLab on a copy of the notebooks (Lab saves what it opens) below `tmp`, with the
    repository's beit_nb: its address, and the folder of the notebooks."""
    shutil.copytree(ROOT / "nbs", tmp / "nbs")
    how |= dict(JUPYTER_CONFIG_PATH=str(ROOT / ".jupyter"))
    with serve(tmp, tmp / "nbs", f"--ServerApp.root_dir={tmp}/nbs", **how) as url:
        yield url, tmp / "nbs"


@contextlib.contextmanager
def start_browser():
    with sync_playwright() as pw:
        browser = pw.chromium.launch(executable_path=find_browser(), args=ARGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("lab")
    with serve_notebooks(tmp, program=("-c", WITH_FORKED_KERNELS)) as lab:
        yield lab


@pytest.fixture(scope="session")
def chrome():
    with start_browser() as browser:
        yield browser


# --------------------------------------------------------------------------------------
# A page at which a reader sits

READY = """() => {
  const c = window.jupyterapp?.shell.currentWidget?.sessionContext;
  return !!c && c.isReady && c.session?.kernel?.connectionStatus === 'connected'
      && c.session.kernel.status === 'idle';
}"""
SHUT_DOWN = "() => window.jupyterapp?.serviceManager.sessions.shutdownAll()"
RUN_ALL = "() => window.jupyterapp.commands.execute('notebook:run-all-cells')"
SCROLLED = """() => window.jupyterapp.shell.currentWidget.content.node
  .querySelector(".jp-WindowedPanel-outer").scrollTop"""
SCROLL_TO = "number => window.jupyterapp.shell.currentWidget.content.scrollToItem(number)"
CHANGE_THEME = """name =>
  window.jupyterapp.commands.execute('apputils:change-theme', { theme: name })"""
THEME_IS = "name => document.body.dataset.jpThemeName == name"
HERE = re.compile(r"(https?|wss?)://127\.0\.0\.1[:/]|(data|blob|about):")


class Ears:
    "Everything a page complains about, and everybody it calls."

    def __init__(self, page):
        self.words = []
        self.calls = []
        page.on("console", self.hear)
        page.on("pageerror", lambda error: self.words.append(f"error: {error}"))
        page.on("request", lambda request: self.calls.append(request.url))

    def hear(self, message):
        self.words.append(f"{message.type}: {message.text} ({message.location.get('url', '')})")

    def complaints(self):
        loud = [w for w in self.words if w.startswith(("error", "warning"))]
        return [w for w in loud if not any(known in w for known in KNOWN)]

    def calls_away(self):
        return [url for url in self.calls if not HERE.match(url)]

    def check(self):
        loud, away = self.complaints(), self.calls_away()
        assert loud == [], f"the browser's console complains: {loud}"
        assert away == [], f"the page calls somebody else: {away}"


@pytest.fixture(scope="module")
def pages(lab, chrome):
    "The pages of a test file, by notebook: opening one takes seconds, running it again does not."
    opened = {}
    yield opened
    for page, _ in opened.values():
        page.evaluate(SHUT_DOWN)
        page.context.close()


def write_notebook(cells, path):
    "A notebook of these code cells."
    cells = [nbformat.v4.new_code_cell(c, id=f"cell-{i}") for i, c in enumerate(cells)]
    kernel = dict(display_name="python3", language="python", name="python3")
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=kernel))
    nbformat.write(notebook, path)


SIZE = (1280, 900)  # of a window, wide and high


def open_notebook(chrome, url, size=SIZE):
    "A new page with that notebook and its kernel ready, and ears that listen from the start."
    page = chrome.new_context(viewport=dict(width=size[0], height=size[1])).new_page()
    page.set_default_timeout(60_000)
    ears = Ears(page)
    page.goto(url)
    # Not the toolbar's "idle" mark: it says idle before a kernel exists.
    page.wait_for_function(READY)
    return page, ears


def run_all(page, theme="light", size=SIZE):
    "Run the notebook of a page, top to bottom, in a window of that size."
    page.set_viewport_size(dict(width=size[0], height=size[1]))
    page.evaluate(CHANGE_THEME, THEMES[theme])
    page.wait_for_function(THEME_IS, arg=THEMES[theme])
    page.evaluate(RUN_ALL)  # resolves when all cells ran
    assert page.locator(STDERR).all_inner_texts() == []


@pytest.fixture
def desk(lab, chrome, pages, request):
    """desk(notebook, theme="light") -> a page on which that notebook has just run, top to bottom.
    A list of cells instead of a name makes a notebook of them. A second call runs the same page
    anew."""
    url, folder = lab
    used = []

    def sit(notebook, theme="light", size=SIZE):
        name = notebook
        if not isinstance(notebook, str):
            name = f"test-{zlib.crc32(repr(notebook).encode())}.ipynb"
        if name not in pages:
            if name != notebook:
                write_notebook(notebook, folder / name)
            pages[name] = open_notebook(chrome, f"{url}/lab/tree/{name}?reset", size)
        page, ears = pages[name]
        used.append((page, ears))
        run_all(page, theme, size)
        return page

    yield sit
    for page, ears in used:
        if os.environ.get("SHOTS"):
            page.screenshot(path=f"{os.environ['SHOTS']}/{request.node.name}.png")
        assert page.locator(STDERR).all_inner_texts() == []
        ears.check()


# --------------------------------------------------------------------------------------
# Looking, and measuring


def until(look, wanted=True, seconds=20):
    "Look again and again until it is as wanted: the screen follows the kernel in its own time."
    end = time.time() + seconds
    seen = look()
    while seen != wanted and time.time() < end:
        time.sleep(0.05)
        seen = look()
    assert seen == wanted, f"after {seconds} s there is\n{seen}\ninstead of\n{wanted}"
    return seen


def pixels(locator, size):
    "What is on the screen there, as an RGB picture of that size; one just replaced is waited for."
    locator.page.mouse.move(5, 5)
    for patience in reversed(range(20)):
        try:
            shot = locator.screenshot(animations="disabled")
            break
        except Error as error:
            if "not attached" not in str(error) or not patience:
                raise
    return Image.open(io.BytesIO(shot)).convert("RGB").resize(size, Image.Resampling.BOX)


CHANGES = "{ subtree: true, attributes: true, childList: true, characterData: true }"
REACTION = """(elements, begins) => { window.reaction = new Promise((done, fail) => {
  let start;
  setTimeout(() => fail(Error("nothing changed in ten seconds")), 10000);
  for (const kind of begins)
    document.addEventListener(
      kind, e => { start ??= e.timeStamp; }, { capture: true, once: true });
  const awaited = new Set(elements);
  const seen = new MutationObserver((changes) => {
    if (start === undefined) return;
    for (const element of elements)
      if (changes.some((change) => element.contains(change.target))) awaited.delete(element);
    if (awaited.size) return;
    seen.disconnect();
    const pictures = elements.flatMap(
      (element) => element.matches("img") ? [element] : [...element.querySelectorAll("img")]);
    Promise.all(pictures.map((picture) => picture.decode().catch(() => {}))).then(
      () => requestAnimationFrame(() => setTimeout(() => done(performance.now() - start))));
  });
  for (const element of elements) seen.observe(element, CHANGES);
}); return true; }""".replace("CHANGES", CHANGES)


def reactions(watched, act, n=20, begins=("keydown", "pointerdown")):
    """Milliseconds from an event to the moment after the frame in which all that `watched` finds
    has changed, n times; its pictures are decoded by then."""
    out = []
    for i in range(n):
        watched.evaluate_all(REACTION, begins)
        act(i)
        out.append(watched.page.evaluate("() => window.reaction"))
    return sorted(out)
