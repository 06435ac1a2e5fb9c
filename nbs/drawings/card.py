"""What every diagram is drawn with: a card, boxes, arrows and words, in one style.

A light card, so that a dark page can read it too; dark ink, blue for what is computed from the
whole picture, orange for what is hidden or compared. Lengths are pixels.
"""

from html import escape

INK, LINE, PALE, CARD = "#24303c", "#8a8f98", "#f0f2f5", "#fbfbfc"
BLUE, ORANGE = "#3366aa", "#c96a10"
LIGHT = {BLUE: "#dfe8f5", ORANGE: "#fbe6cf", LINE: PALE}
UNDERSCORE = "\0"  # stands for one while signs are lowered
FONT = "system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif"


class Drawing:
    "A card of so many pixels; every method draws one thing on it."

    def __init__(self, width: int, height: int, title: str):
        self.size = (width, height)
        self.title = title
        self.parts = [
            f'<rect width="{width}" height="{height}" rx="10" fill="{CARD}" stroke="#d8dbe0"/>'
        ]

    def add(self, tag: str, body: str = "", **attributes) -> None:
        pairs = "".join(f' {k.replace("_", "-")}="{v}"' for k, v in attributes.items())
        self.parts.append(f"<{tag}{pairs}>{body}</{tag}>" if body else f"<{tag}{pairs}/>")

    def text(self, x, y, words, size=13, color=INK, anchor="middle", weight="normal") -> None:
        "A line of words, its baseline at y; _ and ^ before a sign lower and lift it."
        look = dict(font_size=size, fill=color, text_anchor=anchor, font_weight=weight)
        self.add("text", spans(words), x=x, y=y, **look)

    def lines(self, x, y, words, size=12, color=INK, anchor="middle", leading=1.35) -> None:
        for i, line in enumerate(words.split("\n")):
            self.text(x, y + i * leading * size, line, size, color, anchor)

    def box(self, x, y, width, height, words="", below="", color=LINE, lit=True) -> None:
        "A rounded box with a name in it and, smaller, what it holds; pale where it is not lit."
        fill = LIGHT[color] if lit else CARD
        stroke = color if lit else "#cfd3d9"
        ink = INK if lit else LINE
        self.add("rect", x=x, y=y, width=width, height=height, rx=7, fill=fill, stroke=stroke)
        middle = x + width / 2
        small = below.split("\n") if below else []
        first = y + height / 2 + 5 - 8 * len(small)
        self.text(middle, first, words, 13.5, ink, weight="600")
        for i, line in enumerate(small):
            self.text(middle, first + 16 * (i + 1), line, 11.5, ink)

    def rectangle(self, x, y, width, height, color=LINE) -> None:
        look = dict(fill=LIGHT[color], stroke=color, rx=3)
        self.add("rect", x=x, y=y, width=width, height=height, **look)

    def arrow(self, x1, y1, x2, y2, words="", color=LINE, dy=-6) -> None:
        look = dict(stroke=color, stroke_width=1.6, marker_end=f"url(#{color[1:]})")
        self.add("line", x1=x1, y1=y1, x2=x2, y2=y2, **look)
        if words:
            self.text((x1 + x2) / 2, (y1 + y2) / 2 + dy, words, 11.5, color)

    def line(self, x1, y1, x2, y2, color=LINE, dash="") -> None:
        more = dict(stroke_dasharray=dash) if dash else {}
        self.add("line", x1=x1, y1=y1, x2=x2, y2=y2, stroke=color, stroke_width=1.4, **more)

    def cells(self, x, y, rows, cols, side, fills, words=None) -> None:
        "A grid of squares; `fills` and `words` by (row, column)."
        for r in range(rows):
            for c in range(cols):
                left, top = x + c * side, y + r * side
                fill = fills.get((r, c), "#ffffff")
                look = dict(fill=fill, stroke=LINE, stroke_width=0.8)
                self.add("rect", x=left, y=top, width=side, height=side, **look)
                if words and (r, c) in words:
                    size = min(12, side * 0.42)
                    self.text(left + side / 2, top + side * 0.64, words[r, c], round(size, 1))

    def svg(self) -> str:
        width, height = self.size
        heads = "".join(
            f'<marker id="{c[1:]}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            f'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="{c}"/></marker>'
            for c in (LINE, BLUE, ORANGE)
        )
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" role="img" font-family="{FONT}">\n'
            f"<title>{escape(self.title)}</title><defs>{heads}</defs>\n"
            + "\n".join(self.parts)
            + "\n</svg>\n"
        )


def spans(words: str) -> str:
    "Words with their signs lowered and lifted: x_i, 10^3 (one sign each); __ is an underscore."
    out = ""
    shift = 0  # pixels that the line is off its baseline
    signs = iter(words.replace("__", UNDERSCORE))
    for sign in signs:
        if sign in "_^":
            dy = 4 if sign == "_" else -5
            out += f'<tspan dy="{dy - shift}" font-size="75%">{escape(next(signs))}</tspan>'
            shift = dy
        elif shift:
            out += f'<tspan dy="{-shift}">{escape(sign)}</tspan>'
            shift = 0
        else:
            out += escape(sign)
    return out.replace(UNDERSCORE, "_")
