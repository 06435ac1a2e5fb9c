"""Opens pages of the built site in a browser: `python tests/built_site.py _site`.

Every page must hold its heading, its pictures and its formulas, and ask nobody for anything.
"""

import sys
from pathlib import Path

from browser import find_browser
from playwright.sync_api import Page, sync_playwright

PAGES = {  # page: what has to be on it, and how often at least
    "index": {"nav.bd-links a": 90, "table": 3, "img[src*=idea]": 1},
    "02_elbo": {"math": 50, "img": 4, "div.highlight": 20},
    "explorers": {"img": 8, "em:has-text('It moves in JupyterLab')": 8},
    "api/masking": {"h2": 8, "div.highlight": 8},
}
LOADED = "all => all.every(image => image.complete && image.naturalWidth > 0)"
DRAWN = "all => all.every(formula => formula.getBoundingClientRect().width > 0)"


def faults_of(page: Page, address: str, wanted: dict[str, int]) -> list[str]:
    "What is wrong with a page, in words."
    foreign = []
    page.on("request", lambda r: foreign.append(r.url) if r.url.startswith("http") else None)
    page.goto(address)
    faults = []
    for selector, least in wanted.items():
        found = page.locator(selector).count()
        if found < least:
            faults.append(f"{found} of at least {least} {selector}")
    if not page.locator("img").evaluate_all(LOADED):
        faults.append("a picture is missing")
    if not page.locator("math").evaluate_all(DRAWN):
        faults.append("a formula has no width")
    if page.locator("article h1").count() != 1:
        faults.append("there must be one heading")
    return faults + [f"it asks for {url}" for url in foreign]


def found_by_search(page: Page, site: Path, words: str) -> int:
    page.goto(f"{(site / 'search.html').as_uri()}?q={words}")
    page.locator("ul.search li").first.wait_for(timeout=20_000)
    return page.locator("ul.search li").count()


def main(site: Path) -> int:
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=find_browser())
        page = browser.new_page()
        faults = []
        for name, wanted in PAGES.items():
            address = (site / f"{name}.html").as_uri()
            faults += [f"{name}: {fault}" for fault in faults_of(page, address, wanted)]
        hits = found_by_search(page, site, "blockwise")
        browser.close()
    print("\n".join(faults) or f"{len(PAGES)} pages are whole; the search finds {hits}")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
