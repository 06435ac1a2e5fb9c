"""JupyterLab in a headless Chromium, for tests.  Needs `apt-get install chromium` (or CHROME=/path) and `pip install playwright`; without them the tests FAIL.

`desk` gives a page whose notebook has run, and afterwards insists that nobody complained: no error output, no word in the
browser's console from our code, no request to anywhere but this machine.
(PYTEST_DONT_REWRITE: the test files import helpers from here before pytest does.)
"""
import contextlib, io, os, re, shutil, signal, socket, subprocess, sys, time, urllib.request, zlib
from pathlib import Path

import nbformat
import pytest
from PIL import Image
from playwright.sync_api import Error, sync_playwright

ROOT = Path(__file__).parents[1]
CHROME = os.environ.get("CHROME") or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "chromium")
ARGS = ("--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --disable-dev-shm-usage").split() + [
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]          # the browser can reach this machine only
READY = """() => { const c = window.jupyterapp?.shell.currentWidget?.sessionContext;
  return !!c && c.isReady && c.session?.kernel?.connectionStatus === 'connected' && c.session.kernel.status === 'idle' }"""
THEMES = {"light": "JupyterLab Light", "dark": "JupyterLab Dark"}


@contextlib.contextmanager
def serve(tmp, root, *flags, **environment):
    "JupyterLab on `root` with configuration, data and runtime folders of its own; yields its address."
    env = dict(os.environ, JUPYTER_PLATFORM_DIRS="1", JUPYTER_CONFIG_DIR=f"{tmp}/cfg", JUPYTER_DATA_DIR=f"{tmp}/data", JUPYTER_RUNTIME_DIR=f"{tmp}/run",
               JUPYTERLAB_SETTINGS_DIR=f"{tmp}/cfg/lab/user-settings", JUPYTERLAB_WORKSPACES_DIR=f"{tmp}/ws", IPYTHONDIR=f"{tmp}/ipy",
               PYTHONPATH=os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]), OMP_NUM_THREADS="1", MPLBACKEND="") | environment
    env.pop("MPLBACKEND")                                                   # the notebook's own
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    cmd = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser", "--ServerApp.ip=127.0.0.1",
           f"--ServerApp.port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=", "--ServerApp.password=", *flags]
    with open(tmp / "lab.log", "w") as log:
        p = subprocess.Popen(cmd, env=env, cwd=root, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert p.poll() is None, (tmp / "lab.log").read_text()
            try:
                urllib.request.urlopen(url + "/api/status", timeout=2)
                break
            except OSError: time.sleep(.1)
        else: raise AssertionError("JupyterLab did not start in a minute:\n" + (tmp / "lab.log").read_text())
        yield url
    finally:
        p.send_signal(signal.SIGTERM)
        try: p.wait(20)
        except subprocess.TimeoutExpired: p.kill()


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    "A server on a copy of the notebooks (Lab saves what it opens), with the repository's own beit_nb."
    tmp = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "nbs", tmp / "nbs")
    with serve(tmp, tmp / "nbs", f"--ServerApp.root_dir={tmp}/nbs", JUPYTER_CONFIG_PATH=str(ROOT / ".jupyter")) as url:
        yield url, tmp / "nbs"


@pytest.fixture(scope="session")
def chrome():
    assert shutil.which(CHROME), f"there is no browser ({CHROME}); apt-get install chromium, or set CHROME"
    with sync_playwright() as pw:
        browser = pw.chromium.launch(executable_path=shutil.which(CHROME), args=ARGS)
        yield browser
        browser.close()


class Ears:
    "Everything a page complains about, and everybody it calls."
    def __init__(self, page):
        self.words, self.calls = [], []
        page.on("console", lambda m: self.words.append(f"{m.type}: {m.text} ({m.location.get('url', '')})"))
        page.on("pageerror", lambda e: self.words.append(f"error: {e}"))
        page.on("request", lambda r: self.calls.append(r.url))

    def check(self):
        loud = [w for w in self.words if w.startswith(("error", "warning")) and not any(k in w for k in KNOWN)]
        assert loud == [], f"the browser's console complains: {loud}"
        away = [u for u in self.calls if not re.match(r"(https?|wss?)://127\.0\.0\.1[:/]|(data|blob|about):", u)]
        assert away == [], f"the page calls somebody else: {away}"


