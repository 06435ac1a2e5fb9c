"""A training of its own: this module and one entry in COMMANDS are all that it takes.

It learns how bright a picture is. `tests/test_cli.py` registers it and looks for it everywhere.
"""

from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch.nn.functional as F
from torch import nn

from beit_nb.configs import Run
from beit_nb.data import open_data
from beit_nb.engine.augment import TwoViews
from beit_nb.engine.loading import TrainLoader
from beit_nb.engine.log import write_metrics
from beit_nb.engine.runs import open_run
from beit_nb.engine.token_files import token_views
from beit_nb.engine.training import Trainer, fit
from beit_nb.images import to_float
from beit_nb.limits import Count
from beit_nb.recipes import Command


@dataclass
class ToyRecipe(Run):
    "How a line learns to tell how bright a picture is."

    img_size: Count = 16  # pixels a side
    hidden: Count = 4  # numbers between picture and answer

    def conflicts(self):
        yield from Run.conflicts(self)
        if self.hidden > self.img_size:
            yield f"hidden {self.hidden} is above img_size {self.img_size}: lower it"


def brightness_loss(model, batch, step):
    images = to_float(batch.image)
    target = images.mean((1, 2, 3))
    error = F.mse_loss(model(images)[:, 0], target)
    return error, {"toy_error": error.detach().sqrt()}


def train(recipe, quiet=False):
    with open_run("toy", recipe, recipe.resume) as out:
        samples = token_views(open_data(recipe.data), TwoViews(recipe.img_size))
        length = recipe.length(len(samples))
        pixels = 3 * recipe.img_size**2
        layers = [nn.Flatten(), nn.Linear(pixels, recipe.hidden), nn.Linear(recipe.hidden, 1)]
        trainer = Trainer("toy", recipe, out, nn.Sequential(*layers), length, quiet=quiet)
        fit(trainer, TrainLoader(samples, recipe, trainer.micro_batch_size), brightness_loss)
        return write_metrics(out, {"steps": trainer.step}, trainer.finished)


def pictures(out, recipe, metrics):
    fig, ax = plt.subplots()
    ax.bar(["hidden"], [recipe.hidden])
    return [(fig, "The toy's only number.")]


COMMAND = Command(
    ToyRecipe,
    {"tiny": ("four steps on the digits", ToyRecipe(steps=4, batch_size=8, log_every=2))},
    run="toy_command:train",
    help="how bright is a picture?",
    shown=("loss", "toy_error"),
    curves={"loss": "loss", "toy_error": "typical error of the toy"},
    cards={"toy_error": ("{:.2f}", "typical error")},
    pictures="toy_command:pictures",
)
