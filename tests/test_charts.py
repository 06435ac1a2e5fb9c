"One self-contained page: pictures inside the text, tables, cards, curves."

import base64
import io
import os

import matplotlib.pyplot as plt
import numpy as np
import pytest
from helpers import FETCHES
from PIL import Image

from beit_nb import BeitError
from beit_nb.charts import (
    Html,
    as_html,
    cards_html,
    figure_html,
    fill,
    join,
    page,
    plot_log,
    table_html,
    write_page,
)


def a_figure():
    fig, ax = plt.subplots(figsize=(4, 2))
    ax.plot([0, 1], [1, 0])
    return fig


def test_figure_carries_its_picture():
    fig = a_figure()

    html = figure_html(fig, "a < b & c")

    data = base64.b64decode(html.split("base64,")[1].split('"')[0])
    picture = Image.open(io.BytesIO(data))
    assert picture.format == "PNG" and abs(picture.width - 4 * 110) < 40
    assert np.ptp(np.asarray(picture.convert("L"))) > 100
    assert 'alt="a &lt; b &amp; c"' in html
    assert not plt.fignum_exists(fig.number)  # closed: figures do not pile up in memory


def test_table():
    rows = [
        {"arm": "pre-trained", "lr": 0.0015, "accuracy": 0.93512, "steps": 200},
        {"arm": "</table>", "lr": 0.0, "accuracy": 1.0, "steps": 10_000},
    ]

    html = table_html(rows)

    assert "<th>arm</th><th>lr</th><th>accuracy</th><th>steps</th>" in html
    assert "<td>0.0015</td><td>0.935</td><td>200</td>" in html
    assert "<td>0.000</td><td>1.000</td><td>10000</td>" in html
    assert "<td>&lt;/table&gt;</td>" in html and html.count("</table>") == 1


def test_cards_are_escaped():
    html = cards_html([("1 < 2", "<b>")])

    assert "<b>1 &lt; 2</b><span>&lt;b&gt;</span>" in html


def test_page_asks_nobody_for_anything():
    lead = Html("lead <i>here</i>")
    html = page("A & B", lead, [figure_html(a_figure()), Html("<p>x</p>")], "foot")

    assert html.startswith("<!doctype html>") and html.endswith("</html>")
    assert "<title>A &amp; B</title>" in html and '<p class="lead">lead <i>here</i></p>' in html
    assert not [bait for bait in FETCHES if bait in html]


BAD = "\"><script>steal()</script>&'"


@pytest.mark.parametrize(
    "make",
    [
        lambda: page(BAD, BAD, [BAD], BAD),
        lambda: figure_html(a_figure(), BAD),
        lambda: table_html([{BAD: BAD}]),
        lambda: cards_html([(BAD, BAD)]),
        lambda: fill("<p>{x}</p>", x=BAD),
        lambda: join([BAD, Html("<b>"), BAD]),
        lambda: as_html([BAD]),
        lambda: as_html(Html("<b>") + BAD),  # a sum is no Html: its tags are shown
    ],
)
def test_only_html_of_our_own_enters_a_page(make):
    html = make()

    assert isinstance(html, Html)
    assert "<script" not in html and 'alt=""' not in html and "&lt;script&gt;" in html


def test_page_forbids_what_it_does_not_need():
    "Before anything that could be run; a browser obeys the first policy that it meets."
    html = page("A", "lead", [], "")

    policy = html.split('http-equiv="Content-Security-Policy" content="')[1].split('"')[0]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'" and "script-src" not in rules
    assert rules["img-src"] == "data:" and rules["style-src"] == "'unsafe-inline'"
    assert html.index("Content-Security-Policy") < html.index("<title>")


def test_letters_that_utf8_does_not_know(tmp_path):
    "Bytes of a Latin-1 name, as Python hands them on; JSON can write them too."
    file = write_page(tmp_path / "page.html", "caf\udce9", "", ["\ud800"])

    assert "caf\\udce9" in file.read_text("utf-8") and "\\ud800" in file.read_text("utf-8")


def test_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    file = write_page(tmp_path / "page.html", "first", "", [])
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BeitError, match="No space left"):
        write_page(file, "second", "", [])

    assert "first" in file.read_text() and [f.name for f in tmp_path.iterdir()] == ["page.html"]


def test_plot_log_draws_what_is_there():
    rows = [
        {"step": s, "loss": 1 / s} | ({"accuracy": s} if s % 20 == 0 else {}) for s in range(1, 61)
    ]

    fig = plot_log(rows, {"loss": "cross-entropy", "nothing": "n", "accuracy": "hits"})

    titles = [ax.get_title("left") for ax in fig.axes]
    assert titles == ["cross-entropy", "hits"]
    assert list(fig.axes[1].lines[0].get_xdata()) == [20, 40, 60]
    assert list(fig.axes[1].lines[0].get_ydata()) == [20, 40, 60]
    plt.close(fig)


@pytest.mark.parametrize("strange", ["3", [1, 2], None, {"a": 1}, True, 10**400, -1e308])
def test_plot_log_draws_numbers_only(strange):
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": strange}, {"step": 3, "loss": 1.0}]

    fig = plot_log(rows, {"loss": "loss"})

    assert list(fig.axes[0].lines[0].get_xdata()) == [1, 3]
    plt.close(fig)


def test_plot_log_leaves_spare_panels_empty():
    rows = [{"step": 1, **dict.fromkeys("abcd", 1.0)}]

    fig = plot_log(rows, dict(zip("abcd", "ABCD")))

    assert [ax.axison for ax in fig.axes] == [True] * 4 + [False] * 2
    plt.close(fig)
