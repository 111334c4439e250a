"""ALFWorld (text): six kinds of household task, played through TextWorld's PDDL engine.

    env = make("valid_seen", 0)
    observation, info = env.reset()
    observation, reward, terminated, truncated, info = env.step("go to desk 1")

observation  str: the room at reset, later the engine's feedback. The task is in `info`, not here.
reward       1.0 on the step that wins, else 0.0.
terminated   the goal is reached (`info["won"]`); a game cannot be lost.
truncated    `max_steps` steps were taken without winning.
info         task (str, what follows "Your task is to: "), task_type (str, one of TASK_TYPES), admissible (list[str]),
             won (bool), score (float, 0 or 1), gamefile (str), subgoals (list[str], what one could set out to do),
             page (str, all that was seen so far in a line). All eight at every turn, in new objects.

An action must equal an admissible one; any other answers "Nothing happens." and costs a step.

Data:    $ALFWORLD_DATA, or ~/.cache/alfworld, as `alfworld-download` leaves it. The engine evaluates the expressions of
         a game's grammar: load only files you trust.
Package: textworld[pddl] (requirements-alfworld.txt), imported at the first reset. The alfworld package is not needed.

Differences from alfworld's own AlfredTWEnv:
 1. A split is a sorted list of games, one env per game, in place of a shuffled endless stream.
 2. The observation has neither the title line nor the task sentence; "help" is not among the admissible actions.
 3. `won` and the step limit are told apart, and `gamefile` is present at every step, not at reset only.
 4. The expert has its knowledge from the game's stored walkthrough: no planner (minutes on some games).
 5. The engine remembers what it has translated, parsed and worded: per core about 20 times the steps per second, and resets
    in 0.05 to 0.2 s instead of 1 to 2.5 (benchmarks/alfworld.py), with the same text throughout.
"""

import contextlib
import copy
import functools
import json
import os
import pickle
import re
import sys
import zlib
from collections import Counter
from pathlib import Path

from worlds.alfworld_expert import Demonstrator, disguise, natural, parts  # noqa: F401, disguise: for cloning
from worlds.alfworld_page import NOTHING, Page

IN_PROCESS = (
    False  # The engine crashes in threads. Several envs of one process, stepped in turn, get along.
)
SPLITS = ("train", "valid_seen", "valid_unseen")
TASK_TYPES = (
    "pick_and_place_simple",
    "look_at_obj_in_light",
    "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_cool_then_place_in_recep",
    "pick_two_obj_and_place",
)

TITLE, TASK = "-= Welcome to TextWorld, ALFRED! =-", "Your task is to: "
GAMES, SENTENCES, FACTS = (
    512,
    512,
    20_000,
)  # how much the engine remembers, about 60 MB: see _engine_class
SOLVABLE = re.compile(rb'"solvable":\s*true')  # much cheaper than parsing some thousand 80 kB files

# Engines of closed envs, waiting for another game. Each new one maps its own copy of the planner's library, which is
# never freed (about 2.5 MB) and crashes when unloaded by force; one that loads game after game does not grow.
_idle = []


def size(split):
    """Number of playable games of a split. Errors: see `games`."""
    return len(games(split))


def make(split="train", index=0, max_steps=50):
    """The env of game `index`, 0 <= index < size(split); the same game each time.

    IndexError: there is no such game. Others: see `games` and `AlfworldEnv`."""
    files = games(split)
    if not 0 <= index < len(files):
        raise IndexError(f"index {index} is outside split {split!r}, which has {len(files)} games")
    return AlfworldEnv(files[index], max_steps)


def games(split):
    """Sorted paths of the solvable games of the six task types: a tuple of str.

    ValueError: unknown split. RuntimeError: the data folder or its games are missing."""
    if split not in SPLITS:
        raise ValueError(f"unknown ALFWorld split {split!r}: choose one of {', '.join(SPLITS)}")
    named = os.environ.get("ALFWORLD_DATA")
    data = Path(named or "~/.cache/alfworld").expanduser()
    folder = data / "json_2.1.1" / split
    if not folder.is_dir():
        why = "" if named else "ALFWORLD_DATA is not set and "
        raise RuntimeError(
            f"{why}there is no folder {folder}: download the data with `alfworld-download`, then set "
            "ALFWORLD_DATA to the folder that holds json_2.1.1"
        )
    return _scan(folder)


