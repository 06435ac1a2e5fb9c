"The diagrams of what surrounds a training: recipes, files, memory, stages, studies, the doctor."

from card import BLUE, INK, LIGHT, LINE, ORANGE, Drawing

LEAVES = [  # presets of the pre-training: name, what it adds, source or group, color
    ("base-in1k", "BASE, 800 epochs: Tables 1 to 4", "IN1K", BLUE),
    ("large-in1k", "LARGE, 800 epochs, clip 1.0", "IN1K", BLUE),
    ("base-in1k-300", "ABLATED: BASE, 300 epochs", "IN1K", BLUE),
    ("base-plus-in1k", "BASE, PLUS, LayerScale 0.1, 300", "IN1K", BLUE),
    ("small-in1k, tiny-in1k", "a smaller ViT, 300 epochs", "IN1K", LINE),
    ("base-plus-in22k", "BASE, PLUS, LayerScale 0.1", "IN22K", BLUE),
    ("large-plus-in22k", "LARGE, PLUS, scale 1e-5, clip 1.0", "IN22K", BLUE),
    ("cifar", "TINY: 12 blocks of 192, 300 epochs", "SMALL", LINE),
    ("nano, photos", "NANO: 4 blocks; photos: 64 pixels", "SMALL", LINE),
]
SHARED = {  # sets of fields between the class and the leaves: below, from what, color
    "PAPER": ("Table 12: batch\n2,048, lr 1.5e-3,\nclip 3.0", "class", BLUE),
    "SMALL": ("32 pixels, patches of 4,\nXavier, sine-cosine", "class", LINE),
    "IN1K": ("ImageNet-1K,\n10 epochs of warm-up", "PAPER", BLUE),
    "IN22K": ("ImageNet-22K,\n150 epochs, 0.5 / 0.5", "PAPER", BLUE),
}


def presets() -> Drawing:
    d = Drawing(860, 458, "The pre-trainings as a tree: what each preset adds to what it shares")
    top, pitch, height = 46, 44, 38
    middle = {name: top + pitch * i + height / 2 for i, (name, *_) in enumerate(LEAVES)}
    places = {"PAPER": (170, 124, 70), "SMALL": (322, 160, 56), "IN1K": (322, 160, 56)}
    places["IN22K"] = places["IN1K"]

    def center(group):
        below = [middle[name] for name, _, parent, _ in LEAVES if parent == group]
        below += [center(name) for name, (_, parent, _) in SHARED.items() if parent == group]
        return (min(below) + max(below)) / 2

    def join(x1, y1, x2, y2):
        "From a box to one on its right, by a corner."
        turn = x2 - 20
        d.line(x1, y1, turn, y1)
        d.line(turn, y1, turn, y2)
        d.arrow(turn, y2, x2 - 2, y2)

    d.text(82, 30, "the class", 12)
    d.text(322, 30, "fields that several share", 12)
    d.text(626, 30, "presets: what each adds to them", 12)
    ends = {"class": (148, center("class"))}
    for name, (below, parent, color) in SHARED.items():
        x, width, tall = places[name]
        y = center(name)
        join(*ends[parent], x, y)
        d.box(x, y - tall / 2, width, tall, name, below, color)
        ends[name] = (x + width, y)
    d.box(18, center("class") - 36, 130, 72, "PretrainRecipe", "every field\nhas a default")
    for name, below, parent, color in LEAVES:
        join(*ends[parent], 520, middle[name])
        d.box(520, middle[name] - height / 2, 222, height, name, below, color)
    y = middle["base-in1k-300"]
    d.arrow(742, y, 752, y)
    d.box(754, y - 36, 96, 72, "8 rows", "Tables 4, 5, 8:\none field or\ntwo differ", ORANGE)
    words = "blue: the paper's and the released trainings; grey: our own; orange: rows of ablations"
    d.text(430, 448, words, 11.5)
    return d


