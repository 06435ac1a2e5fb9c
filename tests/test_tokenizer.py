"The tokenizers: DALL-E's network trained by its recipe, the running mean, and the ids of a whole data set on disk."
import json, os, signal, subprocess, sys, time

import numpy as np
import pytest
import torch
from PIL import Image

from beit_nb.data import open_data
from beit_nb.pretraining import token_table
from beit_nb.loading import TwoViews
from beit_nb.recipes import recipe_named
from beit_nb.tokenizer import load_tokenizer, load_tokens, tokenize, train_tokenizer
from beit_nb.runs import load_checkpoint, read_log

ENV = dict(os.environ, OMP_NUM_THREADS="1")
TINY = dict(batch_size=8, precision="fp32", log_every=1, checkpoint_every=2)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    out = tmp_path_factory.mktemp("tok")
    train_tokenizer(recipe_named("tokenizer", "nano", out=str(out), steps=6, width=16, **TINY), quiet=True)
    return out


def test_dalle_recipe_trains_saves_and_loads(tmp_path):
    "DALL-E's network, likelihood and schedules, only narrower and shorter; stopped, continued, loaded."
    r = recipe_named("tokenizer", "dalle", data="digits", out=str(tmp_path / "a"), img_size=32, width=16, code_dim=8, vocab_size=64, steps=6, lr_steps=4,
                     tau_steps=4, kl_steps=3, ema=.5, lr=1e-3, max_steps=3, **TINY)
    train_tokenizer(r, quiet=True)
    from dataclasses import replace
    stopped = train_tokenizer(replace(r, max_steps=None), quiet=True)
    whole = train_tokenizer(replace(r, max_steps=None, out=str(tmp_path / "b")), quiet=True)
    loaded = load_tokenizer(tmp_path / "a")
    state = load_checkpoint(tmp_path / "a", "tokenizer")
    for name, p in whole.dvae.named_parameters():
        assert torch.equal(p, stopped.dvae.get_parameter(name)) and torch.equal(p, loaded.dvae.get_parameter(name))
    assert any(not torch.equal(state["model"][k], v) for k, v in loaded.dvae.state_dict().items()), "the mean was handed out, not the last weights"
    assert type(loaded.dvae).__name__ == "DalleVAE" and loaded.get_codebook_indices(torch.rand(2, 3, 32, 32)).shape == (2, 4, 4)
    log = [e for e in read_log(tmp_path / "a") if "loss" in e]
    assert [round(e["lr"], 8) for e in log][-1] == pytest.approx(1.25e-6) and log[0]["kl"] >= 0


def test_mean_is_the_mean(tmp_path):
    "Two roads: torch's running mean in the run, and the same mean by hand from checkpoints of every step."
    r = recipe_named("tokenizer", "nano", out=str(tmp_path / "m"), steps=4, width=16, ema=.75, milestone_every=1, keep_checkpoints=9, **TINY | dict(checkpoint_every=1))
    mean = None
    from dataclasses import replace
    for step in range(1, 5):
        tokenizer = train_tokenizer(replace(r, max_steps=step), quiet=True)
        now = load_checkpoint(tmp_path / "m", "tokenizer")["model"]
        mean = {k: v.clone() for k, v in now.items()} if mean is None else {k: .75 * mean[k] + .25 * v for k, v in now.items()}
    for k, v in tokenizer.dvae.state_dict().items(): torch.testing.assert_close(v, mean[k], atol=1e-6, rtol=1e-5)


def test_tokens_on_disk_are_the_tokens(tokenizer, tmp_path):
    told = tokenize("digits", tokenizer, tmp_path / "tokens", per_part=5000)
    ids, d = load_tokens(tmp_path / "tokens")
    table = token_table(load_tokenizer(tokenizer), open_data("digits"), TwoViews(32))
    assert torch.equal(ids.long(), table) and d == told == json.loads((tmp_path / "tokens" / "tokens.json").read_text())
    packed = sum(f.stat().st_size for f in (tmp_path / "tokens").glob("*.npz"))
    assert packed < ids.numel() * 2 / 1.3


def test_tokenize_killed_goes_on(tokenizer, tmp_path):
    "SIGKILL at three moments; no part is ever broken under its name, sound ones are not made twice, and the ids end the same."
    line = [sys.executable, "-m", "beit_nb", "tokenize", "digits", "--tokenizer", str(tokenizer), "--out", str(tmp_path / "t"), "--per-part", "600", "--batch-size", "50"]
    seen = {}
    for n in (1, 6, 12):
        p = subprocess.Popen(line, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.time() + 60
        while len(list((tmp_path / "t").glob("*.npz"))) < n and p.poll() is None and time.time() < end: time.sleep(.01)
        p.send_signal(signal.SIGKILL); p.wait()
        for f in (tmp_path / "t").glob("*.npz"):
            with np.load(f) as part: assert part["ids"].shape == (600, 8, 8)
            assert seen.setdefault(f.name, f.stat().st_mtime_ns) == f.stat().st_mtime_ns
    assert subprocess.run(line, env=ENV, capture_output=True).returncode == 0
    tokenize("digits", tokenizer, tmp_path / "whole")
    assert torch.equal(load_tokens(tmp_path / "t")[0], load_tokens(tmp_path / "whole")[0])


def test_tokenize_folder(tokenizer, tmp_path, monkeypatch):
    "Any pictures, with a damaged one, with loader processes, as two processes that share the parts; the damaged is recorded."
    rng = np.random.default_rng(0)
    for i in range(11):
        (folder := tmp_path / "pics" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (30 + i, 44, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    (tmp_path / "pics" / "a" / "4.png").write_bytes(b"no picture")
    words = dict(per_part=4, img_size=64, token_size=32)
    for rank in ("0", "1"):
        with monkeypatch.context() as m:
            m.setenv("RANK", rank), m.setenv("WORLD_SIZE", "2")
            if rank == "1":
                with pytest.raises(ValueError, match="is missing or damaged"): load_tokens(tmp_path / "t")
            tokenize(str(tmp_path / "pics"), tokenizer, tmp_path / "t", workers=int(rank), **words)
    ids, d = load_tokens(tmp_path / "t")
    assert ids.shape == (11, 8, 8) and d["pictures"] == 11 and "Lanczos" in d["transform"]
    lost = np.concatenate([np.load(f)["damaged"] for f in sorted((tmp_path / "t").glob("*.npz"))])
    files = open_data(str(tmp_path / "pics")).files
    assert [files[i].name for i in lost] == ["4.png"]


def test_tokenize_refuses(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="there is no tokenizer at"): tokenize("digits", tmp_path / "none", tmp_path / "t")
    with pytest.raises(ValueError, match="no data at"): tokenize(str(tmp_path / "nowhere"), tokenizer, tmp_path / "t")
    with pytest.raises(ValueError, match="token_size 30 does not divide"): tokenize("digits", tokenizer, tmp_path / "t", token_size=30)
    with pytest.raises(ValueError, match="there are no tokens at"): load_tokens(tmp_path / "t")
