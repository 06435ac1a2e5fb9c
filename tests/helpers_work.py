"What torch counts of a network and of what it does."

from torch.utils.flop_counter import FlopCounterMode


def count(model):
    "All its parameters."
    return sum(p.numel() for p in model.parameters())


def counted(run):
    "FLOP of what `run()` does."
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()
