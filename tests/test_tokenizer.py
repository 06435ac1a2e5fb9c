"The tokenizer's training: DALL-E's network by its recipe, and the moving average of the weights."

from dataclasses import replace

import pytest
import torch

from beit_nb import BeitError
from beit_nb.engine.log import read_log
from beit_nb.engine.runs import load_checkpoint
from beit_nb.recipes import recipe_named
from beit_nb.tokenizer import load_tokenizer, train_tokenizer

pytestmark = pytest.mark.usefixtures("pages_unpainted")

TINY = dict(batch_size=8, precision="fp32", log_every=1, checkpoint_every=2)


@pytest.mark.slow
def test_dalle_recipe_trains_saves_and_loads(tmp_path):
    """DALL-E's network, likelihood and schedules, only narrower and shorter.

    Stopped, continued, loaded.
    """
    r = recipe_named(
        "tokenizer",
        "dalle",
        data="digits",
        out=str(tmp_path / "a"),
        img_size=32,
        width=16,
        code_dim=8,
        vocab_size=64,
        steps=6,
        lr_steps=4,
        tau_steps=4,
        kl_steps=3,
        ema=0.5,
        lr=1e-3,
        max_steps=3,
        **TINY,
    )
    train_tokenizer(r, quiet=True)
    stopped = train_tokenizer(replace(r, max_steps=None), quiet=True)
    whole = train_tokenizer(replace(r, max_steps=None, out=str(tmp_path / "b")), quiet=True)
    loaded = load_tokenizer(tmp_path / "a")
    state = load_checkpoint(tmp_path / "a", "tokenizer")
    for name, p in whole.dvae.named_parameters():
        assert torch.equal(p, stopped.dvae.get_parameter(name)) and torch.equal(
            p, loaded.dvae.get_parameter(name)
        )
    assert any(
        not torch.equal(state["model"][k], v) for k, v in loaded.dvae.state_dict().items()
    ), "the mean was handed out, not the last weights"
    assert type(loaded.dvae).__name__ == "DalleVAE" and loaded.get_codebook_indices(
        torch.rand(2, 3, 32, 32)
    ).shape == (2, 4, 4)
    log = [e for e in read_log(tmp_path / "a") if "loss" in e]
    assert [round(e["lr"], 8) for e in log][-1] == pytest.approx(1.25e-6) and log[0]["kl"] >= 0


@pytest.mark.slow
def test_mean_is_the_mean(tmp_path):
    """Two roads: torch's running mean in the run, and the same mean by hand from checkpoints of
    every step.
    """
    r = recipe_named(
        "tokenizer",
        "nano",
        out=str(tmp_path / "m"),
        steps=4,
        width=16,
        ema=0.75,
        milestone_every=1,
        keep_checkpoints=9,
        **TINY | dict(checkpoint_every=1),
    )
    mean = None
    for step in range(1, 5):
        tokenizer = train_tokenizer(replace(r, max_steps=step), quiet=True)
        now = load_checkpoint(tmp_path / "m", "tokenizer")["model"]
        mean = (
            {k: v.clone() for k, v in now.items()}
            if mean is None
            else {k: 0.75 * mean[k] + 0.25 * v for k, v in now.items()}
        )
    for k, v in tokenizer.dvae.state_dict().items():
        torch.testing.assert_close(v, mean[k], atol=1e-6, rtol=1e-5)


def test_more_tokens_than_there_are_cells_are_refused(tmp_path):
    r = recipe_named("tokenizer", "nano", out=str(tmp_path), width=16, vocab_size=20_000, **TINY)

    with pytest.raises(BeitError, match="16384 cells cannot start 20000 codes; .*vocab_size"):
        train_tokenizer(r, quiet=True)
