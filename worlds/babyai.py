"""BabyAI's grid worlds in words: what the agent sees, as a page of 50 to 70 tokens.

The levels are minigrid's (requirements-babyai.txt): the agent turns, walks, picks up, drops and
toggles one step at a time, sees seven by seven cells ahead of it, and is paid for what the mission
says, in the end. `env_options: {"level": "GoToLocal"}` takes any of them, BabyAI-NAME-v0; LEVELS
are a ladder of horizons. The page is one of memory, like the household's:

    Hold nothing. Moves 20. Free ahead 2 left 3 right 1. See red ball ahead 2 left 1, grey box left
    2. Recall blue key behind 1. Unseen behind 2 right 1. Done nothing.

Distances are in steps, as the agent stands now. `See` lists what is in view, what the mission names
first, then the nearest; `Recall` doors and what the mission names, seen earlier; `Unseen` the
nearest cell not seen yet; `Done` the parts of the mission that are done. Differences from minigrid:
  1. The step limit is the ladder's, three times what the bot needs on average or more; else
     minigrid's.
  2. Names in one word (`redball`) with `one_word`, for the tiny agent.
  3. The reward is 1.0 for success, however long it took.

The demonstrator is minigrid's own bot. Its subgoal is the top of its stack, in words; under
another subgoal, `go to` something seen, it goes there and then returns to its own plan.

Splits: task `n` of train is seed n, 0 to 19,999; of unseen, seed 1,000,000 + n, 0 to 299.
"""

import contextlib
import io
import re

import numpy as np

try:
    import gymnasium
    import minigrid  # noqa: F401, registers the levels
    from minigrid.utils import baby_ai_bot as bots
except ImportError:  # optional: make says so
    gymnasium = None

SPLITS = ("train", "unseen")
SEEDS = {"train": (0, 20_000), "unseen": (1_000_000, 300)}  # split -> first seed, number of tasks
LEVELS = {  # level -> step limit
    "GoToLocal": 20,
    "PickupLoc": 25,
    "PutNextLocal": 40,
    "GoToSeqS5R2": 60,
    "Open": 250,
    "GoTo": 250,
    "Pickup": 250,
    "UnblockPickup": 250,
    "Synth": 250,
    "GoToSeq": 300,
    "SynthSeq": 400,
    "BossLevel": 400,
}
TINY_AGENT = {"one_word": True}
# Keyword arguments of support.demonstrations for this world.
DEMONSTRATOR = {"random_subgoals": 0.65, "action_noise": 0.25}

ACTIONS = ("turn left", "turn right", "go forward", "pick up", "drop", "toggle")
NOTHING, LAST = 6, 8  # minigrid's action `done`; things listed at most
NAMES = re.compile(r"\b(red|green|blue|purple|yellow|grey) (ball|box|key|door|object)\b")


def size(split):
    """Number of tasks in `split`. ValueError for an unknown split."""
    if split not in SEEDS:
        raise ValueError(f"babyai has no split {split!r}: choose {' or '.join(SPLITS)}")
    return SEEDS[split][1]


def make(split="train", index=0, level="GoToLocal", max_steps=None, one_word=False):
    """The env of task `index` of `split`. IndexError where there is none."""
    if not 0 <= index < size(split):
        raise IndexError(f"babyai's split {split!r} has tasks 0 to {size(split) - 1}, not {index}")
    if gymnasium is None:
        raise RuntimeError("babyai needs minigrid: pip install -r requirements-babyai.txt")
    try:
        env = gymnasium.make(f"BabyAI-{level}-v0", disable_env_checker=True).unwrapped
    except gymnasium.error.Error:
        raise ValueError(
            f"babyai has no level {level!r}: choose {', '.join(LEVELS)}, or another of minigrid's"
        ) from None
    return BabyAI(env, SEEDS[split][0] + index, max_steps or LEVELS.get(level), one_word)


