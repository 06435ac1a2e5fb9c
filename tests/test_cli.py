"The command `beit`, as a person types it: help, recipes, refusals, exit statuses, a new training."

import ast
import io
import json
import os
import pickle
import resource
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
import torch
import toy_command
from helpers import FEW_STEPS, SMALL_BODY, beit, refused, unpainted
from helpers_processes import run, run_python, wait_until

from beit_nb import BeitError, say, shown, warn
from beit_nb.cli import main, read_recipe, usage
from beit_nb.configs import check_recipe
from beit_nb.limits import plain_type
from beit_nb.recipes import COMMANDS, from_config
from beit_nb.tokenizer import train_tokenizer
from beit_nb.tools import TOOLS

pytestmark = pytest.mark.usefixtures("pages_unpainted")


@pytest.mark.parametrize(
    "words", ["--help", "pretrain --help", "pretrain nano --help", "plan --help"]
)
def test_help_is_fast_and_needs_no_torch(words):
    code = (
        f"import sys; sys.argv = ['beit', *{words.split()}]\n"
        "import beit_nb.cli as c\n"
        "try: c.main()\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run_python(code)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)

    # wall time says more about the neighbours
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert seconds < 1.5  # about 0.3 on a quick machine, 0.7 on a slow one; torch alone takes 3


@pytest.mark.parametrize("start", ["module", "script"])
def test_the_two_ways_to_start_it(start):
    starts = {
        "module": [sys.executable, "-m", "beit_nb"],
        "script": [str(Path(sys.executable).with_name("beit"))],
    }
    bad = run(*starts[start], "pretrain", "huge", ok=2)
    good = run(*starts[start], "--help")

    assert bad.stdout == ""
    assert bad.stderr.startswith("beit: error: unknown pretrain recipe 'huge'")
    assert bad.stderr.count("\n") == 1
    assert "usage: beit" in good.stdout


def test_read_recipe():
    recipe = read_recipe("pretrain", ["nano", "--lr", "1e-3", "--num-mask-patches", "20"])
    switched = read_recipe("pretrain", ["nano", "--no-resume", "--batch_size=8"])

    assert (recipe.lr, recipe.num_mask_patches, recipe.embed_dim) == (1e-3, 20, 128)
    assert recipe.out == "runs/pretrain-nano"
    assert not switched.resume and switched.batch_size == 8
    assert COMMANDS["pretrain"].presets["nano"][1].out == ""


def test_recipes_page():
    page = beit("pretrain", "--help").stdout

    assert "masked image modelling" in page
    for name, (text, _) in COMMANDS["pretrain"].presets.items():
        assert name in page and text in " ".join(page.split())


def test_bad_words():
    refused("pretrian", says=["pretrian", "pretrain"])
    refused("pretrain", says=["name a pretrain recipe", "base-in1k"])
    refused("pretrain", "--lr", 1, says="name a pretrain recipe")
    refused("pretrain", "huge", says=["huge", "nano", "base-in1k"])
    refused("pretrain", "nano", "--lrr", 1, says=["no option --lrr (do you mean --lr?)", "--flip"])
    refused("pretrain", "nano", "cifar", says="no use for 'cifar'")
    refused("predict", "--init", "x", "--images", "y", "--to", 1, says="no option --to")
    refused("--verion", says="do you mean --version?")
    refused("plan", says="beit plan needs RECIPE; see beit plan --help")
    refused("predict", "--int", 1, says="no option --int (do you mean --init?)")
    refused("predict", "--init", "x", says="beit predict needs --images")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_a_recipe_refuses_a_word_that_it_cannot_mean(command):
    "In one line that names the option; an option without a value too."
    hints = get_type_hints(COMMANDS[command].recipe, include_extras=True)
    free = [name for name, hint in hints.items() if plain_type(hint) is str]
    switches = [name for name, hint in hints.items() if plain_type(hint) is bool]

    for name in hints.keys() - set(free) - set(switches):
        option = f"--{name.replace('_', '-')}"
        refused(command, "nano", option, "abc", says=[f"error: {option} ", "abc", " must be "])
    for name in hints.keys() - set(switches):
        option = f"--{name.replace('_', '-')}"
        refused(command, "nano", option, says=f"error: {option} needs a value: ")
    for name in switches:
        refused(command, "nano", f"--{name}=abc", says=" 'abc' must be True or False")
        refused(command, "nano", f"--{name}", "abc", says="no use for 'abc'")


@pytest.mark.parametrize(
    "line, says",
    [
        ("plan nano --gpus x", "--gpus 'x' must be a whole number, at least 1"),
        ("plan nano --lr x", "--lr 'x' must be a finite number"),
        ("plan nanno", "(do you mean nano?)"),
        ("plan nano --hardware a10", "(do you mean a100?)"),
        ("plan nano --command pretran", "(do you mean pretrain?)"),
        ("bench stepp", "NAMES ('stepp',) must be values, each one of step, small"),
        ("bench --thredas 1", "no option --thredas (do you mean --threads?)"),
        (
            "attention x y --query 3",
            "--query ('3',) must be rows and columns such as 11,13, or cls",
        ),
        ("demo quick", "no use for 'quick' (do you mean --quick?)"),
        ("report x y", "no use for 'y'; its options are: none"),
        ("shard", "beit shard needs DATA and --out"),
        ("tokenize digits --workers many", "--tokenizer"),
    ],
)
def test_every_tool_refuses_bad_words_in_one_line(line, says):
    refused(*line.split(), says=says)


def test_a_refused_run_leaves_nothing_behind(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()

    refused("pretrain", "nano", "--out", "a/b", says="--tokenizer")
    refused("finetune", "nano", "--init", "nowhere", "--out", "mine", says="nowhere")

    assert [path.name for path in tmp_path.rglob("*")] == ["mine"]


@pytest.mark.parametrize(
    "changes, says",
    [
        ("--img-size 30", ["30", "patch_size 4"]),
        ("--num-mask-patches 65", ["65", "64"]),
        ("--num-mask-patches 1", ["num_mask_patches 1", "no block fits"]),
        ("--token-size 64", ["grids differ", "32"]),
        ("--vocab-size 99", ["99", "256"]),
    ],
)
def test_recipes_that_cannot_work(runs, tmp_path, changes, says):
    words = ["pretrain", "nano", "--tokenizer", runs / "tok", "--out", tmp_path / "x"]
    refused(*words, *changes.split(), says=says)


def test_what_a_training_starts_from(runs, tmp_path):
    out = ["--out", tmp_path / "x"]

    refused("pretrain", "nano", *out, says="--tokenizer")
    wrong = ["--tokenizer", runs / "pre"]
    refused("pretrain", "nano", *wrong, *out, says=["beit pretrain", "beit tokenizer"])
    refused("finetune", "nano", "--init", runs / "tok", *out, says="beit tokenizer")
    other = ["--init", runs / "pre", "--embed-dim", 64]
    refused("finetune", "nano", *other, *out, says=["embed_dim", "48", "64"])


def test_bad_data(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("no picture")
    words = [*FEW_STEPS, "--out", tmp_path / "x", "--data"]

    refused("tokenizer", "nano", *words, tmp_path / "nowhere", says=["nowhere", "digits"])
    refused("tokenizer", "nano", *words, tmp_path / "empty", says=["empty", "no pictures"])
    refused("tokenizer", "nano", *words, tmp_path / "text", says=["text", "no pictures"])
    refused("finetune", "nano", *words, tmp_path / "text", says="train")


def test_bad_checkpoints(runs, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'pwned'}",)

    whole = (runs / "tok" / "checkpoints" / "last.pt").read_bytes()
    (tmp_path / "short.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "log.pt").write_text("--2021-06-15-- resolving host")
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil()))
    torch.save({"config": {"command": "tokenizer"}, "model": Evil()}, tmp_path / "evil2.pt")

    for name in ("short.pt", "log.pt", "evil.pt", "evil2.pt", "missing.pt"):
        tokenizer = ["--tokenizer", tmp_path / name, "--out", tmp_path / "x"]
        refused("pretrain", "nano", *FEW_STEPS, *tokenizer, says=name)
    assert not (tmp_path / "pwned").exists(), "loading ran pickled code"


def test_other_run_in_the_folder(runs):
    words = ["tokenizer", "nano", *FEW_STEPS, "--width", 16, "--out", runs / "tok"]

    refused(*words, "--lr", 0.1, says=["another run", "lr"])
    refused(*words, "--no-resume", says="--no-resume")


@pytest.mark.parametrize(
    "name, command", [("tok", "tokenizer"), ("pre", "pretrain"), ("fine", "finetune")]
)
def test_files_of_a_run(runs, name, command):
    out = runs / name
    config = json.loads((out / "config.json").read_text())
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    state = torch.load(out / "checkpoints" / "last.pt", weights_only=True)
    metrics = json.loads((out / "metrics.json").read_text())
    html = (out / "report.html").read_text()

    assert config["command"] == command and config["steps"] == 4
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert list(losses) == [2, 4] and np.isfinite([*losses.values()]).all()
    parts = {"model", "optimizer", "step", "epoch", "scaler", "random", "data", "config"}
    assert parts <= set(state) and state["config"] == config
    assert metrics["finished"] is True
    assert html.count("<img") >= 1 and "http://" not in html and "https://" not in html


def test_finished_run_is_left_alone(runs):
    last = runs / "fine" / "checkpoints" / "last.pt"
    before = last.stat().st_mtime_ns

    again = ["--init", runs / "pre", "--out", runs / "fine", "--eval-every", 2]
    beit("finetune", "nano", *FEW_STEPS, *SMALL_BODY, *again)

    assert last.stat().st_mtime_ns == before


@pytest.mark.slow
def test_stopped_early_is_not_finished(tmp_path):
    "metrics.json of a run that --max-steps or --dry-run ended does not pass for a finished run's."
    words = ["tokenizer", "nano", *FEW_STEPS, "--out", tmp_path / "run"]

    beit(*words, "--dry-run")
    stopped = json.loads((tmp_path / "run" / "metrics.json").read_text())
    page = (tmp_path / "run" / "report.html").read_text()
    beit(*words)
    ended = json.loads((tmp_path / "run" / "metrics.json").read_text())

    assert stopped["finished"] is False and "Not finished: step 2 of 4" in page
    assert ended["finished"] is True
    assert "Finished: step 4 of 4" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.slow
def test_folder_of_pictures(photos, tmp_path):
    "Tokenizer, pre-training and fine-tuning on somebody's own pictures, and a prediction."
    data = [*FEW_STEPS, "--data", photos, "--batch-size", 4]
    view = "--depth 1 --img-size 32 --patch-size 4 --token-size 64 --vocab-size 512".split()
    beit("tokenizer", "photos", *data, "--out", tmp_path / "tok")
    from_tokens = ["--tokenizer", tmp_path / "tok", "--out", tmp_path / "pre"]
    beit("pretrain", "cifar", *data, *view, *from_tokens)
    from_body = ["--init", tmp_path / "pre", "--depth", 1, "--out", tmp_path / "fine"]
    beit("finetune", "cifar", *data, *from_body)

    picture = photos / "val" / "dog" / "deep" / "0.jpg"
    said = beit("predict", "--init", tmp_path / "fine", "--images", picture).stdout
    assert "dog" in said and "cat" in said


@pytest.mark.slow
def test_damaged_pictures_are_counted(photos, tmp_path):
    words = ["tokenizer", "photos", *FEW_STEPS, "--data", photos, "--batch-size", 16]

    tolerant = beit(*words, "--out", tmp_path / "a")
    strict = beit(*words, "--out", tmp_path / "b", "--max-damaged", 0, ok=2)

    assert "broken.jpg" in tolerant.stderr  # named, and the run went on
    last = strict.stderr.strip().splitlines()[-1]
    assert last.startswith("beit: error: more than max_damaged=0")


@pytest.mark.parametrize(
    "words",
    [
        "pretrain nano --depth 1000 --embed-dim 8192 --num-heads 8",
        "tokenizer nano --width 60000",
        "finetune nano --img-size 60000",
        "pretrain nano --device-batch-size 100000000 --batch-size 100000000",
    ],
)
def test_what_the_machine_cannot_hold_is_said_before(words, tmp_path):
    line = refused(*words.split(), "--out", tmp_path / "run", says=[" GB of memory", "beit plan"])

    assert "needs at least" in line and not (tmp_path / "run").exists()


def fail_with(error):
    def training(recipe):
        raise error

    return training


def fail_with_all(error):
    def tool(*arguments):
        raise error

    return tool


@pytest.mark.parametrize(
    "error, status, says",
    [
        (BeitError("img_size 3 is odd:\n take 4"), 2, "beit: error: img_size 3 is odd: take 4\n"),
        (FileNotFoundError(2, "No such file", "x.jpg"), 2, "beit: error: [Errno 2] No such file"),
        (FloatingPointError("the loss is nan"), 1, "beit: error: the loss is nan\n"),
        (KeyboardInterrupt("saved"), 130, "\nbeit: saved\n"),
        (KeyboardInterrupt(), 130, "\nbeit: stopped; the same command continues"),
    ],
)
def test_exit_statuses(monkeypatch, tmp_path, error, status, says):
    monkeypatch.setattr("beit_nb.tokenizer.train_tokenizer", fail_with(error))

    said = beit("tokenizer", "nano", "--out", tmp_path, ok=status).stderr

    assert said.startswith(says) and "Traceback" not in said


def test_a_stop_says_what_the_command_will_do(monkeypatch, tmp_path, photos):
    monkeypatch.setattr("beit_nb.converting.convert", fail_with_all(KeyboardInterrupt()))
    monkeypatch.setattr("beit_nb.probing.probe", fail_with(KeyboardInterrupt()))

    convert = beit("convert", "a.pth", tmp_path / "b.pth", "--to", "official", ok=130).stderr
    probe = beit("probe", "nano", "--out", tmp_path / "p", ok=130).stderr

    assert convert == probe == "\nbeit: stopped; the same command begins anew\n"
    assert [name for name, tool in TOOLS.items() if getattr(tool, "continues", False)] == [
        "demo",
        "tokenize",
        "shard",
        "ablate",
    ]


def test_names_of_recipes_do_not_run_into_their_texts():
    page = beit("finetune", "--help").stdout

    for name in COMMANDS["finetune"].presets:
        assert f"  {name}  " in page


@pytest.mark.parametrize("error", [ValueError("shapes differ"), RuntimeError("oops"), KeyError(3)])
def test_a_defect_of_ours_shows_its_traceback(monkeypatch, tmp_path, error):
    "A ValueError too: nobody should look for a mistake in what they typed when it is in the code."
    monkeypatch.setattr("beit_nb.tokenizer.train_tokenizer", fail_with(error))

    said = beit("tokenizer", "nano", "--out", tmp_path, ok=1).stderr

    assert said.startswith("Traceback") and type(error).__name__ in said
    assert "beit: error:" not in said


def test_debug_shows_every_traceback():
    with pytest.raises(BeitError, match="unknown command 'pretrian'"):
        main(["pretrian", "--debug"])


def test_a_broken_page_does_not_hide_why_a_run_ended(monkeypatch, tmp_path):
    stop = fail_with(KeyboardInterrupt("saved after step 3"))
    monkeypatch.setattr("beit_nb.tokenizer.train_tokenizer", stop)
    monkeypatch.setattr("beit_nb.report.run_report", lambda out: 1 / 0)

    said = beit("tokenizer", "nano", "--out", tmp_path, ok=130).stderr

    assert said == "\nbeit: saved after step 3\n"


@pytest.fixture
def hears_hangups():
    "Who runs the tests under `nohup` has SIGHUP ignored, in this process and in its children."
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.usefixtures("hears_hangups")
def test_a_second_signal_finds_the_run_leaving(monkeypatch, tmp_path, number):
    "torchrun passes on what its workers have got already: it must not strike the page or the word."
    pages = []
    before = signal.getsignal(number)

    def ends_in_the_end(recipe):
        try:
            signal.raise_signal(number)
        finally:
            signal.raise_signal(number)

    def page(out):
        signal.raise_signal(number)
        pages.append(out)

    monkeypatch.setattr("beit_nb.tokenizer.train_tokenizer", ends_in_the_end)
    monkeypatch.setattr("beit_nb.report.run_report", page)

    said = beit("tokenizer", "nano", "--out", tmp_path, ok=130).stderr

    assert said == "\nbeit: stopped; the same command continues from the last checkpoint\n"
    assert pages == [str(tmp_path)]
    assert signal.getsignal(number) == before


def test_a_new_training_is_its_module_and_one_entry(monkeypatch, tmp_path):
    """Help, recipe check, log line, page, plan and the way back from a config.

    All from `toy_command.COMMAND`; not one of these places has heard of it.
    """
    monkeypatch.setitem(COMMANDS, "toy", toy_command.COMMAND)
    words = ["toy", "tiny", "--out", tmp_path / "run"]

    # help
    assert "toy RECIPE          how bright is a picture?  [tiny]" in usage()
    assert "four steps on the digits" in beit("toy", "--help").stdout
    assert "numbers between picture and answer" in beit("toy", "tiny", "--help").stdout
    # recipe check
    refused(*words, "--hidden", 0, says="hidden 0 must be at least 1")
    refused(*words, "--hidden", 99, says="hidden 99 is above img_size 16: lower it")
    refused(*words, "--hiden", 1, says="a toy recipe has no option --hiden (do you mean --hidden?)")
    # log line
    said = beit(*words).stdout
    [line] = [line for line in said.splitlines() if line.startswith("toy 4/4: ")]
    assert "loss " in line and "toy_error " in line and "images_per_s " in line
    # page
    html = (tmp_path / "run" / "report.html").read_text()
    assert "<h1>beit toy</h1>" in html and "Finished: step 4 of 4" in html
    assert "<span>typical error</span>" in html
    assert html.count("<img") == 4 and "The toy&#x27;s only number." in html
    # plan
    plan = beit("plan", "tiny", "--command", "toy", "--gpus", 1).stdout
    assert "toy tiny" in plan and "4 steps of 8 pictures" in plan
    # and back
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    recipe = from_config(config)
    assert type(recipe) is toy_command.ToyRecipe and recipe.hidden == 4
    check_recipe(recipe)


BEIT = [sys.executable, "-m", "beit_nb"]
TINY_RUN = ["tokenizer", "nano", *FEW_STEPS, "--batch-size", "8", "--width", "8"]


def shell(line, **options):
    "A line of bash, in which `beit` stands for this interpreter's."
    return run("bash", "-c", line.replace("beit ", f"{sys.executable} -m beit_nb "), **options)


def is_finished(out):
    return json.loads((out / "metrics.json").read_text())["finished"] is True


@pytest.mark.parametrize(
    "line",
    [
        "beit --help | head -1",
        "beit pretrain nano --help | head -1",
        "beit plan base-in1k | head -1",
    ],
)
def test_a_reader_that_leaves_is_no_fault(line):
    ended = shell(f"set -o pipefail; {line}")

    assert ended.stderr == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    "streams",
    [
        "> /dev/full 2>&1",
        "<&- >&- 2>&-",
        "2>&1 | true",
    ],
)
def test_a_training_outlives_its_streams(streams, tmp_path):
    line = " ".join(map(str, ["set -o pipefail; beit", *TINY_RUN, "--out", tmp_path / "run"]))

    ended = shell(f"{line} {streams}")

    assert is_finished(tmp_path / "run")
    assert (tmp_path / "run" / "report.html").exists()
    assert "Traceback" not in ended.stderr


def test_a_full_disk_is_told_where_it_can_be_heard():
    ended = shell("beit --version > /dev/full")

    assert ended.stderr.count("\n") == 1 and "No space left" in ended.stderr


def test_a_file_never_gets_the_number_of_a_closed_stream():
    "Else what is said to nobody would be written into it."
    code = (
        "import os, tempfile; from beit_nb.cli import keep_streams; keep_streams();"
        "n = os.open(os.devnull, os.O_RDONLY); os._exit(0 if n > 2 else 1)"
    )
    shell(f"{sys.executable} -c '{code}' <&- >&- 2>&-")


@pytest.mark.slow
@pytest.mark.usefixtures("hears_hangups", "quick_starts")
def test_a_terminal_that_closes_stops_a_training_as_sigterm_does(tmp_path):
    import pty
    import subprocess

    master, slave = pty.openpty()
    words = [*BEIT, *TINY_RUN, "--out", str(tmp_path / "run")]
    words[words.index("--steps") + 1] = "1000000"
    child = subprocess.Popen(
        words,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
    )
    os.close(slave)
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    wait_until(last.exists, "a checkpoint", alive=lambda: child.poll() is None)

    os.close(master)  # the kernel sends SIGHUP, and every later word meets an EIO

    try:
        assert child.wait(60) == 130
    finally:
        child.kill()
    assert "Traceback" not in (tmp_path / "run" / "report.html").read_text()
    state = torch.load(last, weights_only=True)
    assert state["step"] >= 2


UGLY = (
    "a\x1b[2J\x07\r\n\x9b31m\u202eb"  # clears the screen, rings, forges a line, turns the writing
)


def test_what_is_said_only_shows(capsys):
    say(UGLY, "± caf\udce9")
    warn(UGLY)
    said = capsys.readouterr()

    lines = said.out.splitlines()
    assert lines[0] == r"a\x1b[2J\x07\r\n\x9b31m\u202eb"
    assert lines[1] == r"± caf\udce9"
    assert said.err == "beit: " + lines[0] + "\n"
    assert shown("plain words, ± 中 é") == "plain words, ± 中 é"


def test_a_stream_that_fails_or_is_none_hears_nothing(monkeypatch):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    ascii_only = io.TextIOWrapper(io.BytesIO(), "ascii", errors="strict")
    for stream in (Full(), None, ascii_only):
        monkeypatch.setattr(sys, "stdout", stream)
        say("0.5 ± 0.1")

    assert ascii_only.buffer.getvalue() == rb"0.5 \xb1 0.1" + b"\n"


def test_names_of_strangers_never_reach_the_terminal_raw(photos, tmp_path):
    "Folders, pictures and classes with names that would do something there."
    top = tmp_path / UGLY.replace("/", "")
    shutil.copytree(photos, top)
    (top / "train" / "cat").rename(top / "train" / UGLY)
    (top / "val" / "cat").rename(top / "val" / UGLY)
    (top / "train" / UGLY / "broken.jpg").rename(top / "train" / UGLY / f"{UGLY}.jpg")
    few = "--precision fp32 --steps 1 --batch-size 4 --max-damaged 1".split()
    words = ["finetune", "nano", *few, "--data", top, "--labels-per-class", 4, "--out", top / "run"]
    words[words.index("--out") + 1] = tmp_path / "out" / UGLY

    said = [beit(*words)]
    picture = top / "val" / UGLY / "deep" / "0.jpg"
    said += [beit("predict", "--init", tmp_path / "out" / UGLY, "--images", picture)]
    said += [beit("shard", top, "--out", tmp_path / f"shards{UGLY}")]
    said += [beit("predict", "--init", UGLY, "--images", picture, ok=2)]
    said += [beit("report", UGLY, ok=2), beit(UGLY, ok=2), beit("pretrain", UGLY, ok=2)]

    for each in said:
        for text in (each.stdout, each.stderr):
            assert all(c.isprintable() or c == "\n" for c in text), text
    assert r"\x1b[2J" in said[1].stdout and said[1].stdout.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("folder", [b"caf\xe9", "caf\u00e9".encode(), b"\xff\xfe"])
@pytest.mark.usefixtures("quick_starts")
def test_folders_in_other_alphabets_cost_nothing(photos, tmp_path, folder):
    "What may be read may be written: log, page, figures, where stdout knows ASCII alone too."
    top = os.fsencode(tmp_path) + b"/" + folder
    shutil.copytree(photos, os.fsdecode(top))
    out = os.fsdecode(top + b"-out")
    words = [*BEIT, "finetune", "nano", *FEW_STEPS, "--data", os.fsdecode(top)]
    words += ["--batch-size", "4", "--labels-per-class", "4", "--max-damaged", "1", "--out", out]

    with unpainted():
        ended = run(*words, env=os.environ | {"PYTHONIOENCODING": "ascii"})

    assert is_finished(Path(out)) and "report: " in ended.stdout
    html = (Path(out) / "report.html").read_bytes().decode()  # it is UTF-8
    assert "Finished" in html
    assert json.loads((Path(out) / "config.json").read_bytes())["out"] == out


def test_the_library_prints_on_one_road():
    "`say` and `warn`: they escape names, and a lost stream ends nothing."
    prints = {}
    for file in (Path(__file__).parents[1] / "beit_nb").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print":
                prints[file.name] = node.lineno

    assert prints == {}


def home(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    monkeypatch.setenv("PLACE", str(tmp_path / "me" / "place"))
    monkeypatch.delenv("NOWHERE", raising=False)


@pytest.mark.parametrize(
    "typed, meant", [("~/x", "x"), ("$HOME/x", "x"), ("${HOME}/x", "x"), ("$PLACE/x", "place/x")]
)
def test_home_is_found_in_every_path(monkeypatch, tmp_path, typed, meant):
    home(monkeypatch, tmp_path)
    there = str(tmp_path / "me" / meant)

    for command, path_fields in {
        "tokenizer": ["data", "out"],
        "pretrain": ["data", "out", "tokenizer", "tokens"],
        "finetune": ["data", "out", "init"],
        "probe": ["data", "out", "init"],
        "linear": ["data", "out", "init"],
    }.items():
        for field in path_fields:
            recipe = read_recipe(command, ["nano", f"--{field}={typed}"])
            assert getattr(recipe, field) == there
            check_recipe(recipe)


def test_a_path_that_no_shell_has_read_is_refused(monkeypatch, tmp_path):
    home(monkeypatch, tmp_path)

    for path in ("~nobody-of-that-name/x", "$NOWHERE/x", "runs/${NOWHERE}"):
        refused("tokenizer", "nano", *FEW_STEPS, "--out", path, says=["out ", "without ~ or $VAR"])
        refused("tokenizer", "nano", *FEW_STEPS, "--data", path, says="data ")
        refused("shard", path, "--out", "x", says="DATA ")
        refused("predict", "--init", path, "--images", "x", says="init ")
        refused("predict", "--init", "x", "--images", "y", path, says="images ")
        refused("report", path, says="OUT ")
        with pytest.raises(BeitError, match="without ~"):
            train_tokenizer(replace(COMMANDS["tokenizer"].presets["nano"][1], out=path))
    assert list(tmp_path.iterdir()) == []


def test_a_tilde_that_is_a_letter_stays_one(monkeypatch, tmp_path):
    home(monkeypatch, tmp_path)
    (tmp_path / "~").mkdir()
    (tmp_path / "$HOME").mkdir()

    for path in ("~", "$HOME", "./~new", "./$NOWHERE", "a~b", "50$"):
        assert read_recipe("tokenizer", ["nano", f"--out={path}"]).out == path


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.usefixtures("hears_hangups")
def test_a_tool_that_is_stopped_puts_all_in_order(photos, tmp_path, monkeypatch, how):
    "Python would end on the spot, without a word, and leave half a shard behind."
    from beit_nb.engine import packing

    monkeypatch.setattr(packing, "decode_image", lambda *_: os.kill(os.getpid(), how))

    said = beit("shard", photos, "--out", tmp_path / "out", ok=130).stderr

    assert said.strip() == "beit: stopped; the same command continues from the last checkpoint"
    assert not list((tmp_path / "out").rglob("*.part"))
    assert signal.getsignal(how) == signal.SIG_DFL