CHAINS = [  # title, pre-training, what starts from it, what starts from the first of those
    (
        "the paper's, on ImageNet-1K",
        "base-in1k",
        ["base-in1k", "segment base-in1k-pup"],
        ["base-in1k-384", "base-in1k-cifar100", "segment base-in1k-ft-pup"],
    ),
    (
        "the released ones, on ImageNet-22K",
        "base-plus-in22k",
        ["base-plus-in22k", "base-plus-in1k", "segment base-plus-in22k"],
        ["base-plus-in22k-in1k, -384", "segment base-plus-in22k-ft, -640"],
    ),
]


def chains() -> Drawing:
    d = Drawing(860, 400, "Which training goes on from which")
    for x, words in ((112, "pretrain"), (380, "finetune, or segment"), (702, "and once more")):
        d.text(x, 28, words, 12.5, weight="600")

    def column(start, y, x, width, names):
        "Boxes below one another, each with an arrow from the first run's right side."
        turn = x - 40
        d.line(start, y, turn, y)
        for i, name in enumerate(names):
            low = y + 42 * i
            d.line(turn, y, turn, low)
            d.arrow(turn, low, x - 2, low)
            color = ORANGE if name.startswith("segment") else BLUE
            d.box(x, low - 16, width, 32, name, color=color)

    for k, (title, first, then, last) in enumerate(CHAINS):
        y = 84 + 148 * k
        d.text(22, y - 28, title, 11.5, INK, "start")
        d.box(22, y - 16, 180, 32, first)
        column(202, y, 266, 230, then)
        column(496, y, 566, 272, last)
    words = """An arrow: the weights with which a training begins. The recipe names them;
only for a first fine-tuning you name them, with --init.
Blue: pictures are named; orange: every pixel."""
    d.lines(430, 354, words, 11.5)
    return d


LANES = [  # the first bytes, who reads, what is in such a file
    ("text, a page, a pointer,\nanother format", "what_else", "says what it is", ORANGE),
    ("a length, then {", "read_safetensors", "a header in JSON, which\ncan call nothing", BLUE),
    ("PK, as every zip", "read_zip_file", "since torch 1.6: parts,\nchecksums compared", BLUE),
    ("anything else", "read_legacy_file", "before: five pickles,\nthen the numbers", BLUE),
]


def readers() -> Drawing:
    d = Drawing(
        860, 330, "One file of weights, three readers, and one place where names are looked up"
    )
    d.box(18, 146, 96, 48, "a file", "of weights")
    d.arrow(114, 170, 134, 170)
    d.box(136, 132, 96, 76, "first bytes", "say which\nreader takes it")
    y = {}
    for i, (start, name, below, color) in enumerate(LANES):
        y[name] = 50 + 78 * i
        d.line(232, 170, 250, 170)
        d.line(250, 170, 250, y[name])
        d.arrow(250, y[name], 408, y[name], color=color)
        shown = start.split("\n")
        for k, line in enumerate(shown):
            d.text(258, y[name] - 7 - 15 * (len(shown) - 1 - k), line, 11.5, INK, "start")
        d.box(410, y[name] - 30, 158, 60, name.replace("_", "__"), below, color)
    d.arrow(568, y["what_else"], 706, y["what_else"], color=ORANGE)
    d.box(708, y["what_else"] - 24, 134, 48, "refused", "in one line", ORANGE)
    low = (y["read_zip_file"] + y["read_legacy_file"]) / 2
    for name in ("read_zip_file", "read_legacy_file"):
        d.arrow(568, y[name], 596, low + (y[name] - low) / 3)
    d.box(
        598,
        low - 50,
        140,
        100,
        "find__class",
        "every name passes\nhere: 29 are known,\nany other is refused",
        ORANGE,
    )
    d.line(568, y["read_safetensors"], 794, y["read_safetensors"], BLUE)
    d.arrow(794, y["read_safetensors"], 794, low - 34, color=BLUE)
    d.arrow(738, low, 752, low, color=BLUE)
    d.box(754, low - 32, 88, 64, "tensors", "by dotted\nname", BLUE)
    return d


# Of base at 128 pictures a GPU, in GB, as lesson 71 counts them; a test holds them to its functions
FIXED = [("weights, gradients, moments", 1.47), ("half copies, tokenizer", 0.40)]
TOKENIZER, BLOCKS, INPUTS, ONE, REST = 2.47, 8.39, 0.93, 0.70, 0.40
DEPTH = 12


