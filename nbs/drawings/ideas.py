"The diagrams of BEiT's ideas, and those of a run that were drawn with them."

from card import BLUE, INK, LIGHT, LINE, ORANGE, Drawing

# The whole idea. A lesson shows it with its own part lit.
HIDDEN = {(0, 2), (1, 1), (1, 2), (2, 1), (2, 2)}
SHADES = ["#b9c7d8", "#9fb4cc", "#cdd8e4", "#86a1c0"]
IDEA = {  # file: what is lit in it
    "idea": {"patches", "mask", "vit", "guesses", "tokenizer", "tokens", "loss"},
    "idea_patches": {"patches"},
    "idea_tokenizer": {"tokenizer"},
    "idea_tokens": {"tokens"},
    "idea_mask": {"mask"},
    "idea_vit": {"vit"},
    "idea_mim": {"guesses", "loss"},
}


def idea(lit: set[str]) -> Drawing:
    d = Drawing(860, 290, "BEiT: guess the visual tokens of hidden patches")
    picture = {(r, c): SHADES[(r * 3 + c * 2) % 4] for r in range(4) for c in range(4)}

    def part(name, x, y, below, color=BLUE, width=116, title=""):
        d.box(x, y, width, 62, title or name, below, color, name in lit)

    d.cells(24, 98, 4, 4, 22, picture)
    d.lines(68, 206, "a picture (4 × 4\npatches drawn)", 11.5)
    d.line(116, 142, 136, 142)
    d.line(136, 74, 136, 214)
    d.arrow(136, 74, 154, 74)
    d.arrow(136, 214, 154, 214)
    part("patches", 156, 43, "14 × 14 squares\nof 16 × 16 pixels")
    d.arrow(272, 74, 294, 74)
    part("mask", 296, 43, "some are replaced\nby one vector [M]", ORANGE, 120)
    d.arrow(416, 74, 438, 74)
    part("vit", 440, 43, "every patch looks\nat every other", title="ViT")
    d.arrow(556, 74, 578, 74)
    part("guesses", 580, 43, "8,192 probabilities\nper hidden patch", BLUE, 124)
    part("tokenizer", 156, 183, "dVAE encoder,\ntrained before")
    d.arrow(272, 214, 438, 214)
    part("tokens", 440, 183, "one id a patch,\nof 8,192", title="visual tokens")
    d.line(556, 214, 772, 214)
    d.line(704, 74, 772, 74)
    d.arrow(772, 74, 772, 108)
    d.arrow(772, 214, 772, 178)
    part("loss", 712, 112, "−log p(token)\nat hidden places", ORANGE, 120)
    seen = {k: ORANGE if k in HIDDEN else v for k, v in picture.items()}
    d.cells(334, 116, 4, 4, 11, seen)
    d.text(356, 176, "what it sees", 11.5)
    ids = {(r, c): str((r * 37 + c * 61 + 12) % 97) for r in range(4) for c in range(4)}
    d.cells(610, 222, 4, 4, 15, {place: LIGHT[ORANGE] for place in HIDDEN}, ids)
    return d


def elbo() -> Drawing:
    d = Drawing(820, 310, "The ELBO: two networks, and a gap that is a KL divergence")
    d.box(36, 60, 84, 60, "picture x")
    d.arrow(120, 90, 168, 90)
    d.box(170, 60, 130, 60, "encoder q_φ(z|x)", "which tokens?", BLUE)
    d.arrow(300, 90, 348, 90)
    d.box(350, 60, 84, 60, "tokens z")
    d.arrow(392, 120, 392, 178)
    d.box(327, 180, 130, 60, "decoder p_ψ(x|z)", "which picture?", BLUE)
    d.box(170, 180, 130, 60, "prior p(z)", "what is usual?")
    # in ink: orange is the other KL, the gap
    d.line(235, 122, 235, 178, INK, "4 3")
    d.lines(220, 268, "KL(q ‖ prior): what\nnaming the tokens costs")
    d.lines(392, 268, "E_q[log p_ψ(x|z)]: how well\nthe picture comes back", color=BLUE)

    top, bound, zero = 56, 96, 290  # heights of log p(x), of the ELBO, and the foot of the bar
    side = dict(x=600, anchor="start")
    d.line(500, top, 795, top, INK)
    d.text(500, top - 8, "log p(x): fixed by the decoder and the prior", 12, INK, "start")
    d.rectangle(520, top, 70, bound - top, ORANGE)
    d.rectangle(520, bound, 70, zero - bound, BLUE)
    d.line(500, zero, 795, zero)
    gap = "gap = KL(q ‖ p(z|x)) ≥ 0\n0 when q is the posterior"
    d.lines(y=top + 17, words=gap, color=ORANGE, **side)
    d.lines(y=130, words="ELBO = reconstruction term\n− KL(q ‖ prior)", color=BLUE, **side)
    ends = "the encoder closes the gap,\nthe decoder lifts the line."
    d.lines(y=188, words=f"Training lifts it from both ends:\n{ends}", **side)
    return d


