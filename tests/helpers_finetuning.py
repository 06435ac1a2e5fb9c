"Fine-tunings of moments."

from beit_nb.task_configs import FinetuneRecipe

TINY = dict(
    img_size=16,
    patch_size=4,
    embed_dim=32,
    depth=2,
    num_heads=2,
    drop_path_rate=0.0,
    precision="fp32",
    weight_init="xavier",
    mean_std="beit",
    steps=2,
    batch_size=4,
    warmup_steps=0,
)
PLUS = dict(use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1)  # as BEiT+


def quick(folder, out, **changes):
    "A fine-tuning of moments on photographs."
    fields = dict(data=str(folder), out=str(out), augment="none", mixup=0.0, cutmix=0.0)
    return FinetuneRecipe(**TINY | fields | changes)
