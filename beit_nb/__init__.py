"""BEiT, explained and defined in notebooks: learn it, run it, trust it.

Written by hand, as the other `__init__.py` and `__main__.py` are; every other module is exported
from a notebook in `nbs/`.
Holds the version, the two errors that every module may raise, the exit status that they mean, the
one road on which a line reaches a person, and the names that outside users rely on, loaded when
they are first asked for, so that `import beit_nb` imports no torch.
"""

__version__ = "0.2.0"

import sys
from contextlib import suppress
from importlib import import_module
from typing import TextIO


class BeitError(ValueError):
    """Bad input: the message is one line that says what was wrong, where, and what to do.

    The command `beit` prints that line and exits with status 2. Any other exception
    (but OSError) is a defect of ours, and shows its traceback.
    """


class UnreadableImage(BeitError):
    "A picture that cannot be read; a training stands another one in for it and counts it."


def exit_status(error: BaseException) -> int:
    """The exit status of a command that ends with `error`.

    2: bad input or a file that fails us; 130: Ctrl-C; 1: anything else.
    """
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 2 if isinstance(error, (BeitError, OSError)) else 1


def shown(text: object) -> str:
    r"""`text` as one line that a terminal only shows: whatever could move its cursor is escaped.

    Names of files and classes come from strangers. What is not printable (an escape, a line break,
    a mark that turns the direction of writing, a byte that is no UTF-8) is written as `\x1b` is.
    """
    letters = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    return "".join(letters)


def write_lines(stream: TextIO | None, lines: tuple[object, ...]) -> None:
    "Each line escaped, all in one piece. A stream that is closed, full or gone ends no training."
    if stream is None:
        return
    text = "".join(f"{shown(line)}\n" for line in lines)
    letters = getattr(stream, "encoding", None) or "utf-8"  # of those the stream may have few
    with suppress(OSError):
        stream.write(text.encode(letters, "backslashreplace").decode(letters))
        stream.flush()


def say(*lines: object) -> None:
    "Lines for whoever reads the standard output; everything that this library says goes this way."
    write_lines(sys.stdout, lines)


def warn(*lines: object) -> None:
    "The same, but to the error stream, with `beit: ` in front."
    write_lines(sys.stderr, tuple(f"beit: {line}" for line in lines))


SAID: set[str] = set()  # what this command has warned of


def warn_once(line: str) -> None:
    "The same, unless this command has said it already."
    if line not in SAID:
        SAID.add(line)
        warn(line)


HOMES = {
    "patches": "patchify unpatchify PatchEmbed",
    "elbo": "log_evidence posterior kl_categorical kl_uniform",
    "gumbel": "sample_gumbel gumbel_softmax temperature_schedule",
    "dvae": "DiscreteVAE map_pixels unmap_pixels logit_laplace_nll dvae_loss",
    "tokens": "Tokenizer codebook_usage",
    "masking": "blockwise_mask blockwise_masks random_mask",
    "vit": "VisionTransformer Attention Block RelativePositionBias DropPath",
    "mim": "BeitForMaskedImageModeling mim_loss mim_accuracy",
    "attention": "attention_maps",
    "engine.optim": "cosine_schedule param_groups Ema",
    "engine.runs": "save_checkpoint load_checkpoint",
    "data": "open_data",
    "tokenizer": "train_tokenizer load_tokenizer",
    "resizing": "load_backbone resize_rel_pos_bias resize_pos_embed",
    "checkpoints": "load_weights load_official save_official to_timm from_timm to_hf from_hf",
    "pretraining": "pretrain",
    "finetuning": "BeitForImageClassification finetune",
    "probing": "probe",
    "segmentation": "BeitForSemanticSegmentation mean_iou slide_inference",
    "experiments": "Study Arm run_study summarize",
    "explorers": "MaskExplorer",
}
_HOME_OF = {name: module for module, names in HOMES.items() for name in names.split()}


def __getattr__(name: str):
    if name not in _HOME_OF:
        raise AttributeError(f"module 'beit_nb' has no attribute {name!r}")
    return getattr(import_module(f"beit_nb.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME_OF])