def memory_step() -> Drawing:
    d = Drawing(860, 376, "The memory of one GPU over one step, without and with checkpointing")
    scale, foot = 22, 300  # pixels a GB; the line of 0

    def panel(left, title, points, peak, words):
        d.text(left + 180, 30, title, 13, weight="600")
        base = foot
        for k, (_, size) in enumerate(FIXED):
            tall = size * scale
            d.rectangle(left, base - tall, 360, tall, (BLUE, LINE)[k])
            base -= tall
        path = " ".join(f"{left + x},{base - scale * gb:.1f}" for x, gb in points)
        look = dict(fill=LIGHT[ORANGE], stroke=ORANGE, stroke_width=1.4)
        d.add("polygon", points=path, **look)
        d.text(left + 8, foot - 12, FIXED[0][0] + ": 1.5 GB", 11, anchor="start")
        d.line(left, foot, left + 360, foot, INK)
        for x, name in ((25, "tokenizer"), (115, "forward"), (250, "backward"), (344, "AdamW")):
            d.text(left + x, foot + 18, name, 11.5)
        for x in (50, 180, 324):
            d.line(left + x, foot, left + x, foot + 8, INK)
            d.line(left + x, 48, left + x, base, LINE, "2 4")
        x, gb = peak
        d.text(left + x, base - scale * gb - 8, words, 11.5, ORANGE)

    ask = [(0, 0), (2, TOKENIZER), (16, TOKENIZER), (50, 0.15), (50, 0)]
    step, back = 128 / DEPTH, 142 / DEPTH
    kept = [*ask, (52, 0.04), (180, BLOCKS), (182, BLOCKS + REST)]
    kept += [(324, 0.0)]
    panel(36, "everything is kept", kept, (182, BLOCKS + REST), "activations: 8.8 GB")
    inputs = INPUTS / DEPTH
    saw = [*ask, (52, 0.04)]
    for i in range(DEPTH):
        x = 52 + step * i
        saw += [(x, inputs * i), (x, inputs * (i + 1))]
    saw += [(180, INPUTS), (180, INPUTS + REST), (182, INPUTS + REST)]
    for i in range(DEPTH):
        x = 182 + back * i
        kept_now = INPUTS - inputs * i
        rest = REST if i == 0 else 0
        saw += [(x, kept_now + rest), (x + back / 3, kept_now + ONE + rest), (x + back, kept_now)]
    saw += [(324, 0.0)]
    panel(464, "checkpointing: inputs of the blocks are kept", saw, (196, 2.1), "2.0 GB")
    d.text(464 + 2, foot - 41 - scale * TOKENIZER - 8, "2.5 GB", 11.5, ORANGE, "start")
    d.text(36 + 2, foot - 41 - scale * TOKENIZER - 8, "2.5 GB", 11.5, ORANGE, "start")
    words = "Base, 128 pictures on a GPU, bf16, to scale. Grey: half-precision copies and the "
    words += "tokenizer's weights, 0.4 GB.\nA tooth: one block is run again, and its activations "
    d.lines(430, 346, words + "live for its own backward pass only.", 11.5)
    return d


MOMENTS = [  # what is done, block at work or None, block fetched or None, gradients that are there
    ("forward, block 1", 0, 1, ()),
    ("forward, block 2", 1, 2, ()),
    ("forward, block 4", 3, None, ()),
    ("backward, block 4", 3, 2, ()),
    ("backward, block 3", 2, 1, (3,)),
    ("AdamW", None, None, (0, 1, 2, 3)),
]


