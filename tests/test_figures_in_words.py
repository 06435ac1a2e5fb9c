"Figures that a lesson's words repeat are those that its cells printed."

import re
from pathlib import Path

import nbformat
import pytest

from beit_nb.demo import pretrain_recipe
from beit_nb.demo_stages import DemoPlan

NBS = Path(__file__).parents[1] / "nbs"

# lesson, cell of words, figures that it repeats, cells that printed them
REPEATED = [
    ("02_elbo", "elbo-words", "-0.83", "log-inside"),
    ("03_gumbel", "solution-predict", "0.529 0.110", "table-print"),
    ("04_dvae", "normal-words", "0.04 0.5", "check-normal"),
    ("04_dvae", "ablation-meaning", "0.0613", "check-collapse"),
    ("04_dvae", "ablation-meaning", "0.03", "ablation"),
    ("05_dalle", "words-decoder", "194 99", "measure-field"),
    ("09_scale_products", "quantizers-meaning", "4.3 5.0 35 39", "check-quantizers"),
    ("09_scale_products", "dalle-against-ours", "52.1", "check-dalle"),
    ("10_masking", "words-clumps", "0.38 0.86", "check-clumps"),
    ("15_attention", "sharp-meaning", "0.94 0.95", "check-sharp"),
    ("44_pretraining", "words-long-shown", "38.5 28.4", "long-run"),
    ("72_scale_hours", "words-mfu", "24 19 25", "check-five-days"),
    ("79_scale_bench", "results-roof-words", "84", "results-step"),
    ("79_scale_bench", "claims-words", "1.4 2.2", "results-step"),
]


def cell(lesson: str, name: str):
    cells = nbformat.read(NBS / f"{lesson}.ipynb", as_version=4).cells
    [found] = [c for c in cells if c.id == name]
    return found


def printed(output: str) -> list[float]:
    "The numbers in what a cell printed."
    return [float(n.replace(",", "")) for n in re.findall(r"-?\d[\d,]*(?:\.\d+)?", output)]


def not_printed(figures: str, output: str) -> list[str]:
    "Those of `figures` that are no printed number, rounded as the words round it."
    numbers = printed(output)

    def stands(figure: str) -> bool:
        digits = len(figure.partition(".")[2])
        return any(f"{n:.{digits}f}" == figure for n in numbers)

    return [figure for figure in figures.split() if not stands(figure)]


@pytest.mark.parametrize(("lesson", "words", "figures", "source"), REPEATED)
def test_words_repeat_what_was_printed(lesson, words, figures, source):
    said = cell(lesson, words).source
    output = "".join(o.get("text", "") for o in cell(lesson, source).outputs)

    assert all(re.search(rf"(?<![\d.]){re.escape(f)}(?![\d])", said) for f in figures.split())
    assert not_printed(figures, output) == []


def test_words_that_compare_still_hold():
    "Worse in both respects; worse than a flat colour; by about as much as another seed."
    lines = "".join(o.text for o in cell("04_dvae", "rate").outputs if "text" in o).splitlines()
    [(_, bits, error)] = [printed(line) for line in lines if line.startswith("V = 64:")]
    [(_, our_bits, our_error)] = [printed(line) for line in lines if "dVAE" in line]
    assert our_bits > bits and our_error > error
    assert "worse in both respects" in cell("04_dvae", "rate-meaning").source

    flat = 0.0613  # test_words_repeat_what_was_printed holds it against its cell
    overshoot = "".join(o.text for o in cell("04_dvae", "overshoot").outputs)
    for _, argmax, drawn in (printed(line) for line in overshoot.splitlines() if line):
        assert argmax > flat > drawn

    table = "".join(o.text for o in cell("06_tokens", "usage-table").outputs)
    rows = [printed(line) for line in table.splitlines() if line]
    errors = {(weight, seed): error for weight, seed, error, *_ in rows}
    fall = errors[0.0, 0] - errors[0.1, 0]
    seeds = [error for (weight, _), error in errors.items() if weight == 0.05]
    assert 0.7 < fall / (max(seeds) - min(seeds)) < 1.4
    assert "by about as much as another seed" in cell("06_tokens", "usage-table-meaning").source


# where else the demo's figures are told: lesson, cell of words, figures
OF_THE_DEMO = [
    ("52_probing", "real-words", "0.707"),
    ("58_own_pictures", "caption-pretrain", ".372 .270"),
]


def test_the_demo_is_quoted_as_it_ended():
    "In other lessons, and in the README, by the figures of lesson 96."
    ended = "".join(o.get("text", "") for o in cell("96_demo", "real-figures").outputs)
    readme = (NBS.parent / "README.md").read_text()
    rows = [line for line in readme.splitlines() if line.endswith("| `beit demo` |")]
    told = re.findall(r"(?<!± )(?<![\d.])\.\d{3}", " ".join(row.split("|")[2] for row in rows))
    assert len(told) == 8 and not_printed(with_zeros(told), ended) == []

    for lesson, words, figures in OF_THE_DEMO:
        said = cell(lesson, words).source
        assert all(figure in said for figure in figures.split()), lesson
        assert not_printed(with_zeros(figures.split()), ended) == [], lesson


def with_zeros(figures: list[str]) -> str:
    "Figures with the zero before the point that lessons print."
    return " ".join(f"0{figure}".replace("00.", "0.") for figure in figures)


def test_a_figure_out_of_step_is_found():
    assert not_printed("38.6 25.9 1600", "1,600 steps: right 38.6%, constant 25.94%") == []
    assert not_printed("38.6 25.9", "right 38.7%, constant 25.85%") == ["38.6"]


def test_the_front_page_tells_the_steps_of_the_demo():
    "And the last look of its film, which comes at every so many steps."
    recipe = pretrain_recipe(DemoPlan())
    last = recipe.steps - recipe.steps % recipe.watch_every
    words = cell("index", "story").source

    assert f"takes {recipe.steps:,} steps" in words and f"at step {last:,}" in words
