"""ALFWorld (text): household tasks of six types, played through TextWorld's PDDL engine.

    env = make("valid_seen", 0)
    observation, info = env.reset()
    observation, reward, terminated, truncated, info = env.step("go to desk 1")

observation  str: the room at reset, later the engine's feedback. The task is in `info`, not here.
             With `page=True`: one page of all that was seen so far (alfworld_page.py).
reward       1.0 on the step that wins, else 0.0.
terminated   the goal is reached (`info["won"]`); a game cannot be lost.
truncated    `max_steps` steps were taken without winning.
info         task (str, what follows "Your task is to: "), task_type (str, one of TASK_TYPES),
             admissible (list of str), won (bool), score (float, 0 or 1), gamefile (str), subgoals
             (list of str, the subgoals that can be pursued now). All seven at every turn, in new
             objects.

An action must equal an admissible one, spaces around it apart. Any other costs a step and answers
"Nothing happens."; `help` lists the commands, as in the game.

Data:    $ALFWORLD_DATA, or ~/.cache/alfworld, as `alfworld-download` leaves it. The engine
         evaluates the expressions of a game's grammar: load only files that you trust.
Package: textworld[pddl] (requirements-alfworld.txt), imported at the first reset. The alfworld
         package is not needed.

Differences from alfworld's own AlfredTWEnv:
 1. A split is a sorted list of games, one env per game, instead of a shuffled endless stream.
 2. The observation has neither the title line nor the task sentence. "help" is not admissible.
 3. `won` and the step limit are separate. `gamefile` is present at every step, not only at reset.
 4. The expert uses the game's stored walkthrough instead of a planner, which takes minutes on some
    games.
 5. The engine has caches (alfworld_engine.py). The text is the same.
"""

import functools
import json
import os
import re
from pathlib import Path

from worlds import alfworld_engine
from worlds.alfworld_expert import Expert, natural_order, parse_action
from worlds.alfworld_expert import disguise as disguise  # part of the world's interface
from worlds.alfworld_page import NOTHING, Page

SPLITS = ("train", "valid_seen", "valid_unseen")
# The engine crashes in threads. Several envs of one process may be stepped one after the other.
IN_PROCESS = False
MAX_STEPS = 50
# Options of `make` for a tiny agent trained from scratch.
TINY_AGENT = {"page": True}
# Keyword arguments of support.demonstrations for this world.
DEMONSTRATOR = {
    "tasks": 200,
    "random_subgoals": 0.7,
    "action_noise": 0.1,
    "wrong_actions": 0.1,
    "disguises": 1,
}

TASK_TYPES = (
    "pick_and_place_simple",
    "look_at_obj_in_light",
    "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_cool_then_place_in_recep",
    "pick_two_obj_and_place",
)
TITLE = "-= Welcome to TextWorld, ALFRED! =-"
TASK_PREFIX = "Your task is to: "
SOLVABLE = re.compile(rb'"solvable":\s*true')  # much cheaper than parsing 3500 files of 80 kB


def size(split):
    """Number of playable games of a split. Errors: see `games`."""
    return len(games(split))


def make(split="train", index=0, max_steps=MAX_STEPS, page=False):
    """The env of game `index`, 0 <= index < size(split); the same game each time.

    IndexError: there is no such game. Others: see `games` and `AlfworldEnv`.
    """
    files = games(split)
    if not 0 <= index < len(files):
        raise IndexError(f"index {index} is outside split {split!r}, which has {len(files)} games")
    return AlfworldEnv(files[index], max_steps, page=page)


