"""ALFWorld (text): six kinds of household task, played through TextWorld's PDDL engine.

    env = make("valid_seen", 0)
    observation, info = env.reset()
    observation, reward, terminated, truncated, info = env.step("go to desk 1")

observation  str: the room at reset, later the engine's feedback. The task is in `info`, not here.
reward       1.0 on the step that wins, else 0.0.
terminated   the goal is reached (`info["won"]`); a game cannot be lost.
truncated    `max_steps` steps were taken without winning.
info         task (str, what follows "Your task is to: "), task_type (str, one of TASK_TYPES), admissible (list[str]),
             won (bool), score (float, 0 or 1), gamefile (str), subgoals (list[str], see `subgoals`). All seven at every turn, in new objects.

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

IN_PROCESS = False  # The engine crashes in threads. Several envs of one process, stepped in turn, get along.
SPLITS = ("train", "valid_seen", "valid_unseen")
TASK_TYPES = ("pick_and_place_simple", "look_at_obj_in_light", "pick_clean_then_place_in_recep",
              "pick_heat_then_place_in_recep", "pick_cool_then_place_in_recep", "pick_two_obj_and_place")

TITLE, TASK, NOTHING = "-= Welcome to TextWorld, ALFRED! =-", "Your task is to: ", "Nothing happens."
DEEDS = ("take", "move", "clean", "heat", "cool", "use")  # the verbs that complete a subgoal
APPLIANCES = {"clean": "sinkbasin 1", "heat": "microwave 1", "cool": "fridge 1"}
GAMES, SENTENCES, FACTS = 512, 512, 20_000                # how much the engine remembers, about 60 MB: see _engine_class
SOLVABLE = re.compile(rb'"solvable":\s*true')             # much cheaper than parsing some thousand 80 kB files

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
        raise RuntimeError(f"{why}there is no folder {folder}: download the data with `alfworld-download`, then set "
                           "ALFWORLD_DATA to the folder that holds json_2.1.1")
    return _scan(folder)


@functools.lru_cache(maxsize=None)
def _scan(folder):
    """The playable games below `folder`, one split. Seconds for the 3553 training games, so once per process."""
    found = sorted(map(str, folder.rglob("game.tw-pddl")))
    playable = tuple(file for file in found if task_type(file) in TASK_TYPES  # the seventh type moves receptacles,
                     and "Sliced" not in Path(file).parts[-3]                 # which like slicing the text games lack
                     and SOLVABLE.search(Path(file).read_bytes()))
    if not playable:
        raise RuntimeError(f"0 playable games in {folder}, which holds {len(found)} game.tw-pddl files: "
                           "complete the data with `alfworld-download`")
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
        self._engine, self._steps = None, None                  # _steps is None where no episode is running
        self._read(self._game.get("walkthrough") or ())
        if not self._game.get("solvable"):
            raise RuntimeError(f"{gamefile} is not marked solvable: winning it may be impossible, so it is not played")
        if '"move {o} to {r}"' not in self._game["grammar"]:
            raise RuntimeError(f"{gamefile} is of the older data release (`put X in/on Y`, today `move X to Y`): "
                               "update the data with alfworld 0.4 or newer, `alfworld-download -f`")

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
        self._place, self._held, self._lies, self._state, self._delivered = None, None, {}, {}, set()
        self._places = sorted((a.removeprefix("go to ") for a in state.admissible_commands if a.startswith("go to ")), key=_natural)
        room, _, task = state.feedback.partition(TASK)
        self._task = task.strip()
        return room.replace(TITLE, "").strip(), self._info(state)

    def step(self, action):
        """Play one action: (observation, reward, terminated, truncated, info).

        RuntimeError: no episode is running, because reset was not called, or not since the last one ended."""
        if self._steps is None:
            raise RuntimeError("no episode is running: call reset() before step()")
        state, _, _ = self._engine.step(action)
        won, observation = bool(state.won), state.feedback.strip()
        self._follow(action.strip(), observation)
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
        """What a demonstrator does now who carries `subgoal`: (switch, subgoal, action), or None where it cannot say.

        What is to be done it has from the walkthrough. Where a thing lies it pretends not to know: it begins up to four places before
        and looks into one after the other, in the order of their names, as one can who does not know. KEEP until the subgoal is
        reached or hopeless, whether or not it serves the task; else SWITCH to one that does.
        """
        if self._steps is None or not self._kind:
            return None
        keeps = self._pursue(subgoal)
        goal = subgoal if keeps else self._plan()
        action = keeps or self._pursue(goal)
        return (not keeps, goal, action) if action else None

    def subgoals(self):
        """All that one could set out to do now; what the task wants is among them. Empty for a game without walkthrough."""
        if not self._kind:
            return []
        if self._held is None:
            return [self._seek]
        if _kind(self._held) != self._kind:
            return [f"put down {_kind(self._held)}"]
        treat = [_subgoal(f"{verb} {self._held} with {place}") for verb, place in APPLIANCES.items()
                 if place in self._places and verb not in self._state.get(self._held, ())]
        bring = [_subgoal(f"move {self._held} to {self._dest}")] if self._dest else []
        return treat + [self._light] * bool(self._light) + bring

    def _read(self, walkthrough):
        """What the walkthrough gives away: the things and where they lie, what to do with them, where to bring them."""
        here, self._things, self._kind, self._seek, self._treat, self._dest, self._light, self._lamp = None, {}, "", "", "", "", "", None
        for action in walkthrough:
            verb, thing, place = _parts(action)
            if verb == "go":
                here = place
            elif verb == "take":
                self._things[thing] = place
                self._kind, self._seek = self._kind or _kind(thing), self._seek or _subgoal(action)
            elif verb in APPLIANCES:
                self._treat = verb
            elif verb == "move":
                self._dest = place
            elif verb == "use":
                self._light, self._lamp = _subgoal(action), here

    def _plan(self):
        """The subgoal that serves the task now."""
        goals = self.subgoals()
        if self._held is None or _kind(self._held) != self._kind:
            return goals[0]
        return goals[-1] if self._treated(self._held) else f"{self._treat} {self._kind}"

    def _treated(self, thing):
        return not self._treat or self._treat in self._state.get(thing, ())

    def _pursue(self, subgoal):
        """The next action towards `subgoal`, or None where it is reached, hopeless or not one of ours."""
        if subgoal not in self.subgoals():
            return None
        verb, held = _verb(subgoal), self._held
        if verb == "find":
            return self._find()
        if verb == "use":
            here = [a for a in self._admissible if a.startswith(subgoal)]
            return here[0] if here else self._reach(self._lamp)
        if verb in APPLIANCES:
            place = APPLIANCES[verb]
            action = f"{verb} {held} with {place}"
            return next((a for a in (action, f"go to {place}") if a in self._admissible), None)
        down = self._place or self._places[0]
        spot = down if verb == "put" and (subgoal.startswith("put down") or _kind(down) == _kind(self._dest)) else self._dest
        return self._reach(spot) or f"move {held} to {spot}"

    def _find(self):
        """Take one of the things, or look into the next place on the way to it."""
        lying = {thing: self._lies.get(thing, place) for thing, place in self._things.items() if thing not in self._delivered}
        here = [a for a in self._admissible if a.startswith(f"take {self._kind} ") and a[5:].split(" from ")[0] not in self._delivered]
        if here or not lying:
            return here[0] if here else None
        thing, place = next(iter(lying.items()))
        end = self._places.index(place)
        route = self._places[max(0, end - zlib.crc32(f"{self.gamefile} {thing}".encode()) % 5):end + 1]
        shut, ahead = (self._reach(self._place), route[route.index(self._place) + 1:]) if self._place in route else (None, route)
        return shut or next(filter(None, map(self._reach, ahead)), None)

    def _reach(self, place):
        """The next action on the way to `place` standing open, or None when that is done. Two places may be one spot to stand on."""
        return next((action for action in (f"go to {place}", f"open {place}") if action in self._admissible), None)

    def _follow(self, action, observation):
        """Keep in mind where one is, what is in hand and what has been done."""
        if observation == NOTHING:
            return
        verb, thing, place = _parts(action)
        if verb == "go":
            self._place = place
        elif verb == "take":
            self._held = thing
            self._delivered.discard(thing)
        elif verb == "move":
            self._held, self._lies[thing] = None, place
            if self._dest and _kind(place) == _kind(self._dest) and _kind(thing) == self._kind and self._treated(thing):
                self._delivered.add(thing)
        elif verb in APPLIANCES:
            undone = {"heat", "cool"} if verb != "clean" else set()
            self._state[thing] = self._state.get(thing, set()) - undone | {verb}

    def _info(self, state):
        self._admissible = [a for a in state.admissible_commands if a != "help"]
        return {"task": self._task, "task_type": task_type(self.gamefile),
                "admissible": list(self._admissible), "subgoals": self.subgoals(),
                "won": bool(state.won), "score": float(state.won), "gamefile": self.gamefile}


def _verb(action):
    return action.split(" ", 1)[0]


def _parts(action):
    """"take mug 1 from desk 2" -> ("take", "mug 1", "desk 2"); "go to desk 2" -> ("go", "", "desk 2"); "use desklamp 1" -> (..., "")"""
    verb, _, rest = action.partition(" ")
    thing, *place = re.split("(?:^| )(?:from|to|with) ", rest, maxsplit=1)
    return verb, thing, "".join(place)


def _kind(name):
    """'mug 2' -> 'mug'"""
    return name.rpartition(" ")[0]


def _natural(name):
    """Names in the order of kind and number."""
    kind, _, number = name.rpartition(" ")
    return kind, int(number)


def _subgoal(deed):
    """Without numbers: "take mug 1 from desk 2" -> "find and take mug"; "move mug 1 to shelf 2" -> "put mug in shelf";
    "clean mug 1 with sinkbasin 1" -> "clean mug"; "use desklamp 1" -> "use desklamp"."""
    words = re.sub(r" \d+", "", deed).split()
    if words[0] == "take":
        return f"find and take {words[1]}"
    return f"put {words[1]} in {words[3]}" if words[0] == "move" else " ".join(words[:2])


def _new_engine():
    if sys.version_info >= (3, 13):  # it installs, but its grammar writes to locals(), a mere copy since 3.13
        raise RuntimeError("ALFWorld's engine, textworld, fails on Python 3.13 and newer: use Python 3.10 to 3.12")
    try:
        from textworld import EnvInfos
        return _engine_class()(EnvInfos(won=True, admissible_commands=True))
    except (ImportError, OSError, RuntimeError) as error:  # the last two: its native library did not build
        raise RuntimeError(f"ALFWorld needs textworld with its PDDL engine ({error}): "
                           "pip install -r requirements-alfworld.txt") from error


@functools.lru_cache(maxsize=None)
def _engine_class():
    """Textworld's engine, which here remembers what it otherwise derives anew from the same texts at every reset and step.

    Of the last GAMES games of this process the translated problem; of the grammar's last SENTENCES expressions how they parse;
    of the game in play each command's words. What it says stays the same, which tests/test_alfworld.py compares."""
    import fast_downward
    import mementos.core
    from textworld.envs.pddl import PddlEnv, textgen

    pddl2sas = fast_downward.pddl2sas
    translate = functools.lru_cache(GAMES)(lambda *game: zlib.compress(pickle.dumps(pddl2sas(*game)), 1))    # 1 MB in 60 kB
    parse = functools.lru_cache(SENTENCES)(textgen._parse_and_convert)
    memories = (  # where the engine looks a function up, its name there, and what stands there while the engine works
        (fast_downward, "pddl2sas", lambda domain, problem, verbose=False, optimize=False:
            (None, "") if optimize else pickle.loads(zlib.decompress(translate(domain, problem)))),  # optimized for the planner, which nobody asks here
        (textgen, "_parse_and_convert", lambda *text, **how: copy.deepcopy(parse(*text, **how))),  # it writes into the symbols
        (textgen.Rule, "parse_conjunctive_query", functools.lru_cache(SENTENCES)(textgen.Rule.parse_conjunctive_query)))

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
            if len(facts) > FACTS:  # textworld keeps every fact of every game, 1.6 MB a game; equal ones may be made anew
                facts.clear()
            PddlEnv.load(self, game)
            self._commands = {}  # template and the identifiers in it -> words, which depend on nothing that changes

        def _gather_infos(self):
            """PddlEnv's, less what is not read here; a command is rendered when it is first admissible."""
            actions = list(self._pddl_state.all_applicable_actions())
            commands = list(map(self._command, actions))
            self.state.update(won=self._pddl_state.check_goal(), lost=False, _valid_actions=actions,
                              _valid_commands=commands, admissible_commands=sorted(set(commands)))

        def _command(self, action):
            template, mapping = action.command_template, action.mapping
            words = re.findall(r"\w+", template)
            key = template, *(of.name for kind, of in mapping.items() if kind.name in words)
            if key not in self._commands:
                variables = {kind.name: self._entity_infos[of.name] for kind, of in mapping.items()}
                text = self._logic.grammar.derive(template, {"state": self._pddl_state, "facts": [], "variables": variables,
                                                             "mapping": mapping, "entity_infos": self._entity_infos})
                self._commands[key] = text.format(**{k: info.name for k, info in self._entity_infos.items()})
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
