"""From the name in `--env` to a world: a module, or another library's env behind an adapter."""

import importlib
import os
import sys

WORLDS = ("household", "alfworld", "webshop", "babyai")
ADAPTERS = {"gym": "worlds.gym_adapter", "openenv": "worlds.openenv_adapter"}


def world(name):
    """The module of world `name`, or what stands for one behind gym:ID or openenv:URL.

    ValueError for a name that is neither known nor importable.
    """
    if os.getcwd() not in sys.path:  # also for what an adapter's options name
        sys.path.append(os.getcwd())
    scheme, colon, rest = name.partition(":")
    if colon and scheme in ADAPTERS:
        return importlib.import_module(ADAPTERS[scheme]).World(rest)
    path = f"worlds.{name}" if name in WORLDS else name
    module = None
    if all(path.split(".")):  # import_module takes "./world.py" for something else
        try:
            module = importlib.import_module(path)
        except ModuleNotFoundError as error:
            if not f"{path}.".startswith(f"{error.name}."):
                raise  # the world is there, a package that it imports is not
    if not all(hasattr(module, needed) for needed in ("make", "size", "SPLITS")):
        raise ValueError(
            f"no world {name!r}: choose {', '.join(WORLDS)}, gym:ID or openenv:URL, or name a "
            "module with SPLITS, size and make"
        )
    return module
