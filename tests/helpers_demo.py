"A demo of a few seconds: every stage of `beit demo --quick`, with small networks and few steps."

from multiprocessing import forkserver

from beit_nb import demo
from beit_nb.cli import main

STEPS = dict(tokenizer_steps=12, pretrain_steps=12, finetune_steps=4, draws=1)
BODY = dict(embed_dim=32, depth=2, num_heads=2)
SMALLER = {"tokenizer": dict(width=16), "pretrain": BODY, "finetune": BODY}


def small_demo(out, **steps):
    "The command, in this process, which serves for nothing else afterwards; its exit status."
    # A forked process inherits the knowledge of a fork server that is its parent's child, not its.
    forkserver._forkserver.__init__()
    digits_recipe = demo.digits_recipe

    def smaller(command, **changes):
        return digits_recipe(command, **SMALLER.get(command, {}) | changes)

    demo.digits_recipe = smaller
    demo.QUICK.update(STEPS | steps)
    return main(["demo", "--quick", "--out", str(out)])
