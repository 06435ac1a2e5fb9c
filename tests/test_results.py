"The reproduction report: every row of the paper, sound commands, numbers that were measured."

import re
import shlex
from pathlib import Path

import pytest
from helpers import beit, refused
from helpers_processes import run_python

from beit_nb.ablating import summary_cells
from beit_nb.arms import StudyRun, study_graph
from beit_nb.cli import read_recipe
from beit_nb.engine.files import read_json
from beit_nb.options import check_options, read_options
from beit_nb.recipes import COMMANDS
from beit_nb.results import (
    TITLES,
    kept_studies,
    key_of,
    our_number,
    paper_lines,
    paper_rows,
)
from beit_nb.studies import STUDIES, study_named
from beit_nb.tools import TOOLS

ROOT = Path(__file__).parents[1]
ROWS = [row for rows in paper_rows().values() for row in rows]
LINES = list(dict.fromkeys(line for row in ROWS for line in row.commands))


def test_no_torch_is_imported():
    run_python("import sys, beit_nb.results; sys.exit('torch' in sys.modules)")


@pytest.mark.parametrize("line", LINES)
def test_every_command_is_sound(line):
    "Read as the terminal reads it; a study must exist."
    command, *words = line.split()
    if command in COMMANDS:
        read_recipe(command, words)
        return
    values, strange = read_options(TOOLS[command], words)
    assert strange == []
    options = check_options(TOOLS[command](**values))
    if command == "ablate":
        assert study_graph(study_named(options.name, options.scale), [0])


def essence(recipe):
    "What a recipe says, without its paths."
    return {k: v for k, v in vars(recipe).items() if k not in ("out", "init", "tokenizer")}


def test_every_preset_of_the_paper_is_in_the_report():
    "In a command, or as what a run of a study resolves to; by the sentence of the preset."
    named = {tuple(line.split()[:2]) for line in LINES}
    graphs = [study_graph(scales["base-in1k"], [0]) for scales in STUDIES.values()]
    made = [essence(run.recipe("runs")) for graph in graphs for run in graph.values()]
    counted = 0
    for command, entry in COMMANDS.items():
        for name, (sentence, recipe) in entry.presets.items():
            if re.search(r"\bTables? \d|README|released", sentence):
                assert (command, name) in named or essence(recipe) in made, f"{command} {name}"
                counted += 1
    assert counted > 20
    assert essence(COMMANDS["pretrain"].presets["base-plus-in1k"][1]) in made  # Table 5, last row


def test_rows_of_the_paper():
    "Counted in arXiv 2106.08254v2, appendices included; some rows hold two models."
    by_table = {table: len(rows) for table, rows in paper_rows().items()}

    assert by_table["Table 1"] == 14 and by_table["Table 5"] == 3 and by_table["Table 11"] == 5
    assert set(by_table) <= set(TITLES)
    assert [r.paper for r in ROWS if r.what == "BEiT384-L"] == ["86.3"]
    assert [r.paper for r in ROWS if r.table == "Table 9" and r.commands] == ["56.7", "73.5"]


def test_what_stands_beside_a_row():
    first, second, last = paper_rows()["Table 5"]
    apart = dict(base="ViT", difference=-1.0, low=-2.0, high=-0.25, verdict="contradicted")
    usual = dict(measure="fine-tuning", n=3, mean=70.0, sd=1.0)
    summary = [usual | {"arm": "ViT"}, usual | apart | {"arm": "+ LayerScale"}]
    records = [{"study": {"name": "table5", "scale": "nano"}, "summary": summary}]

    assert our_number(first, records) == "nano, fine-tuning: 70.0 ± 1.0"
    assert our_number(second, records) == "nano, fine-tuning: -1.0 [-2.0, -0.2], contradicted"
    assert our_number(last, records) == "not run"
    assert our_number(ROWS[0], records) == "another method"


def test_the_report():
    said = beit("results").stdout

    for table in paper_rows():
        assert f"{table}: {TITLES[table]}" in said
    for line in LINES:
        assert f"beit {line}" in said
    assert "Questions without a table" in said and "beit results mask-ratio" in said
    assert said.count("not run") >= 15


def test_readme_shows_its_first_table():
    lines = paper_lines("Table 1", kept_studies())
    table = "\n".join(line for line in lines if line and not line.startswith("  $"))

    assert f"```text\n{table}\n```" in (ROOT / "README.md").read_text(encoding="utf8")