KNOWN = ()                                                                   # words of JupyterLab itself, said without any notebook of ours
STDERR = '.jp-RenderedText[data-mime-type="application/vnd.jupyter.stderr"]'


@pytest.fixture(scope="module")
def rooms(lab, chrome):
    "The pages of one test file, by notebook: opening one takes seconds, running it again does not."
    opened = {}
    yield opened
    for page, _ in opened.values():
        page.evaluate("() => window.jupyterapp?.serviceManager.sessions.shutdownAll()")
        page.context.close()


@pytest.fixture
def desk(lab, chrome, rooms, request):
    """desk(notebook, theme="light") -> a page on which that notebook has just run from top to bottom.
    A list of cells instead of a name makes a notebook of them. A second call runs the same page anew."""
    (url, folder), used = lab, []

    def sit(notebook, theme="light", size=(1280, 900)):
        key = notebook if isinstance(notebook, str) else f"test-{zlib.crc32(repr(notebook).encode())}.ipynb"
        if key not in rooms:
            if key != notebook:
                nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c, id=f"cell-{i}") for i, c in enumerate(notebook)],
                               metadata=dict(kernelspec=dict(display_name="python3", language="python", name="python3"))), folder / key)
            page = chrome.new_context(viewport=dict(width=size[0], height=size[1])).new_page()
            page.set_default_timeout(60_000)
            rooms[key] = page, Ears(page)
            page.goto(f"{url}/lab/tree/{key}?reset")
            page.wait_for_function(READY)          # not the toolbar's "idle" mark: it says idle before a kernel exists
        page, ears = rooms[key]
        used.append((page, ears))
        page.set_viewport_size(dict(width=size[0], height=size[1]))
        page.evaluate("name => window.jupyterapp.commands.execute('apputils:change-theme', { theme: name })", THEMES[theme])
        page.wait_for_function("name => document.body.dataset.jpThemeName == name", arg=THEMES[theme])
        page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")   # resolves when all cells ran
        assert page.locator(STDERR).all_inner_texts() == []
        return page

    yield sit
    for page, ears in used:
        if os.environ.get("SHOTS"): page.screenshot(path=f"{os.environ['SHOTS']}/{request.node.name}.png")
        assert page.locator(STDERR).all_inner_texts() == []
        ears.check()


def until(look, wanted=True, seconds=20):
    "Look again and again until it is as wanted: the screen follows the kernel, and the kernel takes its time."
    end = time.time() + seconds
    while (seen := look()) != wanted and time.time() < end: time.sleep(.05)
    assert seen == wanted, f"after {seconds} s there is\n{seen}\ninstead of\n{wanted}"
    return seen


def pixels(locator, size):
    "What is on the screen there, as an RGB picture of that size; a picture that is just being replaced is waited for."
    locator.page.mouse.move(5, 5)
    for patience in range(20):
        try: shot = locator.screenshot(animations="disabled")
        except Error as e:
            if "not attached" not in str(e) or patience == 19: raise
        else: return Image.open(io.BytesIO(shot)).convert("RGB").resize(size, Image.Resampling.BOX)


REACTION = """element => { window.reaction = new Promise((done, fail) => {
  let start;
  setTimeout(() => fail(Error("nothing changed in ten seconds")), 10000);
  for (const kind of ["keydown", "pointerdown"]) document.addEventListener(kind, e => { start ??= e.timeStamp; }, { capture: true, once: true });
  const seen = new MutationObserver(() => {
    if (start === undefined) return;
    seen.disconnect();
    requestAnimationFrame(() => done(performance.now() - start));
  });
  seen.observe(element, { subtree: true, attributes: true, childList: true, characterData: true });
}); return true; }"""


def reactions(watched, act, n=20):
    "Milliseconds from a key or a click to the frame in which the watched element has changed, n times."
    out = []
    for i in range(n):
        watched.evaluate(REACTION)
        act(i)
        out.append(watched.page.evaluate("() => window.reaction"))
    return sorted(out)
