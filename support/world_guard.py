"""What a running world may answer. What breaks this costs its episode, not the run (envs.EnvPool).

Here is only what the trainer cannot work with; `python -m envs WORLD` checks the whole interface.
"""

import math
import traceback
from numbers import Real

from support.metrics import printable

PARTS = {
    "reset": ("observation", "info"),
    "step": ("observation", "reward", "terminated", "truncated", "info"),
}
LARGEST = 1e6  # of rewards and scores; winning pays 1


class WorldError(RuntimeError):
    """An episode failed, began anew and failed again; the text names world, task and reason."""


def sift(method, answers, steps, works):
    """-> ({slot: answer}, {slot: what is wrong with the others, a sentence}).

    answers: {slot: what reset, step or expert returned, or the exception that it raised}; steps:
    {slot: steps of its episode so far}; works: whether the world has answered a step before.
    Exceptions of an expert, and those of a world that has never worked, are raised.
    """
    good, faults = {}, {}
    for slot, answer in answers.items():
        if isinstance(answer, BaseException):
            if method == "expert" or not works:
                raise answer
            fault = getattr(answer, "described", None) or describe(answer)
        else:
            fault = None if method == "expert" else find_fault(method, answer)
        if fault:
            turn = f"turn {steps[slot] + 1}" if method == "step" else method
            faults[slot] = printable(f"at {turn}: {fault}")  # it may quote the world's text
        else:
            good[slot] = replace_surrogates(answer)
    return good, faults


def find_fault(method, answer):
    """What is wrong with the answer of reset or step; None for nothing."""
    parts = PARTS[method]
    if not isinstance(answer, tuple | list) or len(answer) != len(parts):
        return f"{method} must return ({', '.join(parts)}), not {_short(answer)}"
    values = dict(zip(parts, answer, strict=True))
    if not isinstance(values["observation"], str):
        return f"the observation must be text, not {_short(values['observation'])}"
    info = values["info"]
    if not isinstance(info, dict):
        return f"info must be a dict, not {_short(info)}"
    for key in ("task", "task_type"):
        if not isinstance(info.get(key), str):
            return f"info[{key!r}] must be text, not {_short(info.get(key))}"
    texts = info.get("admissible")
    if not isinstance(texts, tuple | list) or not all(isinstance(text, str) for text in texts):
        return f"info['admissible'] must be a list of texts, not {_short(texts)}"
    numbers = {"info['score']": info.get("score")}
    flags = {"info['won']": info.get("won")}
    if "progress" in info:
        numbers["info['progress']"] = info["progress"]
    if method == "step":
        numbers["the reward"] = values["reward"]
        flags.update({name: values[name] for name in ("terminated", "truncated")})
    for name, value in numbers.items():
        if not isinstance(value, Real) or not math.isfinite(value) or abs(value) > LARGEST:
            return f"{name} must be a number from -1e6 to 1e6, not {_short(value)}"
    for name, value in flags.items():
        if type(value).__name__ not in ("bool", "bool_"):  # Python's and numpy's
            return f"{name} must be True or False, not {_short(value)}"
    return None


def _short(value):
    text = repr(value)
    return text if len(text) < 80 else f"{text[:77]}..."


def describe(error):
    """An exception in one line, with the place in the source where it was raised."""
    text = " ".join(str(error).split())
    place = traceback.extract_tb(error.__traceback__)[-1:]
    if isinstance(error, SyntaxError) or not place:
        return f"{type(error).__name__}: {text}"
    return f"{type(error).__name__}: {text} ({place[0].filename}, line {place[0].lineno})"


def replace_surrogates(value):
    """The value with `?` for each half of a surrogate pair in its texts, which no encoder takes."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if type(value) in (tuple, list):
        return type(value)([replace_surrogates(part) for part in value])
    if isinstance(value, dict):
        return {key: replace_surrogates(part) for key, part in value.items()}
    return value