class BabyAI:
    """One task: a level and a seed."""

    def __init__(self, env, seed, max_steps, one_word):
        self.env, self.seed, self.max_steps, self.one_word = env, seed, max_steps, one_word
        self.running = False

    def reset(self, seed=None):
        """Begin the task anew -> (observation, info). `seed` is ignored: the task has its own."""
        with contextlib.redirect_stdout(io.StringIO()):  # it reports the layouts it rejected
            self.env.reset(seed=self.seed)
        self.limit = self.max_steps or self.env.max_steps
        self.env.max_steps = self.limit
        self.parts = [
            (part, self.short(part.surface(self.env))) for part in leaves(self.env.instrs)
        ]
        self.task = self.short(self.env.mission)
        self.seen = np.zeros((self.env.width, self.env.height), bool)
        self.bot = None
        self.won = False
        self.running = True
        self.look()
        return self.page(), self.info()

    def step(self, action):
        """-> (observation, reward, terminated, truncated, info).

        An action that is not admissible costs a step and changes nothing else.
        """
        if not self.running:
            raise RuntimeError("the episode has ended (or not begun): call reset before step")
        works = action in self.admissible()
        number = ACTIONS.index(action) if works else NOTHING
        _, reward, terminated, truncated, _ = self.env.step(number)
        self.won = bool(terminated and reward > 0)
        truncated = bool(truncated and not terminated)
        self.running = not (terminated or truncated)
        self.look()
        if self.bot and self.running:
            self.replan(number)
        prefix = "" if works else "Nothing happens. "
        return prefix + self.page(), float(self.won), bool(terminated), truncated, self.info()

    def close(self):
        self.running = False
        self.env.close()

    def admissible(self):
        """The actions that change something now."""
        front = self.env.grid.get(*self.env.front_pos)
        holds = self.env.carrying is not None
        actions = ["turn left", "turn right"]
        if passable(front):
            actions.append("go forward")
        if front is not None and front.can_pickup() and not holds:
            actions.append("pick up")
        if front is None and holds:
            actions.append("drop")
        if front is not None and front.type in ("door", "box"):
            actions.append("toggle")
        return actions

    # ---- what the agent sees ----

    def look(self):
        """Note the cells in view, all that were ever seen, and the parts of the mission done."""
        self.done = list(parts_done(self.env.instrs, self.won))
        _, visible = self.env.gen_obs_grid()
        length = self.env.agent_view_size
        self.view = np.zeros_like(self.seen)
        for column, row in np.argwhere(visible):
            x, y = self.place(length - 1 - row, column - length // 2)
            if 0 <= x < self.env.width and 0 <= y < self.env.height:
                self.view[x, y] = True
        self.seen |= self.view

    def place(self, ahead, right):
        """The cell so many steps ahead and to the right of the agent."""
        return self.env.agent_pos + ahead * self.env.dir_vec + right * self.env.right_vec

    def page(self):
        """The observation."""
        held = self.env.carrying
        wanted = [thing for part, _ in self.parts for thing in named_things(part)]
        in_view = sorted(self.things(self.view), key=lambda pair: pair[1] not in wanted)
        recalled = [
            (cell, thing)
            for cell, thing in self.things(self.seen & ~self.view)
            if thing.type == "door" or thing in wanted
        ]
        unseen = sorted(self.unseen(), key=self.distance)[:1]
        done = [words for (part, words), done in zip(self.parts, self.done, strict=True) if done]
        free = " ".join(
            f"{name} {self.free_steps(*way)}"
            for name, way in (("ahead", (1, 0)), ("left", (0, -1)), ("right", (0, 1)))
        )
        return (
            f"Hold {self.name(held) if held else 'nothing'}. "
            f"Moves {self.limit - self.env.step_count}. Free {free}. "
            f"See {self.list(in_view)}. Recall {self.list(recalled)}. "
            f"Unseen {' '.join(self.where(cell) for cell in unseen) or 'nothing'}. "
            f"Done {', '.join(done) or 'nothing'}."
        )

    def things(self, cells):
        """[(cell, thing)] in these cells, the nearest first."""
        found = [(tuple(cell), self.env.grid.get(*cell)) for cell in np.argwhere(cells)]
        found = [pair for pair in found if pair[1] is not None and pair[1].type != "wall"]
        return sorted(found, key=lambda pair: self.distance(pair[0]))

    def list(self, things):
        listed = [f"{self.name(thing, True)} {self.where(cell)}" for cell, thing in things[:LAST]]
        return ", ".join(listed) or "nothing"

    def name(self, thing, state=False):
        """`red ball`; with `state` also `red door closed`."""
        name = self.short(f"{thing.color} {thing.type}")
        if state and thing.type == "door":
            name += " open" if thing.is_open else " locked" if thing.is_locked else " closed"
        return name

    def short(self, text):
        return NAMES.sub(r"\1\2", text) if self.one_word else text

    def steps_to(self, cell):
        """(steps ahead, steps to the right) of a cell."""
        way = np.subtract(cell, self.env.agent_pos)
        return int(way @ self.env.dir_vec), int(way @ self.env.right_vec)

    def distance(self, cell):
        ahead, right = self.steps_to(cell)
        return abs(ahead) + abs(right), -ahead, right

    def where(self, cell):
        ahead, right = self.steps_to(cell)
        words = [f"{'ahead' if ahead > 0 else 'behind'} {abs(ahead)}"] if ahead else []
        words += [f"{'right' if right > 0 else 'left'} {abs(right)}"] if right else []
        return " ".join(words) or "here"

    def free_steps(self, ahead, right):
        """How far the agent could walk that way over cells that it has seen."""
        steps = 0
        while True:
            cell = self.place(ahead * (steps + 1), right * (steps + 1))
            if not self.seen[tuple(cell)] or not passable(self.env.grid.get(*cell)):
                return steps
            steps += 1

    def unseen(self):
        """The cells not seen yet beside those that were, walls and closed doors apart."""
        for x, y in np.argwhere(self.seen):
            if passable(self.env.grid.get(x, y)):
                for cell in ((x + 1, y), (x - 1, y), (x, y + 1), (x, y - 1)):
                    if not self.seen[cell]:
                        yield cell

    def info(self):
        return {
            "task": self.task,
            "task_type": type(self.env.instrs).__name__.removesuffix("Instr"),
            "admissible": self.admissible(),
            "won": self.won,
            "score": float(self.won),
            "subgoals": self.subgoals(),
            "progress": 1.0 if self.won else sum(self.done) / len(self.done),
        }

    # ---- the bot ----

    def subgoals(self):
        """`go to` each thing that was seen."""
        return list(
            dict.fromkeys(f"go to {self.name(thing)}" for _, thing in self.things(self.seen))
        )

    def expert(self, subgoal):
        """The bot's decision under `subgoal` -> (switch, subgoal, action).

        It plans from the turn on in which it is first asked. None where it has no advice: it gives
        up where a box was opened, for example.
        """
        if not self.running:
            return None
        if self.bot is None:
            self.bot = bots.BabyAIBot(self.env)
            self.replan(None)
        if self.advice is None:
            return None
        own = self.in_words(self.bot.stack[-1])
        if subgoal == own:
            return False, own, self.advice
        action = self.pursue(subgoal)
        if action:
            return False, subgoal, action
        return True, own, self.advice

    def replan(self, number):
        """The bot takes note of the last action; its advice, None where it has none."""
        try:
            advice = self.bot.replan(number)
        except Exception:  # of many kinds: it was written for missions in which nothing goes wrong
            advice = None
        useful = advice is not None and advice < NOTHING and self.bot.stack
        self.advice = ACTIONS[advice] if useful else None

    def pursue(self, subgoal):
        """The next step to a thing that was seen; None where it is reached or not a plain walk."""
        for cell, thing in self.things(self.seen):
            if subgoal == f"go to {self.name(thing)}":
                guide = bots.BabyAIBot(self.env)
                guide.vis_mask = self.seen.copy()
                guide.stack = [bots.GoNextToSubgoal(guide, cell)]
                try:
                    advice = guide.replan()
                except Exception:  # as in replan
                    return None
                return ACTIONS[advice] if advice in (0, 1, 2) else None
        return None

    def in_words(self, subgoal):
        """A subgoal of the bot's stack as text."""
        kind, goal = type(subgoal).__name__.removesuffix("Subgoal"), subgoal.datum
        if kind != "GoNextTo":
            return {"Pickup": "pick up", "Open": "open door", "Close": "close door"}.get(
                kind, kind.lower()
            )
        if isinstance(goal, bots.ObjDesc):
            words = filter(None, (goal.color, goal.type or "object", goal.loc))
            near = "beside" if subgoal.reason == "PutNext" else "to"
            return self.short(f"go {near} {' '.join(words)}")
        if isinstance(goal, bots.WorldObj):
            return f"go to {self.name(goal)}"
        return "explore" if subgoal.reason == "Explore" else "go to place"


def passable(cell):
    return cell is None or cell.can_overlap()


def leaves(instruction):
    """The parts of a mission, in the order of its words."""
    if hasattr(instruction, "instr_a"):
        return leaves(instruction.instr_a) + leaves(instruction.instr_b)
    return [instruction]


def parts_done(instruction, done):
    """Whether each of `leaves` is done."""
    if not hasattr(instruction, "instr_a"):
        yield done
        return
    for name in ("a", "b"):
        finished = getattr(instruction, f"{name}_done") == "success"
        yield from parts_done(getattr(instruction, f"instr_{name}"), done or finished)


def named_things(instruction):
    """The things that a part of the mission may mean."""
    parts = [getattr(instruction, name, None) for name in ("desc", "desc_move", "desc_fixed")]
    return [thing for part in parts for thing in getattr(part, "obj_set", ())]


if __name__ == "__main__":
    from support import play

    raise SystemExit(play.main("babyai"))
