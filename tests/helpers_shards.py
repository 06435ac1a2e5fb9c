"""A small tree of pictures that is packed, and what must come out of its shards."""

from pathlib import Path

from helpers import save_gray


def counts(pictures, shards, damaged=0, others=0) -> dict:
    return {"pictures": pictures, "shards": shards, "damaged": damaged, "others": others}


def lay_out_tree(root: Path) -> Path:
    """Twelve pictures in train (classes a, b, c) and val (class b alone).

    Besides a note and a broken picture.
    """
    for i in range(12):
        split, folder = ("train", "abc"[i % 3]) if i < 9 else ("val", "b")
        deeper = "deep" if i % 2 else ""
        ending = ("png", "JPEG", "webp")[i // 4]
        save_gray(root / split / folder / deeper / f"pic.{i}.{ending}", 20 * i)
    (root / "train" / "a" / "note.txt").write_text("hello")
    (root / "train" / "b" / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    return root


def contents(folder) -> dict[bytes, int]:
    "The bytes of every good picture below a folder of classes -> its class."
    return {
        f.read_bytes(): "abc".index(f.relative_to(folder).parts[0]) for f in folder.rglob("pic.*")
    }