RACE = """\
Each token runs home in a time T_k that is exponential with rate p_k. \
The first one is token k with probability p_k, exactly.
−log T_k is log p_k + Gumbel noise, so the first home is the argmax of log p_k + g_k.
The soft choice is the softmax of the same sums, divided by τ."""


def gumbel() -> Drawing:
    d = Drawing(780, 266, "Gumbel-max as a race: who comes home first is a draw")
    runners = [("token 0", 0.2, 3.4), ("token 1", 0.5, 0.9), ("token 2", 0.3, 2.1)]
    first = min(time for _, _, time in runners)
    d.line(150, 40, 150, 190, INK)
    d.text(150, 30, "start", 12)
    for i, (name, chance, time) in enumerate(runners):
        y = 66 + 46 * i
        end = 150 + 95 * time
        won = time == first
        d.text(136, y + 4, f"{name}   p = {chance}", 12.5, anchor="end")
        d.arrow(150, y, end, y, color=ORANGE if won else LINE)
        home = f"T = {time}" + (", first home: drawn" if won else "")
        d.text(end + 8, y + 4, home, 12.5, ORANGE if won else INK, "start")
    d.lines(30, 214, RACE, anchor="start")
    return d


SIDES = (112, 56, 28, 14)  # pixels, after each group of DALL-E's encoder
WIDTHS = (256, 512, 1024, 2048)  # channels


def dalle() -> Drawing:
    d = Drawing(780, 330, "DALL-E's towers, at the size at which BEiT uses them")
    middle = 150

    def tower(x, order, center, words, between):
        for i in order:
            height = SIDES[i] * 1.15
            width = 16 + 10 * i
            d.rectangle(x, middle - height / 2, width, height, BLUE)
            d.text(x + width / 2, 232, str(WIDTHS[i]), 11.5)
            d.text(x + width / 2, 248, f"{SIDES[i]}²", 11.5, LINE)
            x += width + 18
        d.text(center, 276, words, 12.5, BLUE, weight="600")
        d.text(center, 294, between, 11.5, LINE)

    def picture(x, channels):
        d.rectangle(x, middle - 64, 45, 128, LINE)
        d.lines(x + 22, 232, f"{channels}\n112²", 11.5)

    head = "Width of a blue box: channels. Height: pixels a side. "
    d.text(390, 32, head + "A 112-pixel view gives one id to each of BEiT's 14 × 14 patches.", 12)
    picture(24, 3)
    d.arrow(70, middle, 90, middle)
    pooled = "halved by max pooling between groups"
    tower(94, (0, 1, 2, 3), 180, "encoder: 4 groups of 2 blocks", pooled)
    d.arrow(276, middle, 308, middle)
    ids = {(r, c): str((r * 37 + c * 61) % 90) for r in range(4) for c in range(4)}
    d.cells(314, 118, 4, 4, 16, {}, ids)
    d.lines(346, 206, "14 × 14 ids of 8,192\n(4 × 4 are drawn)", 11.5)
    convolutions = "1 × 1 convolution to 8,192\nlogits, argmax; back by\n1 × 1 to 128 channels"
    d.lines(346, 66, convolutions, 11.5, LINE)
    d.arrow(384, middle, 416, middle)
    doubled = "doubled by nearest neighbours between groups"
    tower(428, (3, 2, 1, 0), 515, "decoder: 4 groups of 2 blocks", doubled)
    d.arrow(612, middle, 640, middle)
    picture(648, 6)
    d.lines(704, 128, "3 means,\n3 log\nscales of\na Laplace", 11.5, anchor="start")
    return d


