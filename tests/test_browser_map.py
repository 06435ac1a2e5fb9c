"""JupyterLab with the repository's own configuration opens on the map."""

import shutil
from pathlib import Path

from browser import ROOT, Ears, serve
from playwright.sync_api import expect

pytest_plugins = ["browser"]
NEEDED = ("nbs", "beit_nb", "tests", ".jupyter", "README.md", "settings.ini")
IDLE = """() =>
  window.jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status === 'idle'"""


def copy_repository(target):
    "What a reader needs of it: not the runs, not the environment."

    def others(folder, names):
        return [name for name in names if Path(folder) == ROOT and name not in NEEDED]

    shutil.copytree(ROOT, target, ignore=others)


def test_opens_on_the_map(chrome, tmp_path):
    "The map in front, everything at the left, no question, no call to anybody."
    repository = tmp_path / "repository"
    copy_repository(repository)
    with serve(tmp_path, repository, JUPYTER_CONFIG_PATH=f"{repository}/.jupyter") as url:
        context = chrome.new_context(viewport=dict(width=1280, height=900))
        page = context.new_page()
        ears = Ears(page)

        page.goto(url)

        title = page.locator(".jp-RenderedMarkdown h1").first
        expect(title).to_be_visible(timeout=60_000)
        assert page.url.endswith("/lab/tree/nbs/index.ipynb")
        page.locator(".jp-BreadCrumbs-home").click()
        for name in ("nbs", "beit_nb", "README.md"):
            item = page.locator(".jp-DirListing-itemText", has_text=name).first
            expect(item).to_be_visible()
        page.wait_for_function(IDLE, timeout=60_000)
        assert page.locator(".jp-Dialog").count() == 0
        assert page.locator(".Toastify__toast").count() == 0
        ears.check()
        context.close()