def gather_and_drop() -> Drawing:
    d = Drawing(860, 372, "What one of four GPUs holds under FSDP, moment by moment")
    left, width, gap, top, pitch = 226, 120, 14, 66, 40
    d.text(left + 2 * width + 21, 28, "What GPU 0 of four holds of a network of four blocks", 12.5)
    for block in range(4):
        d.text(left + block * (width + gap) + width / 2, 52, f"block {block + 1}", 12)
    for i, (words, work, fetched, gradients) in enumerate(MOMENTS):
        y = top + pitch * i
        d.text(left - 16, y + 13, words, 12, anchor="end")
        for block in range(4):
            x = left + block * (width + gap)
            look = dict(fill="none", stroke=LINE, stroke_dasharray="3 3", rx=3)
            d.add("rect", x=x, y=y, width=width, height=18, **look)
            whole = block in (work, fetched)
            d.rectangle(x, y, width if whole else width / 4, 18, BLUE)
            if whole:
                d.text(x + width / 2, y + 13, "at work" if block == work else "being collected", 11)
            if block in gradients:
                d.rectangle(x, y + 21, width / 4, 9, ORANGE)
    foot = top + pitch * len(MOMENTS) + 12
    d.rectangle(40, foot, 30, 16, BLUE)
    d.text(
        78,
        foot + 13,
        "weights: its own quarter always, all of a block only around its work",
        12,
        anchor="start",
    )
    d.rectangle(500, foot, 30, 16, ORANGE)
    d.text(538, foot + 13, "gradient: summed over GPUs, its own quarter", 12, anchor="start")
    words = "Collecting is an all-gather, twice for a block; gradients are dealt out by a "
    d.text(430, foot + 42, words + "reduce-scatter, once: three trips.", 12)
    return d


def stages() -> Drawing:
    d = Drawing(860, 322, "The stages of a run, and what stays in its folder")
    boxes = [
        ("open__run", "the folder, locked;\nthe recipe noted", LINE),
        ("data", "training, held-out;\nfingerprints", LINE),
        ("model", "a body from init,\na fresh head", BLUE),
        ("Trainer", "goes on at the last\ncheckpoint, if any", BLUE),
        ("fit", "steps, scores,\ncheckpoints", BLUE),
        ("last scores", "the figures\nof the run", ORANGE),
    ]
    width, gap = 124, 14
    for i, (name, below, color) in enumerate(boxes):
        x = 22 + (width + gap) * i
        d.box(x, 40, width, 68, name, below, color)
        if i:
            d.arrow(x - gap, 74, x - 1, 74)
    d.text(430, 26, "beit finetune, from its first line to its last", 12.5)
    files = [
        (0, "config.json"),
        (1, "config.json: inputs"),
        (4, "log.jsonl, checkpoints/"),
        (5, "metrics.json"),
    ]
    d.rectangle(14, 142, 832, 26, LINE)
    for i, name in files:
        x = 22 + (width + gap) * i + width / 2
        d.arrow(x, 108, x, 141)
        d.text(x, 159, name, 11.5)
    d.text(430, 186, "the folder of the run (--out)", 11.5, INK)
    d.text(430, 224, "The same command again", 12.5)
    again = [
        ("it had finished", "its figures are\nread, nothing runs", LINE),
        ("it was stopped", "it goes on, bit for bit as\nif it had not been", BLUE),
        ("another recipe or data", "refused in one line,\nnothing is mixed", ORANGE),
    ]
    for i, (name, below, color) in enumerate(again):
        d.box(108 + 220 * i, 236, 204, 68, name, below, color)
    return d


def probe_arms() -> Drawing:
    d = Drawing(860, 300, "Three arms, one examination")
    d.box(18, 118, 110, 56, "pictures", "20 labels a class")
    arms = [
        ("pretrained", "blocks of the checkpoint", BLUE),
        ("random", "same shape, untrained", LINE),
        ("pixels", "no network", LINE),
    ]
    for i, (name, below, color) in enumerate(arms):
        y = 26 + 92 * i
        d.arrow(128, 146, 168, y + 28, color=color)
        d.box(170, y, 180, 56, name, below, color)
        d.arrow(350, y + 28, 388, 146 + 22 * (i - 1), color=color)
    d.text(370, 282, "frozen: nothing of an arm is trained", 11.5)
    d.box(
        390,
        104,
        158,
        84,
        "logistic regression",
        "on every block, with\nfive strengths: the\nsame for every arm",
        BLUE,
    )
    d.arrow(548, 146, 576, 146)
    d.box(578, 110, 120, 72, "choose", "block and strength,\non validation\npictures", ORANGE)
    d.arrow(698, 146, 726, 146)
    d.box(728, 110, 114, 72, "report", "that one score,\non test pictures", ORANGE)
    d.text(648, 214, "What pre-training brought is the distance", 12)
    d.text(648, 232, "between the arms, not a score by itself.", 12)
    return d