def games(split):
    """Sorted paths of the solvable games of the six task types: a tuple of str.

    ValueError: unknown split. RuntimeError: the data folder or its games are missing.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown ALFWorld split {split!r}: choose one of {', '.join(SPLITS)}")
    data = os.environ.get("ALFWORLD_DATA")
    folder = Path(data or "~/.cache/alfworld").expanduser() / "json_2.1.1" / split
    if not folder.is_dir():
        reason = "" if data else "ALFWORLD_DATA is not set and "
        raise RuntimeError(
            f"{reason}there is no folder {folder}: download the data with `alfworld-download`, "
            "then set ALFWORLD_DATA to the folder that holds json_2.1.1"
        )
    return _scan(folder)


@functools.cache
def _scan(folder):
    """The playable games of one split. Takes seconds for the 3553 training games, hence cached."""
    found = sorted(map(str, folder.rglob("game.tw-pddl")))
    playable = tuple(file for file in found if _is_playable(file))
    if not playable:
        raise RuntimeError(
            f"0 playable games in {folder}, which holds {len(found)} game.tw-pddl files: "
            "complete the data with `alfworld-download`"
        )
    return playable


def _is_playable(gamefile):
    """The text games have no slicing and no movable receptacles, the seventh task type."""
    if task_type(gamefile) not in TASK_TYPES or "Sliced" in Path(gamefile).parts[-3]:
        return False
    return SOLVABLE.search(Path(gamefile).read_bytes()) is not None


def task_type(gamefile):
    """The task type from the path <task type>-<object>-.../<trial>/game.tw-pddl."""
    return Path(gamefile).parts[-3].split("-")[0]


class AlfworldEnv:
    """One game; Gymnasium's signatures.

    gamefile   path of a game.tw-pddl
    max_steps  step limit, after which the episode is truncated
    page       whether the observation is the page of all that was seen so far

    RuntimeError: the game is not solvable or of the older release; at the first reset, textworld
    cannot be used.
    """

    def __init__(self, gamefile, max_steps=MAX_STEPS, page=False):
        self.gamefile = str(gamefile)
        self.max_steps = max_steps
        self.page = page
        self._engine = None
        self._steps = None  # None where no episode is running
        self._game = json.loads(Path(gamefile).read_text(encoding="utf-8"))
        self._expert = Expert(self.gamefile, self._game.get("walkthrough") or ())
        if not self._game.get("solvable"):
            raise RuntimeError(
                f"{gamefile} is not marked solvable: winning it may be impossible, "
                "so it is not played"
            )
        if '"move {o} to {r}"' not in self._game["grammar"]:
            raise RuntimeError(
                f"{gamefile} is of the older data release (`put X in/on Y`, today `move X to Y`): "
                "update the data with alfworld 0.4 or newer, `alfworld-download -f`"
            )

    def reset(self, seed=None):
        """Start the game -> (observation, info). `seed` is ignored: nothing in a game is random."""
        if self._engine is None:
            self._engine = alfworld_engine.load(self._game)
        state = alfworld_engine.reset(self._engine)
        self._steps = 0
        room, _, task = state.feedback.partition(TASK_PREFIX)
        self._task = task.strip()
        self._page = Page(_places(state.admissible_commands), task)
        self._expert.reset(self._page)
        observation = room.replace(TITLE, "").strip()
        return self._observe(observation), self._info(state)

    def step(self, action):
        """Play one action -> (observation, reward, terminated, truncated, info).

        RuntimeError: no episode is running, because reset was not called since the last one ended.
        """
        if self._steps is None:
            raise RuntimeError("no episode is running: call reset() before step()")
        state, _, _ = self._engine.step(action)
        won = bool(state.won)
        feedback = state.feedback.strip()
        verb, thing, place = parse_action(action.strip())
        self._page.update(verb, thing, place, feedback)
        if feedback != NOTHING:
            self._expert.update(verb, thing, place)
        self._steps += 1
        truncated = not won and self._steps >= self.max_steps
        if won or truncated:
            self._steps = None
        return self._observe(feedback), float(won), won, truncated, self._info(state)

    def close(self):
        """End the episode and release the engine. A later reset starts over."""
        if self._engine is not None:
            alfworld_engine.release(self._engine)
        self._engine = None
        self._steps = None

    def expert(self, subgoal):
        """The scripted expert's decision under `subgoal` -> (switch, subgoal, action).

        None where it has no advice or no episode runs; see alfworld_expert.Expert.
        """
        if self._steps is None:
            return None
        return self._expert.advise(subgoal, self._admissible)

    def _observe(self, feedback):
        return str(self._page) if self.page else feedback

    def _info(self, state):
        self._admissible = [a for a in state.admissible_commands if a != "help"]
        return {
            "task": self._task,
            "task_type": task_type(self.gamefile),
            "admissible": list(self._admissible),
            "subgoals": self._expert.subgoals(),
            "won": bool(state.won),
            "score": float(state.won),
            "gamefile": self.gamefile,
        }


def _places(commands):
    """The places that the commands "go to ..." name, in natural order."""
    go_to = "go to "
    reachable = [c.removeprefix(go_to) for c in commands if c.startswith(go_to)]
    return sorted(reachable, key=natural_order)


if __name__ == "__main__":
    from support import play

    raise SystemExit(play.main("alfworld"))
