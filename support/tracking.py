"""`--track tensorboard` or `--track wandb`: the run's log in a tracker as well, through Accelerate.

Each number of metrics.jsonl and evals.jsonl goes there under its own name, and some episodes as
text. It is no setting: nothing that is learnt depends on it, and a run may go on with or without.
A step is the number of iterations done. TensorBoard's files are in OUT/tensorboard, those of
Weights & Biases in OUT/wandb.
"""

import dataclasses
import importlib
import json
import math

from config import ConfigError
from support.metrics import format_episode

TRACKERS = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}  # name -> what it imports
EPISODES = 4  # of an iteration that go into the tracker as text


def check_tracker(name):
    """ConfigError where the package that it needs cannot be imported."""
    try:
        importlib.import_module(TRACKERS[name])
    except ImportError as error:
        raise ConfigError(f"--track {name}: pip install {name} ({error})") from None


def start(accelerator, config, first):
    """Open the tracker, if there is one, for iterations from `first` on."""
    if not accelerator.log_with:
        return
    settings = {
        name: value if isinstance(value, bool | int | float | str) else json.dumps(value)
        for name, value in dataclasses.asdict(config).items()
    }
    options = {
        "tensorboard": {"purge_step": first + 1},  # what was logged after the checkpoint
        "wandb": {"name": config.out, "dir": config.out},
    }
    wandb = "wandb" in map(str, accelerator.log_with)
    try:
        accelerator.init_trackers("hiper" if wandb else "tensorboard", settings, options)
    except Exception as error:  # of many kinds: no login, no network
        raise ConfigError(f"the tracker cannot be opened: {error}") from error


def log_iteration(run, metrics, episodes, advantages):
    """An iteration's numbers; where training prints an episode, some episodes as text."""
    if not run.accelerator.trackers:
        return
    done = metrics["iteration"] + 1
    values = {f"train/{name}": value for name, value in numbers(metrics).items()}
    run.accelerator.log(values, step=done)
    if metrics["iteration"] % run.config.save_every == 0:
        texts = [
            format_episode(episode, {name: values[b] for name, values in advantages.raw.items()})
            for b, episode in enumerate(episodes[:EPISODES])
        ]
        log_texts(run.accelerator, texts, done)


def log_evaluation(accelerator, result, done):
    """The numbers of an evaluation after `done` iterations."""
    if accelerator.trackers:
        values = {f"eval/{name}": value for name, value in numbers(result).items()}
        accelerator.log(values, step=done)


def log_texts(accelerator, texts, done):
    """Episodes as text: a table in Weights & Biases, preformatted text elsewhere."""
    for tracker in accelerator.trackers:
        if tracker.name == "wandb":
            rows = [[done, text] for text in texts]
            tracker.log_table("episodes", ["iterations", "episode"], rows, step=done)
        else:
            for n, text in enumerate(texts):
                code = "".join(f"    {line}\n" for line in text.split("\n"))  # Markdown's
                tracker.log({f"episode/{n}": code}, step=done)


def numbers(line, above=""):
    """{"name/inner name": number} of a nested line of the log, finite ones only."""
    found = {}
    for name, value in line.items():
        if isinstance(value, dict):
            found.update(numbers(value, f"{above}{name}/"))
        elif isinstance(value, int | float) and math.isfinite(value):
            found[above + str(name)] = value
    return found
