"""A small household in the style of ALFWorld: pure Python, deterministic, trainable on a CPU.

A room holds three appliances (sink, microwave, fridge) and four storage places, some of them
closed. Objects lie in the storage places. The task comes from one of ALFWorld's six families. Only
success within the step limit is rewarded. The agent can carry one object at a time.

Differences from ALFWorld, so that a model of half a million parameters can play from forty tokens:
  1. The observation is one page. It gives the time of day (how much of the step limit is used),
     what is here, which places were not seen yet, and where the lamp and the task's objects were
     seen (`Recall mug 1 shelf 2`). Delivered objects are marked `done` and are not recalled.
  2. Every name is `kind number`, which a tokenizer can keep as one token.
  3. There is no `look`, `inventory` or `examine X`, because the page has all of it.
  4. `put two mug in shelf` is solved on any shelves; the two may lie on different ones.

Splits. `train` and `seen` share room layouts and pairs of object kind and storage kind, but no
room. `unseen` has layouts and pairs that train never has (see household_rooms.py).
"""

import random

from worlds.household_rooms import CLOSED, draw_room, kind

SPLITS = ("train", "seen", "unseen")
SIZES = {"train": 20_000, "seen": 300, "unseen": 300}
MAX_STEPS = 15
DEMONSTRATOR = {"random_subgoals": 0.82, "action_noise": 0.25}  # see support/demonstrations.py
TIMES_OF_DAY = ("Dawn", "Morning", "Noon", "Evening", "Dusk", "Night")  # of the step limit
TASKS = {  # ALFWorld's family -> task sentence
    "pick_and_place_simple": "put a {obj} in {dest}",
    "look_at_obj_in_light": "look at {obj} under the lamp",
    "pick_clean_then_place_in_recep": "put a clean {obj} in {dest}",
    "pick_heat_then_place_in_recep": "put a hot {obj} in {dest}",
    "pick_cool_then_place_in_recep": "put a cool {obj} in {dest}",
    "pick_two_obj_and_place": "put two {obj} in {dest}",
}
TASK_TYPES = tuple(TASKS)
NEEDS = {  # family -> state that the object must have
    "pick_clean_then_place_in_recep": "clean",
    "pick_heat_then_place_in_recep": "hot",
    "pick_cool_then_place_in_recep": "cool",
}
APPLIANCES = {  # appliance -> (verb, state that it gives)
    "sink 1": ("clean", "clean"),
    "microwave 1": ("heat", "hot"),
    "fridge 1": ("cool", "cool"),
}


def size(split):
    """Number of tasks in `split`. ValueError for an unknown split."""
    if split not in SIZES:
        raise ValueError(f"household has no split {split!r}: choose one of {', '.join(SPLITS)}")
    return SIZES[split]


def make(split="train", index=0, max_steps=MAX_STEPS, chain=1, routine=0):
    """Task `index` of `split`; IndexError for none. chain, routine: see household_chain.py."""
    last = size(split) - 1
    if not 0 <= index <= last:
        raise IndexError(f"household's split {split!r} has tasks 0 to {last}, not {index}")
    if (chain, routine) == (1, 0):
        return Household(split, index, max_steps)
    from worlds.household_chain import Chain  # it imports this file

    return Chain(split, index, max_steps, chain, routine)


