"The book's diagrams: drawn by their source, small, inside their cards, and true to the code."

import re
import sys
from pathlib import Path

import matplotlib
import pytest
import torch
from PIL import ImageFont

from beit_nb.dalle import DalleEncoder
from beit_nb.engine.safeload import KNOWN_NAMES
from beit_nb.presets import FINETUNE, PRETRAIN
from beit_nb.recipes import SEGMENT, recipe_named
from beit_nb.scale.flops import mim_products
from beit_nb.scale.memory import activation_bytes, block_bytes, training_memory
from beit_nb.transformer import relative_position_index

FOLDER = Path(__file__).parents[1] / "nbs" / "drawings"
FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
FONT = FONTS / "DejaVuSans.ttf"
BOLD = FONTS / "DejaVuSans-Bold.ttf"


@pytest.fixture(scope="module")
def drawings():
    sys.path.insert(0, str(FOLDER))
    import draw

    sys.path.remove(str(FOLDER))
    return {name: make() for name, make in draw.DRAWINGS.items()}


@pytest.fixture
def machinery(drawings):
    "The module that drew what surrounds a training, with the figures that stand in it."
    return sys.modules["machinery"]


def test_files_are_what_the_source_draws(drawings):
    files = {p.stem: p.read_text(encoding="utf8") for p in FOLDER.glob("*.svg")}

    assert files == {name: drawing.svg() for name, drawing in drawings.items()}
    assert max(map(len, files.values())) < 40_000


def test_every_word_is_on_its_card(drawings):
    lines = re.compile(
        r'<text x="([\d.]+)" y="([\d.]+)" font-size="([\d.]+)".*?text-anchor="(\w+)"'
    )
    for name, drawing in drawings.items():
        width, height = drawing.size
        parts = [part for part in drawing.parts if part.startswith("<text")]
        assert len(parts) > 5
        for part in parts:
            x, y, size = map(float, lines.match(part).groups()[:3])
            anchor = lines.match(part)[4]
            words = re.sub(r"<[^>]+>", "", part)
            long = ImageFont.truetype(FONT, 100).getlength(words) * size / 100
            left = x - long * {"start": 0, "middle": 0.5, "end": 1}[anchor]
            assert 4 < left and left + long < width - 4 and y < height - 6, (name, words)


def test_a_word_too_long_is_found(drawings):
    card = type(drawings["elbo"])(100, 50, "")
    for _ in range(6):
        card.text(50, 20, "far too many words for so small a card")

    with pytest.raises(AssertionError, match="far too many"):
        test_every_word_is_on_its_card({"small": card})


def too_long(drawing) -> list[str]:
    "Words in the middle of a box, or of what looks like one, that are wider than it."
    a_box = re.compile(r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)" height="[\d.]+" rx="7"')
    a_text = re.compile(r'<text x="([\d.]+)" y="[\d.]+" font-size="([\d.]+)".*?weight="(\w+)"')
    found = []
    box = None
    for part in drawing.parts:
        if new := a_box.match(part):
            box = float(new[1]), float(new[2])
            continue
        text = a_text.match(part)
        if not text or not box or abs(float(text[1]) - box[0] - box[1] / 2) > 0.01:
            box = None
            continue
        font = ImageFont.truetype(BOLD if text[3] == "600" else FONT, 100)
        words = re.sub(r"<[^>]+>", "", part)
        if font.getlength(words) * float(text[2]) / 100 > box[1] - 4:
            found.append(words)
    return found


def test_words_stay_in_their_boxes(drawings):
    assert {name: too_long(drawing) for name, drawing in drawings.items()} == dict.fromkeys(
        drawings, []
    )

    card = type(drawings["elbo"])(100, 50, "")
    card.box(10, 10, 60, 30, "a long name", "short")

    assert too_long(card) == ["a long name"]


def numbers(drawing) -> list[str]:
    return re.findall(r">(\d+)<", "".join(drawing.parts))


def test_relative_positions_are_the_codes(drawings):
    query = 1 * 3 + 2
    ours = relative_position_index(3, 3)

    drawn = [int(n) for n in numbers(drawings["relative_positions"])]

    assert drawn[:9] == ours[1 + query, 1:].tolist()
    assert drawn[-3:] == [ours[0, 1], ours[1, 0], ours[0, 0]]


def test_dalles_widths_are_the_codes(drawings):
    with torch.device("meta"):
        shapes = {p.shape[0] for p in DalleEncoder().parameters() if p.ndim == 4}
    drawn = {int(n) for n in numbers(drawings["dalle"]) if int(n) >= 256}

    assert drawn == {256, 512, 1024, 2048} <= shapes


def test_the_trees_presets_are_ours(machinery):
    drawn = {name for words, *_ in machinery.LEAVES for name in words.split(", ")}
    rows = [name for name, (words, _) in PRETRAIN.items() if name not in drawn]

    assert drawn < set(PRETRAIN)
    assert len(rows) == 8  # the box beside base-in1k-300
    for name in rows:
        recipe, base = PRETRAIN[name][1], PRETRAIN["base-in1k-300"][1]
        assert 1 <= sum(vars(recipe)[k] != v for k, v in vars(base).items()) <= 2


def test_the_chains_are_those_of_init(machinery):
    presets = {"finetune": FINETUNE, "segment": SEGMENT}
    for _, first, then, last in machinery.CHAINS:
        assert first in PRETRAIN
        for name in [*then, *last]:
            words = name.replace(", -", " -").split()
            command = words.pop(0) if words[0] == "segment" else "finetune"
            for preset in [words[0], *(words[0] + end for end in words[1:])]:
                recipe = presets[command][preset][1]
                before = f"finetune-{then[0]}" if name in last else f"pretrain-{first}"
                assert recipe.init in ("", f"runs/{before}")
                assert recipe.init or name in then


def test_the_memory_drawn_is_lesson_71s(machinery):
    base = recipe_named("pretrain", "base-in1k")
    head = mim_products(base)[-1]
    block = 128 * 197 * block_bytes(base, half=True, fused=True) / 1e9
    parts = {k: v / 1e9 for k, v in training_memory(base, 128).items()}
    whole = 128 * activation_bytes(base, head) / 1e9
    light = 128 * activation_bytes(base, head, checkpointing=True) / 1e9
    with_checkpointing = recipe_named("pretrain", "base-in1k", grad_checkpointing=True)
    fixed = [size for _, size in machinery.FIXED]

    assert fixed[0] == pytest.approx(
        parts["weights"] + parts["gradients"] + parts["adam"], abs=0.01
    )
    assert fixed[1] == pytest.approx(parts["half copies"] + parts["tokenizer"], abs=0.01)
    assert pytest.approx(block, abs=0.01) == machinery.ONE
    assert pytest.approx(12 * block, abs=0.01) == machinery.BLOCKS
    assert pytest.approx(whole, abs=0.01) == machinery.BLOCKS + machinery.REST
    assert pytest.approx(light, abs=0.02) == machinery.INPUTS + machinery.ONE + machinery.REST
    maps = training_memory(with_checkpointing, 128)["activations"] / 1e9
    assert pytest.approx(maps, abs=0.01) == machinery.TOKENIZER > light


def test_the_names_a_pickle_may_use_are_counted(drawings):
    assert f"here: {len(KNOWN_NAMES)} are known" in "".join(drawings["readers"].parts)


def test_every_drawing_is_shown():
    pages = "".join(p.read_text(encoding="utf8") for p in FOLDER.parent.glob("*.ipynb"))

    assert [p.name for p in FOLDER.glob("*.svg") if f"](drawings/{p.name})" not in pages] == []