@functools.lru_cache(maxsize=None)
def _scan(folder):
    """The playable games below `folder`, one split. Seconds for the 3553 training games, so once per process."""
    found = sorted(map(str, folder.rglob("game.tw-pddl")))
    playable = tuple(
        file
        for file in found
        if task_type(file) in TASK_TYPES  # the seventh type moves receptacles,
        and "Sliced" not in Path(file).parts[-3]  # which like slicing the text games lack
        and SOLVABLE.search(Path(file).read_bytes())
    )
    if not playable:
        raise RuntimeError(
            f"0 playable games in {folder}, which holds {len(found)} game.tw-pddl files: "
            "complete the data with `alfworld-download`"
        )
    return playable


def task_type(gamefile):
    """The task type, one of TASK_TYPES for a playable game: <task type>-<object>-.../<trial>/game.tw-pddl."""
    return Path(gamefile).parts[-3].split("-")[0]


def names(ids):
    """PDDL identifiers to the names that players read: {"mug_bar__plus_00_dot_1": "mug 1", "agent1": "agent1", ...}.

    An identifier is a kind and a position, joined by "_bar_". Objects of a kind are numbered from 1, the last
    identifier in sorted order first, as alfworld does without domain randomization. A basin is not its sink."""
    seen, named = Counter(), {}
    for identifier in sorted(ids, reverse=True):
        kind, bar, _ = identifier.partition("_bar_")
        if bar:
            kind += "basin" * ("basin" in identifier)
            seen[kind] += 1
        named[identifier] = f"{kind} {seen[kind]}" if bar else kind
    return named


class AlfworldEnv:
    """One game; Gymnasium's signatures.

    gamefile   path of a game.tw-pddl
    max_steps  step limit, after which the episode is truncated

    RuntimeError: the game is not solvable or of the older release; at the first reset, textworld cannot be used."""

    def __init__(self, gamefile, max_steps=50):
        self.gamefile, self.max_steps = str(gamefile), max_steps
        self._game = json.loads(Path(gamefile).read_text(encoding="utf-8"))
        self._engine, self._steps = None, None  # _steps is None where no episode is running
        self._demonstrator = Demonstrator(self.gamefile, self._game.get("walkthrough") or ())
        if not self._game.get("solvable"):
            raise RuntimeError(
                f"{gamefile} is not marked solvable: winning it may be impossible, so it is not played"
            )
        if '"move {o} to {r}"' not in self._game["grammar"]:
            raise RuntimeError(
                f"{gamefile} is of the older data release (`put X in/on Y`, today `move X to Y`): "
                "update the data with alfworld 0.4 or newer, `alfworld-download -f`"
            )

    def reset(self, seed=None):
        """Begin the game: (observation, info). `seed` is accepted and ignored, nothing in a game is random."""
        with _argv_kept():
            if self._engine is None:
                engine = _idle.pop() if _idle else _new_engine()
                engine.load(self._game)
                for identifier, name in names(engine._entity_infos).items():
                    engine._entity_infos[identifier].name = name
                self._engine = engine
            state = self._engine.reset()
        self._steps = 0
        places = sorted(
            (a.removeprefix("go to ") for a in state.admissible_commands if a.startswith("go to ")),
            key=natural,
        )
        room, _, task = state.feedback.partition(TASK)
        self._task, self._page = task.strip(), Page(places, task)
        self._demonstrator.reset(self._page)
        return room.replace(TITLE, "").strip(), self._info(state)

    def step(self, action):
        """Play one action: (observation, reward, terminated, truncated, info).

        RuntimeError: no episode is running, because reset was not called, or not since the last one ended."""
        if self._steps is None:
            raise RuntimeError("no episode is running: call reset() before step()")
        state, _, _ = self._engine.step(action)
        won, observation = bool(state.won), state.feedback.strip()
        did = parts(action.strip())
        self._page.follow(*did, observation)
        if observation != NOTHING:
            self._demonstrator.follow(*did)
        self._steps += 1
        truncated = not won and self._steps >= self.max_steps
        if won or truncated:
            self._steps = None
        return observation, float(won), won, truncated, self._info(state)

    def close(self):
        """End the episode and lend the engine to the next env of this process. A later reset starts over."""
        if self._engine is not None:
            _idle.append(self._engine)
        self._engine, self._steps = None, None

    def expert(self, subgoal):
        """What a demonstrator does now who carries `subgoal`: (switch, subgoal, action), or None where he cannot say; see Demonstrator."""
        return None if self._steps is None else self._demonstrator.advise(subgoal, self._admissible)

    def _info(self, state):
        self._admissible = [a for a in state.admissible_commands if a != "help"]
        return {
            "task": self._task,
            "task_type": task_type(self.gamefile),
            "admissible": list(self._admissible),
            "subgoals": self._demonstrator.subgoals(),
            "page": str(self._page),
            "won": bool(state.won),
            "score": float(state.won),
            "gamefile": self.gamefile,
        }


