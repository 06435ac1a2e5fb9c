"How far a run in another process is, and how to hold it there."

import time

from beit_nb.engine import training
from beit_nb.engine.log import read_log


def step_of(out):
    "The last step that the log of a run tells of."
    return max((row["step"] for row in read_log(out)), default=0)


def slowed_after(step, seconds=0.2):
    "A life that crawls after that step, so that it cannot end before it is killed."

    def slow_down():
        train_step = training.train_step

        def crawl(trainer, *args):
            if trainer.step >= step:
                time.sleep(seconds)
            return train_step(trainer, *args)

        training.train_step = crawl

    return slow_down