def test_the_study_in_the_readme():
    "Differences that README quotes are those of the record, and so are the verdicts beside them."
    [record] = [r for r in kept_studies() if r["study"]["name"] == "table4"]
    readme = (ROOT / "README.md").read_text(encoding="utf8")
    told = {
        "pixels": "reproduced",
        "no pre-training": "lower",
        "single patches": "contradicted",
        "longer": "reproduced",
    }
    rows = [r for r in record["summary"] if r["measure"] == "fine-tuning" and r["arm"] in told]

    assert len(rows) == len(told)
    for row in rows:
        assert row["verdict"] == told[row["arm"]]
        assert summary_cells(row)["difference [95 %]"] in readme
    [table5] = [r for r in kept_studies() if r["study"]["name"] == "table5"]
    beside = []
    for record in (table5, read_json(ROOT / "nbs" / "88_table5_longer.json")):
        tuned = {r["arm"]: r for r in record["summary"] if r["measure"] == "fine-tuning"}
        both = tuned["+ LayerScale + relative bias"]
        assert both["verdict"] == "contradicted"
        assert f"| {summary_cells(both)['difference [95 %]']} | +0.4 |" in readme
        beside.append(summary_cells(tuned["+ both, positions kept"])["difference [95 %]"])
    assert f"| {' / '.join(beside)} |" in readme
    [labels] = [r for r in kept_studies() if r["study"]["name"] == "labels"]
    asked = ("20, pre-trained, 4 x", "20, scratch, 16 x", "20, scratch, 16 x, own rate")
    tuned = {r["arm"]: r for r in labels["summary"] if r["measure"] == "fine-tuning"}
    quoted = " / ".join(summary_cells(tuned[arm])["fine-tuning"] for arm in asked)
    assert f"| {quoted} % |" in readme
    [heads] = [r for r in kept_studies() if r["study"]["name"] == "heads"]
    rows = [r for r in heads["summary"] if r["arm"].endswith("400, pre-trained")]
    quoted = " / ".join(summary_cells(row)["difference [95 %]"] for row in rows)
    assert quoted in readme and quoted.count("[") == 3
    [blocks] = [r for r in kept_studies() if r["study"]["name"] == "block-size"]
    single = next(r for r in blocks["summary"] if r["arm"] == "single patches")
    assert f"| {summary_cells(single)['difference [95 %]']} | -0.1 |" in readme
    longer = read_json(ROOT / "nbs" / "88_longer.json")["summary"]
    rows = {r["measure"]: summary_cells(r)["difference [95 %]"] for r in longer if "verdict" in r}
    asked = f"| **{rows['segmentation']}** / {rows['neighbours']} / {rows['fine-tuning']} |"
    assert asked in readme
    few = read_json(ROOT / "nbs" / "88_ratio_longer.json")["summary"]
    rows = {r["measure"]: summary_cells(r)["difference [95 %]"] for r in few if "verdict" in r}
    assert f"| {rows['fine-tuning']} / {rows['neighbours']} |" in readme
    compared = {
        "targets": ("LFQ", "VQ-VAE", "k-means", "dVAE", "random hash", "pixels"),
        "mask-ratio": ("10 %", "20 %", "30 %", "40 %", "50 %", "70 %", "90 %"),
        "vocabulary": ("16 words", "64 words", "256 words", "1,024 words"),
    }
    for name, asked in compared.items():
        [record] = [r for r in kept_studies() if r["study"]["name"] == name]
        tuned = {r["arm"]: r for r in record["summary"] if r["measure"] == "fine-tuning"}
        quoted = " / ".join(summary_cells(tuned[arm])["fine-tuning"] for arm in asked)
        assert f"| {quoted} % |" in readme


def test_some_of_the_report():
    said = beit("results", "table9", "mask-ratio").stdout

    assert "Table 9" in said and "Table 1:" not in said
    assert "mask-ratio at nano, 3 seeds" in said and "verdict" in said
    refused("results", "tabel9", says="unknown table or study 'tabel9' (do you mean table9?)")
    assert key_of("Figure 2") == "figure2"


def test_kept_records_are_of_the_recipes_that_we_ship():
    "The names of their runs follow from their fields, as today's code reads them."
    records = kept_studies()
    assert {"mask-ratio", "table4"} <= {r["study"]["name"] for r in records}
    for record in records:
        rebuilt = {}
        for name, kept in record["runs"].items():
            words = shlex.split(kept["line"])
            assert words[:1] == ["beit"] and kept["state"] == "finished"
            recipe = read_recipe(words[1], words[2:])
            study = STUDIES[record["study"]["name"]][record["study"]["scale"]]
            preset, _ = study.stages[words[1]]
            inputs = {
                field: rebuilt[value.split("/")[-1]]
                for field, value in vars(recipe).items()
                if field in ("init", "tokenizer") and value.startswith("OUT/runs/")
            }
            fields = {k: v for k, v in vars(recipe).items() if k not in (*inputs, "out")}
            rebuilt[name] = StudyRun(words[1], preset, fields, inputs)
            assert rebuilt[name].id == name