OFFSETS = """\
Row of the table: how much higher the other
patch lies (query row − key row, −2 to 2).
Column: how far to the left.

Pairs of patches with the same offset share
a number, wherever they lie. 14 × 14 patches
need 27 × 27 + 3 = 732 numbers a head."""


def relative_positions() -> Drawing:
    d = Drawing(780, 300, "The index of relative positions, on a grid of 3 x 3 patches")
    query = (1, 2)
    index = {}  # patch -> its number in the table, seen from the query
    for r in range(3):
        for c in range(3):
            index[r, c] = (query[0] - r + 2) * 5 + (query[1] - c + 2)
    used = {divmod(number, 5): LIGHT[BLUE] for number in index.values()}
    table = {divmod(number, 5): str(number) for number in range(25)}
    d.text(100, 34, "from the marked patch", 12.5)
    d.cells(40, 50, 3, 3, 40, {query: LIGHT[ORANGE]}, {k: str(v) for k, v in index.items()})
    d.lines(100, 192, "to each patch: which number\nof the table")
    d.arrow(176, 110, 228, 110)
    d.text(330, 34, "one table a head: 5 × 5 offsets + 3", 12.5)
    d.cells(240, 50, 5, 5, 36, used | {(2, 2): LIGHT[ORANGE]}, table)
    d.cells(240, 238, 1, 3, 36, {}, {(0, i): str(25 + i) for i in range(3)})
    cls = "25: CLS to a patch, 26: a patch to CLS, 27: CLS to itself"
    d.text(356, 261, cls, 11.5, anchor="start")
    d.lines(452, 76, OFFSETS, anchor="start")
    return d


def eight_gpus() -> Drawing:
    d = Drawing(780, 344, "One step of pre-training on eight GPUs")
    d.box(270, 18, 240, 42, "2,048 pictures of this step")
    for i in range(8):
        x = 26 + 92 * i
        d.arrow(390 + (i - 3.5) * 26, 60, x + 42, 88)
        d.box(x, 90, 84, 80, f"GPU {i}", "256 pictures,\nforward and\nbackward", BLUE)
        d.arrow(x + 42, 170, 390 + (i - 3.5) * 60, 202, color=ORANGE)
    sums = "sums over all GPUs: gradients, and how many patches were hidden"
    quotient = "gradient / hidden patches = the gradient of one big batch"
    d.box(120, 204, 540, 50, sums, quotient, ORANGE)
    d.arrow(390, 254, 390, 280)
    d.box(160, 282, 460, 44, "the same AdamW step on every GPU, so weights stay equal", color=BLUE)
    return d


PARTS = [  # of a checkpoint: name, what it is, color
    ("model", "the weights, by\nthe official names", BLUE),
    ("optimizer", "two moments\na weight", BLUE),
    ("step, epoch", "where the\nschedules stand", LINE),
    ("random state", "of torch's\ngenerator", LINE),
    ("data position", "the next batch,\nand damaged pictures", LINE),
    ("scaler", "fp16's loss scale,\nif it is used", LINE),
]
WHOLE = "Written to a temporary file, flushed to disk, renamed: "
WHOLE += "a kill at any moment leaves the last one whole."


def checkpoint() -> Drawing:
    d = Drawing(780, 250, "What a checkpoint holds, and what each part is needed for")
    d.text(253, 30, "so that stop + resume = never stopped, bit for bit", 12.5)
    for i, part in enumerate(PARTS):
        row, column = divmod(i, 3)
        d.box(24 + 158 * column, 44 + 92 * row, 146, 78, *part)
    d.text(636, 30, "so that figures of one run stay its own", 12.5)
    fields = "every field of the recipe: another\none is refused, not mixed in"
    d.box(516, 44, 240, 78, "configuration", fields, ORANGE)
    inputs = "data, tokenizer, starting weights:\nthe same files, or no resuming"
    d.box(516, 136, 240, 78, "fingerprints of its inputs", inputs, ORANGE)
    d.text(390, 238, WHOLE, 12)
    return d


ALONE = (elbo, gumbel, dalle, relative_positions, eight_gpus, checkpoint)
