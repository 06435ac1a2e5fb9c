"""Draws the book's diagrams: `python nbs/drawings/draw.py` writes the SVG files beside this one.

What they are drawn with is card.py; ideas.py and machinery.py draw them.
"""

from pathlib import Path

import ideas
import machinery

HERE = Path(__file__).parent
DRAWINGS = {
    **{name: lambda lit=lit: ideas.idea(lit) for name, lit in ideas.IDEA.items()},
    **{draw.__name__: draw for draw in (*ideas.ALONE, *machinery.ALL)},
}

if __name__ == "__main__":
    for name, draw in DRAWINGS.items():
        (HERE / f"{name}.svg").write_text(draw().svg(), encoding="utf8")
