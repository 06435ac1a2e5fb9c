"""A demo of a few seconds: every stage of `beit demo --quick`, with small networks and few steps.

And what a stage leaves, without any work.
"""

from helpers import unpainted

from beit_nb import demo, demo_stages
from beit_nb.cli import main
from beit_nb.demo_stages import ARMS, stage

STEPS = dict(tokenizer_steps=12, pretrain_steps=12, finetune_steps=4, draws=1)
BODY = dict(embed_dim=32, depth=2, num_heads=2)
SMALLER = {"tokenizer": dict(width=16), "pretrain": BODY}


def small_demo(out, **steps):
    "The command, in this process, which serves for nothing else afterwards; its exit status."
    digits_recipe = demo.digits_recipe
    arm_fields = demo.arm_fields

    def smaller(command, **changes):
        return digits_recipe(command, **SMALLER.get(command, {}) | changes)

    demo.digits_recipe = smaller
    own = BODY | {"log_every": 1}  # a row is a mean since the last one, which a kill may cut in two
    demo.arm_fields = lambda plan: {arm: x | own for arm, x in arm_fields(plan).items()}
    demo_stages.QUICK.update(STEPS | steps)
    with unpainted():
        return main(["demo", "--quick", "--out", str(out)])


ARM = {"mean": 0.5, "std": 0.1, "lr": 0.1, "steps": 9, "runs": [0.5], "curves": [[[9, 0.5]]]}
PROBED = {"mean": 0.5, "std": 0.1, "layer": 1, "layers": [0.5, 0.4]}
STAGE_FIGURES = {
    "dvae": dict(seconds=1, mse=0.1, pixel_variance=0.2, perplexity=9, codes_used=9),
    "mim": dict(seconds=1, masked_top1=0.5, best_constant_top1=0.4, images=99),
    "finetune": dict(seconds=1, labels_per_class=9, steps=9, peak_mb=99) | dict.fromkeys(ARMS, ARM),
    "probe": dict(seconds=1, labels=9, pretrained=0.5, random=0.5, pixels=0.5)
    | {"spread": dict.fromkeys(("pretrained", "random", "pixels"), PROBED)},
}


def count_calls(plan, name="think"):
    "Ask for a stage; its figures, and whether it had to work for them."
    calls = []

    def work(plan):
        calls.append(plan)
        return {"answer": 42}

    return stage(plan, name, work), len(calls)
