"""What JupyterLab saves of a reading: lessons stay what they are, edits stay the reader's."""

import shutil
import subprocess

import nbformat
import pytest
from browser import READY, ROOT, RUN_ALL, SCROLL_TO, SCROLLED, SHUT_DOWN, Ears, serve
from test_browser_map import copy_repository

pytest_plugins = ["browser"]
PAGE = "explorers.ipynb"
SAVE = "() => window.jupyterapp.commands.execute('docmanager:save')"
ADD_CELL = """source => {
  const notebook = window.jupyterapp.shell.currentWidget.content;
  notebook.activeCellIndex = 0;
  notebook.model.sharedModel.insertCell(0, { cell_type: "code", source });
}"""


def git(folder, *words):
    command = ["git", "-c", "user.name=reader", "-c", "user.email=reader@home", *words]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory, chrome):
    "A reader's clone of the repository, and a page that opens its notebooks; nobody complains."
    tmp = tmp_path_factory.mktemp("clone")
    repository = tmp / "repository"
    copy_repository(repository)
    shutil.copy(ROOT / ".gitignore", repository)
    git(repository, "init", "-q")
    git(repository, "add", "-A")
    git(repository, "commit", "-qm", "as cloned")
    with serve(tmp, repository, JUPYTER_CONFIG_PATH=f"{repository}/.jupyter") as url:
        context = chrome.new_context(viewport=dict(width=1280, height=900))
        page = context.new_page()
        page.set_default_timeout(60_000)
        ears = Ears(page)

        def open_lesson(name, kernel=True):
            page.goto(f"{url}/lab/tree/nbs/{name}?reset")
            if kernel:
                page.wait_for_function(READY)
            return page

        yield repository, open_lesson
        ears.check()
        context.close()


def saved_outputs(file):
    "The kinds of every output in a file, and whether any code cell has a count."
    nb = nbformat.read(file, as_version=4)
    code = [cell for cell in nb.cells if cell.cell_type == "code"]
    kinds = [set(o.get("data", {})) for cell in code for o in cell.outputs]
    return kinds, any(cell.execution_count for cell in code)


def test_who_reads_and_plays_changes_nothing(clone):
    repository, open_lesson = clone
    page = open_lesson(PAGE)
    page.evaluate(RUN_ALL)
    page.locator(".beit-pad").first.click()

    page.evaluate(SAVE)

    assert git(repository, "status", "--porcelain") == ""
    page.evaluate(SHUT_DOWN)


FAILED = '[data-mime-type="application/vnd.jupyter.error"]'


def test_the_map_can_be_run(clone):
    "It opens on its table without a line of code in sight; Run All writes nothing; Home goes up."
    repository, open_lesson = clone
    page = open_lesson("index.ipynb")
    page.get_by_role("link", name="The explorers").wait_for()
    page.get_by_role("link", name="What shall we look at all along?").nth(1).wait_for()
    assert page.locator(".jp-CodeCell .cm-content").count() == 0

    page.evaluate(RUN_ALL)
    below = page.evaluate(SCROLLED)
    page.keyboard.press("Home")
    page.wait_for_function(f"() => ({SCROLLED})() == 0")
    page.evaluate(SAVE)

    assert below > 1000 and page.locator(FAILED).count() == 0
    assert git(repository, "status", "--porcelain") == ""
    page.evaluate(SHUT_DOWN)


def test_explorers_work_before_any_demo(clone):
    "With the networks of the package; and no run is made in silence."
    repository, open_lesson = clone
    assert not (repository / "runs").exists()
    page = open_lesson(PAGE)

    page.evaluate(RUN_ALL)
    page.wait_for_function(READY)
    for heading in ("What is a token?", "Who looks at whom?"):
        page.get_by_role("heading", name=heading).scroll_into_view_if_needed()
        page.get_by_text("which came with beit_nb").first.wait_for()

    assert page.locator(FAILED).count() == 0
    assert not (repository / "runs").exists()
    page.evaluate(SHUT_DOWN)


def test_who_edits_keeps_the_edit_and_its_outputs(clone):
    "And the pictures, but no widget whose kernel will be gone."
    repository, open_lesson = clone
    file = repository / "nbs" / PAGE
    page = open_lesson(PAGE)
    page.evaluate(ADD_CELL, "print('mine')")
    page.evaluate(SAVE)  # edited and not yet run: what it prints later is the reader's as well
    page.evaluate(RUN_ALL)
    page.evaluate(SAVE)
    page.evaluate(RUN_ALL)
    page.evaluate(SAVE)  # a second time the file on the disk is the reader's
    page.evaluate(SHUT_DOWN)

    kinds, counted = saved_outputs(file)
    mine = nbformat.read(file, as_version=4)

    assert counted and mine.cells[0].outputs[0].text == "mine\n"
    assert sum("image/png" in kind for kind in kinds) >= 8
    assert not any("application/vnd.jupyter.widget-view+json" in kind for kind in kinds)

    page = open_lesson(PAGE, kernel=False)
    page.locator(".jp-Notebook").wait_for()
    for number, cell in enumerate(mine.cells):
        if any("image/png" in o.get("data", {}) for o in cell.get("outputs", [])):
            page.evaluate(SCROLL_TO, number)
            place = f"[data-windowed-list-index='{number}'] .jp-OutputArea-output"
            page.locator(f"{place} img").first.wait_for()
            assert "model not found" not in page.locator(place).first.inner_text()
    git(repository, "checkout", "-q", ".")