def _new_engine():
    if sys.version_info >= (
        3,
        13,
    ):  # it installs, but its grammar writes to locals(), a mere copy since 3.13
        raise RuntimeError(
            "ALFWorld's engine, textworld, fails on Python 3.13 and newer: use Python 3.10 to 3.12"
        )
    try:
        from textworld import EnvInfos

        return _engine_class()(EnvInfos(won=True, admissible_commands=True))
    except (
        ImportError,
        OSError,
        RuntimeError,
    ) as error:  # the last two: its native library did not build
        raise RuntimeError(
            f"ALFWorld needs textworld with its PDDL engine ({error}): "
            "pip install -r requirements-alfworld.txt"
        ) from error


@functools.lru_cache(maxsize=None)
def _engine_class():
    """Textworld's engine, which here remembers what it otherwise derives anew from the same texts at every reset and step.

    Of the last GAMES games of this process the translated problem; of the grammar's last SENTENCES expressions how they parse;
    of the game in play each command's words. What it says stays the same, which tests/test_alfworld.py compares."""
    import fast_downward
    import mementos.core
    from textworld.envs.pddl import PddlEnv, textgen

    pddl2sas = fast_downward.pddl2sas
    translate = functools.lru_cache(GAMES)(
        lambda *game: zlib.compress(pickle.dumps(pddl2sas(*game)), 1)
    )  # 1 MB in 60 kB
    parse = functools.lru_cache(SENTENCES)(textgen._parse_and_convert)
    memories = (  # where the engine looks a function up, its name there, and what stands there while the engine works
        (
            fast_downward,
            "pddl2sas",
            lambda domain, problem, verbose=False, optimize=False: (
                (None, "")
                if optimize
                else pickle.loads(zlib.decompress(translate(domain, problem)))
            ),
        ),  # optimized: for a planner
        (
            textgen,
            "_parse_and_convert",
            lambda *text, **how: copy.deepcopy(parse(*text, **how)),
        ),  # it writes into the symbols
        (
            textgen.Rule,
            "parse_conjunctive_query",
            functools.lru_cache(SENTENCES)(textgen.Rule.parse_conjunctive_query),
        ),
    )

    def remembering(method):
        @functools.wraps(method)
        def wrapped(*args):
            with contextlib.ExitStack() as stack:
                for place, name, memory in memories:
                    stack.callback(setattr, place, name, vars(place)[name])
                    setattr(place, name, memory)
                return method(*args)

        return wrapped

    class Engine(PddlEnv):
        reset, step = remembering(PddlEnv.reset), remembering(PddlEnv.step)

        def __init__(self, infos):
            super().__init__(infos)
            self.downward_lib.load_sas_replan = lambda sas: None  # for the planner: see above

        @remembering
        def load(self, game):
            facts = getattr(mementos.core, "_memento_cache", {})
            if (
                len(facts) > FACTS
            ):  # textworld keeps every fact of every game, 1.6 MB a game; equal ones may be made anew
                facts.clear()
            PddlEnv.load(self, game)
            self._commands = {}  # template and the identifiers in it -> words, which depend on nothing that changes

        def _gather_infos(self):
            """PddlEnv's, less what is not read here; a command is rendered when it is first admissible."""
            actions = list(self._pddl_state.all_applicable_actions())
            commands = list(map(self._command, actions))
            self.state.update(
                won=self._pddl_state.check_goal(),
                lost=False,
                _valid_actions=actions,
                _valid_commands=commands,
                admissible_commands=sorted(set(commands)),
            )

        def _command(self, action):
            template, mapping = action.command_template, action.mapping
            words = re.findall(r"\w+", template)
            key = template, *(of.name for kind, of in mapping.items() if kind.name in words)
            if key not in self._commands:
                variables = {kind.name: self._entity_infos[of.name] for kind, of in mapping.items()}
                text = self._logic.grammar.derive(
                    template,
                    {
                        "state": self._pddl_state,
                        "facts": [],
                        "variables": variables,
                        "mapping": mapping,
                        "entity_infos": self._entity_infos,
                    },
                )
                self._commands[key] = text.format(
                    **{k: info.name for k, info in self._entity_infos.items()}
                )
            return self._commands[key]

    return Engine


@contextlib.contextmanager
def _argv_kept():
    """The PDDL translator overwrites sys.argv; give it back."""
    argv = sys.argv
    try:
        yield
    finally:
        sys.argv = argv
