"""What all tests share: one thread a process, a seed for each test, the markers of pyproject.toml,
and who runs what where all tests run two at a time.

Nobody marks a lesson or a browser test by hand. `test_lesson_runs` is `lessons`; a test that uses
the browser (one of the fixtures of browser.py, itself or through another fixture) is `browser`.
`slow` and `gpu` are written over the test: `@pytest.mark.slow` where it takes more than 2.5 seconds
on a slow machine, or six with all its cases, `@pytest.mark.gpu` where it needs CUDA.
"""

import gc
import os
import random
import signal
import sys
from contextlib import nullcontext
from zlib import crc32

import pytest
from xdist.scheduler import LoadScopeScheduling

# Before torch is imported: the tests start several processes, and threads that wait for each other
# on a busy machine are 30 times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "agg")

# The files that take longest in the quick selection, or hold most of the slow tests.
LONG_FILES = (
    "test_faults",
    "test_engine_processes",
    "test_strangers",
    "test_whose_figures",
    "test_engine_training",
    "test_report",
    "test_demo",
    "test_lessons",
)
BROWSER_FIXTURES = {"lab", "chrome", "desk"}


def browser_is_required() -> bool:
    "BEIT_BROWSER=required: a missing browser is a failure and not a skip."
    wish = os.environ.get("BEIT_BROWSER", "")
    if wish not in ("", "required"):
        raise pytest.UsageError(f"BEIT_BROWSER={wish}: the only value is `required`")
    return wish == "required"


def pytest_configure(config):
    browser_is_required()  # a mistyped value is refused before anything runs
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # in the background of a script
        signal.signal(signal.SIGINT, signal.default_int_handler)


def kind(nodeid: str) -> str:
    "Which tests belong together, by the name: `browser`, `lessons`, or `other`."
    if "/test_browser_" in nodeid:
        return "browser"
    return "lessons" if "::test_lesson_runs[" in nodeid else "other"


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by `-m`
def pytest_collection_modifyitems(items):
    for item in items:
        if kind(item.nodeid) != "other":
            item.add_marker(kind(item.nodeid))
        elif BROWSER_FIXTURES.intersection(item.fixturenames):
            raise pytest.UsageError(f"{item.nodeid} belongs in a file test_browser_*.py")
    # Playwright leaves an event loop running in its thread, and an explorer behaves otherwise
    # within one. A lesson does not mind: its kernel is a process of its own.
    # The first lessons are short, and come last: both processes end at nearly one time. Where
    # lessons are not chosen, the files that take longest come first.
    kinds = {"other": [], "browser": [], "lessons": []}
    for item in items:
        kinds[kind(item.nodeid)].append(item)
    kinds["other"].sort(key=lambda item: not item.path.stem.startswith(LONG_FILES))
    items[:] = [*kinds["other"], *kinds["browser"], *reversed(kinds["lessons"])]


def pytest_collection_finish():
    "What is imported by now stays: it need not be looked through again and again for garbage."
    gc.collect()
    gc.freeze()


def pytest_xdist_auto_num_workers(config):
    "Two processes share all tests; what somebody picks by hand runs in this one (`-n 2`: in two)."
    picked = config.args_source.name != "TESTPATHS" or config.option.keyword
    return 0 if picked or os.cpu_count() == 1 else 2


class ByFile(LoadScopeScheduling):
    "One process runs all tests of a file, one all those of the browser; lessons come one by one."

    def _split_scope(self, nodeid):
        by_kind = {"browser": "browser", "lessons": nodeid, "other": nodeid.split("::")[0]}
        return by_kind[kind(nodeid)]


def pytest_xdist_make_scheduler(config, log):
    config.option.loadscopereorder = False  # in the order above
    return ByFile(config, log)


@pytest.hookimpl(tryfirst=True)  # before a fixture starts JupyterLab for nothing
def pytest_runtest_setup(item):
    if item.get_closest_marker("browser"):
        require_browser()
    if item.get_closest_marker("gpu"):
        require_cuda()


def require_browser():
    from browser import NO_BROWSER, find_browser

    if find_browser():
        return
    if browser_is_required():
        pytest.fail(NO_BROWSER, pytrace=False)
    pytest.skip(NO_BROWSER)


def require_cuda():
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")


@pytest.hookimpl(wrapper=True, tryfirst=True)  # the last word: after pytest's own summary
def pytest_terminal_summary(terminalreporter):
    yield
    skipped = terminalreporter.stats.get("skipped", [])
    skipped = [report for report in skipped if "browser" in report.keywords]
    if not skipped:
        return
    from browser import NO_BROWSER

    without = sum(NO_BROWSER in str(report.longrepr) for report in skipped)
    if without:
        line = f"{without} BROWSER TESTS WERE SKIPPED: {NO_BROWSER}"
        terminalreporter.write_line(line, yellow=True, bold=True)


@pytest.fixture(autouse=True)
def seeded(request):
    """Every test starts from a seed of its own, made from its name: neither the order nor the
    choice of tests decides what it draws. A failure shows the seed; BEIT_SEED=number sets it for
    all tests. Fixtures that live longer than one test seed themselves."""
    name = request.node.nodeid
    seed = int(os.environ.get("BEIT_SEED") or crc32(name.encode()))
    random.seed(seed)
    if "numpy" in sys.modules:  # what the test file has not imported needs no seed
        sys.modules["numpy"].random.seed(seed)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)
    request.node.add_report_section("setup", "seed", f"BEIT_SEED={seed} pytest '{name}'")


@pytest.fixture
def deadline():
    "Whoever waits for a pipe is woken after some seconds."

    def late(*_):
        raise TimeoutError("it waits")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


# Made once for all test files of a process, and not to be changed. A file may have its own.


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    from helpers import few_steps_of_each

    return few_steps_of_each(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    from helpers import mixed_photos

    return mixed_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture
def pages_unpainted(request):
    "For tests that look at all of a page but the pixels of its figures; `slow` ones paint them."
    from helpers import unpainted

    with nullcontext() if request.node.get_closest_marker("slow") else unpainted():
        yield


@pytest.fixture
def quick_starts():
    "New processes begin at once. For tests of what they do, and not of how Python begins and ends."
    from quick_starts import forked_starts

    with forked_starts():
        yield


@pytest.fixture
def precision_restored():
    import torch

    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def tree(tmp_path):
    "A labelled folder of small pictures, train/ and val/."
    from helpers_shards import lay_out_tree

    return lay_out_tree(tmp_path / "in")


@pytest.fixture
def packed(tree, tmp_path):
    "The training pictures of the tree in five tars."
    from beit_nb.engine.packing import shard_folder

    shard_folder(tree / "train", tmp_path / "out", per_shard=2)
    return tmp_path / "out"
