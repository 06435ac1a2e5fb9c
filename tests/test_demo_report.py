"The page of `beit demo`: its pictures, and every figure where it belongs."

import re

import matplotlib.pyplot as plt
import pytest
from helpers import FETCHES

from beit_nb.demo_report import (
    attention_figure,
    compare_figure,
    demo_report,
    headlines,
    labels_section,
    probe_section,
)
from beit_nb.demo_stages import ARMS
from beit_nb.pretraining import load_mim


def arm(mean, steps=40, runs=2):
    curves = [[(20, mean / 2), (steps, mean)]] * runs
    return dict(mean=mean, std=0.01, runs=[mean] * runs, steps=steps, lr=1.5e-3, curves=curves)


def probed(mean, layers):
    return dict(mean=mean, std=0.02, layer=layers.index(max(layers)) + 1, layers=layers)


FINETUNE = dict(
    labels_per_class=20,
    steps=40,
    pretrained=arm(0.871),
    scratch_equal_steps=arm(0.412),
    scratch_best=arm(0.633, steps=120),
)
METRICS = dict(
    seconds=150.0,
    rehearsal=False,
    dvae=dict(mse=0.02, pixel_variance=0.08, codes_used=321, perplexity=45.67),
    mim=dict(masked_top1=0.456, best_constant_top1=0.123, images=102_400),
    finetune=FINETUNE,
    probe=dict(
        labels=200,
        spread=dict(
            pretrained=probed(0.812, [0.6, 0.8]),
            random=probed(0.534, [0.5, 0.4]),
            pixels=dict(mean=0.715, std=0.0, layer=0),
        ),
    ),
)


@pytest.fixture(autouse=True)
def closed():
    "No figure stays open."
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def out(runs, tmp_path_factory):
    "The folder of a demo, as far as its page looks into it."
    out = tmp_path_factory.mktemp("demo")
    (out / "tokenizer").symlink_to(runs / "tok")
    (out / "pretrain").symlink_to(runs / "pre")
    return out


def test_every_draw_is_a_line_and_every_arm_a_bar():
    fig = compare_figure(FINETUNE)

    left, right = fig.axes
    curves = [curve for name in ARMS for curve in FINETUNE[name]["curves"]]
    assert [list(zip(*line.get_data())) for line in left.lines] == [
        [tuple(point) for point in curve] for curve in curves
    ]
    assert [text.get_text() for text in left.get_legend().texts] == [x for x, _ in ARMS.values()]
    assert [bar.get_height() for bar in right.patches] == [FINETUNE[name]["mean"] for name in ARMS]
    ticks = [tick.get_text() for tick in right.get_xticklabels()]
    assert ticks == ["pre-trained\n40 steps", "from scratch\n40 steps"] + [
        "from scratch\nlonger\n120 steps"
    ]


@pytest.mark.slow
def test_where_the_inkiest_patch_looks(out):
    "The picture, and a map for every head."
    heads = load_mim(out / "pretrain")[1].num_heads

    fig = attention_figure(out / "pretrain")

    drawn = [ax for ax in fig.axes if ax.images]
    assert len(drawn) == 1 + heads


def test_the_four_figures_to_remember():
    html = headlines(METRICS)

    for figure in ("87.1%", "41.2%", "63.3%", "45.6%"):
        assert html.count(figure) == 1
    assert "20 labels a class" in html and "3 times the steps" in html
    assert "best constant guess: 12.3%" in html


def row_of(html, name):
    "The cells of a table's row whose first is this one."
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall("<tr>.*?</tr>", html)]
    [row] = [row for row in rows if row and row[0] == name]
    return row


def test_tables_hold_the_figures_of_each_arm():
    labels = "".join(labels_section(FINETUNE))
    probes = "".join(probe_section(METRICS["probe"]))

    assert row_of(labels, "from scratch, longer")[1:3] == ["120", "0.0015"]
    assert float(row_of(labels, "pre-trained")[3]) == 0.871
    assert "20 labelled digits a class" in labels and "over 2 draws" in labels
    assert float(row_of(probes, "random")[1]) == 0.534 and row_of(probes, "random")[-1] == "1"
    assert "200 labels" in probes


@pytest.mark.slow
@pytest.mark.parametrize("rehearsal", [False, True])
def test_the_whole_page(out, rehearsal):
    page = demo_report(out, METRICS | dict(rehearsal=rehearsal))
    html = page.read_text()

    assert page == out / "report.html"
    assert re.findall(r"<h2>(\d)\.", html) == ["1", "2", "3", "4"]
    assert html.count("<img") == 7
    assert not [bait for bait in FETCHES if bait in html]
    assert "in 2.5 minutes" in html and "102,400 pictures" in html
    assert "is 25.0% of the pixels" in html  # 0.02 of 0.08
    assert ("A rehearsal, too short" in html) == rehearsal
