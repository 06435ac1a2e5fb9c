"The book's diagrams: drawn by their source, small, inside their cards, and true to the code."

import re
import sys
from pathlib import Path

import matplotlib
import pytest
import torch
from PIL import ImageFont

from beit_nb.dalle import DalleEncoder
from beit_nb.transformer import relative_position_index

FOLDER = Path(__file__).parents[1] / "nbs" / "drawings"
FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


@pytest.fixture(scope="module")
def drawings():
    sys.path.insert(0, str(FOLDER))
    import draw

    sys.path.remove(str(FOLDER))
    return {name: make() for name, make in draw.DRAWINGS.items()}


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


def test_every_drawing_is_shown():
    pages = "".join(p.read_text(encoding="utf8") for p in FOLDER.parent.glob("*.ipynb"))

    assert [p.name for p in FOLDER.glob("*.svg") if f"](drawings/{p.name})" not in pages] == []
