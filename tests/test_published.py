"The table of published files in data/README.md against timm and against what we mention elsewhere."

import re
from pathlib import Path

from timm.models.beit import default_cfgs

ROOT = Path(__file__).parent.parent
TABLE = (ROOT / "data" / "README.md").read_text(encoding="utf8")
FILE = r"beit_(?:base|large)_patch16_\d+_pt[a-z0-9_]+\.pth"
HUB = r"(?:microsoft/beit-[a-z0-9-]+\w|timm/beit_[a-z0-9_]+\.[a-z0-9_]+)"


def test_whatever_we_mention_stands_in_the_table():
    texts = [ROOT / "README.md", *ROOT.glob("nbs/*.ipynb"), *ROOT.glob("beit_nb/**/*.py")]
    assert len(texts) > 100
    for path in texts:
        for name in re.findall(f"{FILE}|{HUB}", path.read_text(encoding="utf8")):
            assert f"`{name}`" in TABLE, f"{path.name} mentions {name}"


def test_every_copy_names_a_file_of_the_table():
    files = set(re.findall(rf"^\| `({FILE})`", TABLE, re.M))
    copies = re.findall(rf"^\| `{HUB}` \| `({FILE})`", TABLE, re.M)

    assert len(files) == 14 and len(copies) == 14
    assert set(copies) <= files


def test_timms_names_are_timms():
    told = {name.removeprefix("timm/") for name in re.findall(HUB, TABLE) if "timm/" in name}

    first = {name: cfg for name, cfg in default_cfgs.items() if name.startswith("beit_")}
    assert told == {f"{name}.{tag}" for name, cfg in first.items() for tag in cfg.cfgs if tag}


def test_sizes_are_those_of_the_networks():
    "Parameters as in lessons 14 and 45; ImageNet-22K has 20,841 classes more than 1,000."
    counts = {
        "beit_base_patch16_224_pt22k.pth": 91_965_776,
        "beit_base_patch16_224_pt22k_ft22k.pth": 86_530_984 + 20_841 * 769,
        "beit_base_patch16_224_pt22k_ft1k.pth": 86_530_984,
        "beit_large_patch16_224_pt22k.pth": 311_534_016,
        "beit_large_patch16_224_pt22k_ft1k.pth": 304_430_568,
        "beit_base_patch16_224_pt1k_800ep.pth": 92_089_856,
    }
    for name, count in counts.items():
        size = re.search(rf"`{name}` \|.*\| ([\d.]+) (MB|GB) \|", TABLE)
        assert size
        told = float(size[1]) * {"MB": 1e6, "GB": 1e9}[size[2]]
        assert abs(told / (4 * count) - 1) < 0.01