HOLDS = [
    ("version, study, seeds", "what was asked, of which version"),
    ("runs", "of each: its line, fields, state, figures"),
    ("values", "arm, measure: a figure for each seed"),
    ("summary", "mean, difference, interval, verdict"),
]


def study_record() -> Drawing:
    d = Drawing(860, 330, "study.json: who writes it, what it holds, who reads it")
    d.box(18, 66, 168, 62, "run__graph", "makes the runs that\nare not finished")
    d.arrow(102, 128, 102, 168)
    d.box(18, 170, 168, 78, "metrics.json", "final figures in the\nfolder of each run\n(OUT/runs)")
    d.arrow(186, 209, 268, 180, color=BLUE)
    d.text(226, 178, "study__record", 11.5, BLUE)
    d.rectangle(270, 40, 266, 254, BLUE)
    d.text(403, 64, "OUT/study.json", 13.5, weight="600")
    for i, (name, below) in enumerate(HOLDS):
        d.box(284, 76 + 52 * i, 238, 46, name, below)
    readers = [
        ("run__study again", "takes seeds whose figures\nstand there (kept__seeds)", BLUE),
        ("beit ablate", "prints the table, draws\nreport.html (lesson 87)", ORANGE),
        ("beit results", "puts differences beside the\npaper's rows (lesson 89)", ORANGE),
        ("anybody", "types the line of one run\nand makes it once more", LINE),
    ]
    for i, (name, below, color) in enumerate(readers):
        y = 20 + 74 * i
        d.arrow(536, 167 + (i - 1.5) * 40, 622, y + 32, color=color)
        d.box(624, y, 218, 64, name, below, color)
    return d


COURSE = [  # what a run is known by, and what comes of it
    ("log.txt of the official code", "instead of all the others"),
    ("log.jsonl", "losses, rates, gradient norms"),
    ("config.json", "the recipe: the rates it wants"),
    ("tokenizer and pictures", "entropy of tokens at each place"),
]
BESIDE = [
    ("newest checkpoint", "finite? has each had a gradient?"),
    ("a band", "healthy runs of that recipe"),
]


def doctor() -> Drawing:
    d = Drawing(860, 372, "What feeds the doctor")
    for i, (name, below) in enumerate(COURSE):
        y = 22 + 54 * i
        d.box(18, y, 216, 46, name, below, BLUE if i else LINE)
        d.arrow(234, y + 23, 284, 126 + 16 * (i - 1.5), color=BLUE if i else LINE)
    d.box(
        286,
        76,
        132,
        100,
        "RunCourse",
        "columns of the log,\nthe recipe beside\nthem, and what\nis measured now",
        BLUE,
    )
    d.arrow(418, 126, 448, 126, color=BLUE)
    for i, (name, below) in enumerate(BESIDE):
        y = 248 + 54 * i
        d.box(18, y, 216, 46, name, below, BLUE)
        x = 502 + 28 * i
        d.line(234, y + 23, x, y + 23, BLUE)
        d.arrow(x, y + 23, x, 174, color=BLUE)
    d.box(
        450,
        80,
        132,
        92,
        "checks",
        "numbers, schedule,\nloss, masks, tokens\n(lessons 85, 91 to 93)",
        ORANGE,
    )
    d.arrow(582, 126, 612, 126, color=ORANGE)
    d.box(
        614,
        80,
        116,
        92,
        "findings",
        "fine, look, broken,\nor unknown where\nthere is no file",
        ORANGE,
    )
    d.arrow(672, 172, 672, 226, color=ORANGE)
    d.box(574, 228, 196, 46, "cause and remedy", "of what is not fine (lesson 92)")
    d.arrow(730, 126, 748, 126, color=ORANGE)
    d.box(750, 92, 96, 68, "page, JSON", "exit status\n0, 1 or 3")
    d.lines(672, 304, "What is gone is named,\nand the rest is judged all the same.", 12)
    return d


ALL = (
    presets,
    chains,
    readers,
    memory_step,
    gather_and_drop,
    stages,
    probe_arms,
    study_record,
    doctor,
)
