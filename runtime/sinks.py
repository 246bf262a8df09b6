"""Where people already look: the rows of metrics.jsonl and samples.jsonl, and the configuration, in TensorBoard and in
Weights & Biases too (--log-to). Both packages are optional, and imported only where they are asked for.

A resumed run gives a sink again what the two files hold by then, so that neither lacks a row nor has one twice:
TensorBoard's files are written anew, in wandb it is a new run.
"""

import importlib.util
import json
import os

from files.errors import BadInput, brief
from runtime.disk import remove
from runtime.metrics import rows_of


def check(names):
    """Raises BadInput where a package of --log-to is not installed; imports none."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise BadInput(f"--log-to {name}: the package is not installed; pip install {name}, or leave it out")


class TensorBoard:
    """Scalars and texts in OUT/tensorboard, a folder a stage: it draws guide and policy on the same axes."""

    def __init__(self, out, settings):
        from torch.utils.tensorboard import SummaryWriter

        self.open, self.place, self.settings, self.stages = SummaryWriter, f"{out}/tensorboard", settings, {}

    def write(self, row):
        if not self.stages:
            remove(self.place)
        if row["stage"] not in self.stages:
            writer = self.stages[row["stage"]] = self.open(os.path.join(self.place, row["stage"]))
            text = json.dumps(self.settings, indent=1)
            writer.add_text("configuration", "    " + text.replace("\n", "\n    "))  # Markdown's form of code
        writer = self.stages[row["stage"]]
        for name, value in named(row).items():
            if isinstance(value, str):
                writer.add_text(name, value, row["step"])
            else:
                writer.add_scalar(name, value, row["step"])

    def close(self):
        for writer in self.stages.values():
            writer.close()


class Wandb:
    """A run of wandb, its files in OUT/wandb; WANDB_MODE, WANDB_PROJECT and the like are wandb's own."""

    def __init__(self, out, settings):
        import wandb

        project = os.environ.get("WANDB_PROJECT", "tgdpo")
        self.run = wandb.init(project=project, name=os.path.basename(out), dir=out, config=settings)
        self.stages = set()

    def write(self, row):
        stage = row["stage"]
        if stage not in self.stages:
            self.stages.add(stage)
            self.run.define_metric(f"{stage}/step")
            self.run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        figures = {f"{stage}/{name}": value for name, value in named(row).items()}
        self.run.log(figures | {f"{stage}/step": row["step"]})

    def close(self):
        self.run.finish()


KINDS = {"tensorboard": TensorBoard, "wandb": Wandb}


def named(row):
    """The figures of a row (or the text of a sample) under the names that the sinks show; null is left out."""
    if "answer" in row:
        return {f"samples/{row['sample']}": f"{row['prompt']}\n\n{row['answer']}"}
    kind = "eval" if row.get("eval") else "train"
    return {
        f"{kind}/{name}": value
        for name, value in row.items()
        if name not in ("stage", "step", "eval") and value is not None
    }


class Sinks:
    """What --log-to names. Only rank 0 opens it."""

    def __init__(self, out, names):
        self.out, self.names, self.sinks, self.begun = out, names, [], False
        self.files = [os.path.join(out, name) for name in ("metrics.jsonl", "samples.jsonl")]

    def open(self, settings):
        """settings: the options, {name: value}. Does nothing the second time. Raises BadInput where a package does not
        begin."""
        for name in self.names[len(self.sinks) :]:
            try:
                self.sinks.append(KINDS[name](self.out, settings))
            except Exception as error:
                raise BadInput(f"--log-to {name}: {brief(error)}; mend that, or leave it out") from error

    def write(self, row):
        """A row that was just appended to one of the files. With the first, all go that stand there."""
        rows = [row] if self.begun or not self.sinks else [row for path in self.files for row in rows_of(path)]
        self.begun = True
        for sink in self.sinks:
            for one in rows:
                sink.write(one)

    def close(self):
        for sink in self.sinks:
            sink.close()