class Household:
    """One task. The same (split, index) is always the same room and task."""

    def __init__(self, split, index, max_steps):
        self.max_steps = max_steps
        self.done = True  # until the first reset
        self.task_type = TASK_TYPES[index % len(TASKS)]  # every family equally often
        self.goal_state = NEEDS.get(self.task_type)
        room = draw_room(
            random.Random(f"household/{split}/{index}"),
            unseen=split == "unseen",
            two=self.task_type == "pick_two_obj_and_place",
        )
        self.places = room.places
        self.home = room.home
        self.lamp = room.lamp
        self.obj = room.obj
        self.dest = room.dest
        self.task = TASKS[self.task_type].format(obj=self.obj, dest=self.dest)

    def reset(self, seed=None):
        """Start the task again -> (observation, info). `seed` is ignored: nothing is random."""
        self.at = None  # the place or appliance where the agent stands
        self.steps = 0
        self.won = False
        self.done = False
        self.where = dict(self.home)  # object -> place, or None when carried
        self.state = {}  # object -> clean, hot or cool
        self.closed = {p for p in self.places if kind(p) in CLOSED}
        self.seen = []  # storage places whose contents were seen, in that order
        self.lit = False
        return self._page(), self._info()

    def step(self, action):
        """-> (observation, reward, terminated, truncated, info).

        An action that is not admissible costs a step and changes nothing else.
        """
        if self.done:
            raise RuntimeError("the episode has ended (or not begun): call reset before step")
        self.steps += 1
        prefix = "Nothing happens. "
        if action in self.admissible():
            prefix = ""
            self._apply(action)
        self.won = self._solved()
        truncated = not self.won and self.steps >= self.max_steps
        self.done = self.won or truncated
        return prefix + self._page(), float(self.won), self.won, truncated, self._info()

    def close(self):
        """Does nothing: there is nothing to release."""

    def admissible(self):
        """All commands accepted now, in ALFWorld's grammar. A few of them change nothing: `use lamp
        1` without the task's object, an appliance used on an object that has its state already."""
        here = self.at
        held = self._held()
        commands = [f"go to {p}" for p in [*self.places, *APPLIANCES] if p != here]
        if here is None:
            return commands
        if here in APPLIANCES:
            verb, _ = APPLIANCES[here]
            return commands + [f"{verb} {held} with {here}"] if held else commands
        if here in self.closed:
            return commands + [f"open {here}"]
        if kind(here) in CLOSED:
            commands.append(f"close {here}")
        if held:
            commands.append(f"move {held} to {here}")
        else:
            commands += [f"take {obj} from {here}" for obj in self._objects_at(here)]
        if here == self.lamp:
            commands.append("use lamp 1")
        return commands

    # ---- rules ----

    def _apply(self, action):
        verb, rest = action.split(" ", 1)
        held = self._held()
        if verb == "go":
            self.at = rest.removeprefix("to ")
        elif verb == "open":
            self.closed.discard(rest)
        elif verb == "close":
            self.closed.add(rest)
        elif verb == "take":
            self.where[rest.split(" from ")[0]] = None
        elif verb == "move":
            self.where[held] = self.at
        elif verb == "use":
            self.lit = held is not None and kind(held) == self.obj
        else:  # clean, heat, cool
            self.state[held] = APPLIANCES[self.at][1]
        if self.at in self.places and self.at not in self.closed and self.at not in self.seen:
            self.seen.append(self.at)

    def _solved(self):
        if self.task_type == "look_at_obj_in_light":
            return self.lit
        needed = 2 if self.task_type == "pick_two_obj_and_place" else 1
        return len(self._delivered()) >= needed

    def _delivered(self):
        """The task's objects that lie at the destination in the required state."""
        if self.task_type == "look_at_obj_in_light":
            return []
        return [obj for obj in self._targets() if self._is_delivered(obj)]

    def _is_delivered(self, obj):
        place = self.where[obj]
        return place is not None and kind(place) == self.dest and self._has_goal_state(obj)

    def _has_goal_state(self, obj):
        return self.goal_state is None or self.state.get(obj) == self.goal_state

    def _targets(self):
        """The objects of the kind that the task names."""
        return [obj for obj in self.where if kind(obj) == self.obj]

    def _held(self):
        return next((obj for obj, place in self.where.items() if place is None), None)

    def _objects_at(self, place):
        return [obj for obj, where in self.where.items() if where == place]

    # ---- observation and info ----

    def _page(self):
        """The observation: the agent's place and hand, what it saw where, which places are left."""
        delivered = self._delivered()
        held = self._held()
        time = TIMES_OF_DAY[self.steps * len(TIMES_OF_DAY) // (self.max_steps + 1)]
        at = self.at or "the middle"
        if self.at in self.closed:
            at += " closed"
        contents = self._contents(self.at) if self.at in self.seen else []
        around = " ".join(thing + self._marks(thing, delivered) for thing in contents)
        hold = held + self._marks(held, delivered) if held else "nothing"
        unseen = " ".join(p for p in self.places if p not in self.seen)
        elsewhere = [p for p in self.seen if p != self.at]
        lamp = self.lamp if self.lamp in elsewhere else "nothing"
        recall = ", ".join(
            f"{obj} {place}{self._marks(obj, delivered)}"
            for place in elsewhere
            for obj in self._objects_at(place)
            if kind(obj) == self.obj and obj not in delivered
        )
        return (
            f"{time}. At {at}: {around or 'nothing'}. Hold {hold}. Unseen {unseen or 'nothing'}. "
            f"Seen {' '.join(elsewhere) or 'nothing'}. Lamp {lamp}. "
            f"Recall {recall or 'nothing'}."
        )

    def _contents(self, place):
        lamp = ["lamp 1"] if place == self.lamp else []
        return lamp + self._objects_at(place)

    def _marks(self, thing, delivered):
        """The state of a thing and `done`, each with a space before it."""
        state = f" {self.state[thing]}" if thing in self.state else ""
        return state + " done" if thing in delivered else state

    def _info(self):
        return {
            "task": self.task,
            "task_type": self.task_type,
            "admissible": self.admissible(),
            "won": self.won,
            "score": float(self.won),
            "subgoals": self.subgoals(),
            "progress": self._progress(),
        }

    def _progress(self):
        """The share of the subtasks that are done: take; clean, heat or cool; deliver or light."""
        delivered = self._delivered()
        targets = self._targets()
        subtasks = [any(self.where[obj] is None or obj in delivered for obj in targets)]
        if self.goal_state:
            subtasks.append(any(self._has_goal_state(obj) for obj in targets))
        if self.task_type == "look_at_obj_in_light":
            subtasks.append(self.lit)
        elif self.task_type == "pick_two_obj_and_place":
            subtasks += [len(delivered) >= 1, len(delivered) >= 2]
        else:
            subtasks.append(self.won)
        return sum(subtasks) / len(subtasks)

    # ---- scripted expert ----

    def expert(self, subgoal):
        """The scripted expert's decision under `subgoal` -> (switch, subgoal, action).

        It keeps the subgoal until it is reached or cannot be reached, whether or not it serves the
        task. Then it switches to one that serves the task. None where no episode runs.
        """
        if self.done:
            return None
        action = self._pursue(subgoal)
        if action:
            return False, subgoal, action
        subgoal = self._plan()
        return True, subgoal, self._pursue(subgoal)

    def subgoals(self):
        """All subgoals that can be pursued now, in the task's words. One of them serves it."""
        held = self._held()
        if held is None:
            return [f"find {self.obj}"]
        if kind(held) != self.obj:
            return [f"drop {kind(held)}"]
        missing = [state for _, state in APPLIANCES.values() if state != self.state.get(held)]
        goals = [f"make a {state} {self.obj}" for state in missing]
        if not self.lit:
            goals.append("use lamp")
        wanted = f"{self.goal_state} {self.obj}" if self.goal_state else self.obj
        return [*goals, f"put a {wanted} in {self.dest}"]

    def _plan(self):
        """The subgoal that serves the task now."""
        held = self._held()
        goals = self.subgoals()
        if held is None or kind(held) != self.obj:
            return goals[0]
        if self.task_type == "look_at_obj_in_light":
            return "use lamp"
        if not self._has_goal_state(held):
            return f"make a {self.goal_state} {self.obj}"
        return goals[-1]

    def _pursue(self, subgoal):
        """The next command towards `subgoal`, or None where it is reached or cannot be pursued."""
        if subgoal not in self.subgoals():
            return None
        verb, *words = subgoal.split()
        if verb == "find":
            return self._find()
        if verb == "use":
            return self._use_lamp()
        held = self._held()
        if verb in ("put", "drop"):
            place = self._place_for(None if verb == "drop" else self.dest)
            return self._reach(place) or f"move {held} to {place}"
        place = next(name for name, made in APPLIANCES.items() if made[1] == words[1])
        return self._reach(place) or f"{APPLIANCES[place][0]} {held} with {place}"

    def _find(self):
        """Take a target that was seen and is not delivered; without one, search."""
        delivered = self._delivered()
        for obj in self._targets():
            place = self.where[obj]
            if place in self.seen and obj not in delivered:
                return self._reach(place) or f"take {obj} from {place}"
        return self._search()

    def _use_lamp(self):
        if self.lamp not in self.seen:
            return self._search()
        return self._reach(self.lamp) or "use lamp 1"

    def _place_for(self, storage_kind):
        """The nearest storage place of that kind (None: any): here, seen before, or not seen."""
        candidates = [p for p in [self.at, *self.seen, *self.places] if p in self.places]
        return next(p for p in candidates if storage_kind in (None, kind(p)))

    def _search(self):
        """Go to the first place not seen yet and open it. The place at hand comes first."""
        unseen = [p for p in self.places if p not in self.seen]
        return self._reach(self.at if self.at in unseen else unseen[0])

    def _reach(self, place):
        """The next command on the way to `place`, opened; None where the agent is there."""
        if self.at != place:
            return f"go to {place}"
        return f"open {place}" if place in self.closed else None


if __name__ == "__main__":
    from support import play

    raise SystemExit(play.main("household"))
