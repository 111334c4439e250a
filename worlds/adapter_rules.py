"""What the adapters share: another library's observation and info in the words of envs.py.

Facts are looked up in info, then in an observation that is a dict, then in its `metadata`; the
first name that is there counts:

    text        the observation itself, or its text, observation, message, prompt or content;
                else all of its texts as lines `name: text`
    task        task, mission, instruction, goal, question, at the reset; else `play NAME`
    task_type   task_type, else the environment's name
    admissible  admissible, admissible_commands, available_actions, legal_actions, valid_actions;
                else what the adapter knows
    won         won, success, is_success, at the end; else that the episode ended with a reward
                above 0, not by a limit
    score       score; else 1.0 where won, else 0.0
    subgoals, progress     as they are, where they are there

A function of the user's may say otherwise, `"rules": "module:function"` in --env_options:

    def function(observation, info, reward, ended) -> {"task": ..., "won": ..., "text": ...}

What it returns goes before what was found. It may leave out what was found well. `ended` is True
where the task itself ended or a limit ended it. A win on the step at which a limit ends the episode
is reported as terminated.
"""

import importlib

NAMES = {
    "text": ("text", "observation", "message", "prompt", "content"),
    "task": ("task", "mission", "instruction", "goal", "question"),
    "task_type": ("task_type",),
    "admissible": (
        "admissible",
        "admissible_commands",
        "available_actions",
        "legal_actions",
        "valid_actions",
    ),
    "won": ("won", "success", "is_success"),
    "score": ("score",),
    "subgoals": ("subgoals",),
    "progress": ("progress",),
}
SPLITS = ("train", "unseen")
SEEDS = {"train": (0, 10_000), "unseen": (1_000_000, 300)}  # split -> first seed, number of tasks


def size(split, world):
    """Number of tasks in `split`. ValueError for an unknown split."""
    if split not in SEEDS:
        raise ValueError(f"{world} has no split {split!r}: choose {' or '.join(SPLITS)}")
    return SEEDS[split][1]


def seed_of(split, index, world):
    """The seed of task `index`. IndexError where there is none."""
    count = size(split, world)
    if not 0 <= index < count:
        raise IndexError(f"{world}'s split {split!r} has tasks 0 to {count - 1}, not {index}")
    return SEEDS[split][0] + index


def load(path, what):
    """The object that "module:name" names. ValueError where there is none."""
    module, _, name = str(path).partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{what} {path!r} is no module:name that can be had: {error}") from None


def translate(
    observation, info, reward, terminated, truncated, *, task, task_type, admissible, rules=None
):
    """-> (text or None, info of envs.py). The keyword arguments are what holds if nothing says."""
    ended = terminated or truncated
    found = _find(observation, info)
    if rules:
        found.update(rules(observation, info, reward, ended))
    won = bool(found.get("won", terminated and (reward or 0) > 0)) and ended
    translated = {
        "task": str(found.get("task", task)),
        "task_type": str(found.get("task_type", task_type)),
        "admissible": [str(action) for action in found.get("admissible", admissible)],
        "won": won,
        "score": float(found.get("score", won)),
    }
    translated.update({name: found[name] for name in ("subgoals", "progress") if name in found})
    return found.get("text"), translated


def _find(observation, info):
    places = [info]
    if isinstance(observation, dict):
        places += [observation, observation.get("metadata") or {}]
    found = {}
    for meaning, names in NAMES.items():
        for place in places:
            values = [place[name] for name in names if place.get(name) is not None]
            if values and not (meaning == "text" and place is info):
                found.setdefault(meaning, values[0])
    if isinstance(observation, str):
        found["text"] = observation
    elif isinstance(observation, dict) and not isinstance(found.get("text"), str):
        texts = {name: text for name, text in observation.items() if isinstance(text, str)}
        lines = [f"{name}: {text}" for name, text in texts.items()]
        found["text"] = "\n".join(lines) or None
    return found
