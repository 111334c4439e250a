"""A small household in ALFWorld's manner: pure Python, deterministic, quick enough to learn in on a CPU.

A room holds appliances (sink, microwave, fridge) and four storage places, some of them closed. Objects lie in the storage
places. One of ALFWorld's six task families is asked for; only success pays, before the day is over. The agent carries one object
at a time.

What differs from ALFWorld, so that a model of half a million parameters can play from a prompt of about forty tokens:
  1. the observation is one page that sums up the hour, what is here, the places seen and not seen, and where things lie that are
     not here (`Recall mug 1 shelf 2`); what the task is done with is marked `done` and not recalled;
  2. every name is `kind number`, which a tokenizer can keep as one token;
  3. there is no `look`, `inventory` or `examine X`: the page says it all;
  4. `put two mug in shelf` is done wherever on shelves the two lie.

Splits. A *layout* is the multiset of storage places of a room, a *pair* an object kind lying in, or asked into, a storage
kind. `train` and `seen` share layouts and pairs, but no room; `unseen` has layouts that train never has, and its task objects
start in, and must be brought to, pairs that train never has, not even by a bystander. (Every object has two such places, so an
unseen task moves things between desk and drawer, shelf and cabinet, or table and box.)
"""

import itertools
import random

SPLITS = ("train", "seen", "unseen")
SIZES = {"train": 20_000, "seen": 300, "unseen": 300}
IN_PROCESS = True  # envs.Runner may keep many of these in one process
MAX_STEPS = 18  # the day
DAY = (
    "Dawn",
    "Morning",
    "Noon",
    "Evening",
    "Dusk",
    "Night",
)  # how much of it is gone, for those who value states

TASKS = {  # ALFWorld's six families -> our sentence
    "pick_and_place_simple": "put a {obj} in {dest}",
    "look_at_obj_in_light": "look at {obj} under the lamp",
    "pick_clean_then_place_in_recep": "put a clean {obj} in {dest}",
    "pick_heat_then_place_in_recep": "put a hot {obj} in {dest}",
    "pick_cool_then_place_in_recep": "put a cool {obj} in {dest}",
    "pick_two_obj_and_place": "put two {obj} in {dest}",
}
TASK_TYPES = tuple(TASKS)
NEEDS = {
    "pick_clean_then_place_in_recep": "clean",
    "pick_heat_then_place_in_recep": "hot",
    "pick_cool_then_place_in_recep": "cool",
}
APPLIANCES = {
    "sink 1": ("clean", "clean"),
    "microwave 1": ("heat", "hot"),
    "fridge 1": ("cool", "cool"),
}  # verb, state
OPEN, CLOSED = ("desk", "shelf", "table"), ("drawer", "cabinet", "box")
STORAGE = OPEN + CLOSED
OBJECTS = ("mug", "plate", "apple", "egg", "knife", "book", "watch", "cloth", "soap")
LAYOUTS = [
    c for c in itertools.combinations_with_replacement(STORAGE, 4) if max(map(c.count, c)) <= 2
]
UNSEEN_LAYOUTS = LAYOUTS[::4]
TRAIN_LAYOUTS = [layout for layout in LAYOUTS if layout not in UNSEEN_LAYOUTS]


def held_out(obj, place):
    """Whether the pair (object kind, storage kind) is kept from the train split: two of six places for every object."""
    return (OBJECTS.index(obj) + STORAGE.index(place)) % 3 == 0


def size(split):
    """Number of tasks in `split`; ValueError for a split that does not exist."""
    if split not in SIZES:
        raise ValueError(f"household has no split {split!r}: choose one of {', '.join(SPLITS)}")
    return SIZES[split]


def make(split="train", index=0, max_steps=MAX_STEPS):
    """Task `index` of `split`. IndexError where there is none."""
    if not 0 <= index < size(split):
        raise IndexError(
            f"household's split {split!r} has tasks 0 to {size(split) - 1}, not {index}"
        )
    return Household(split, index, max_steps)


def kind(name):
    """'mug 2' -> 'mug'"""
    return name.rpartition(" ")[0]


class Household:
    """One task. Gymnasium's reset and step; the same (split, index) is the same room and task for ever."""

    def __init__(self, split, index, max_steps):
        self.max_steps, self.done = max_steps, True  # done until the first reset
        rng = random.Random(f"household/{split}/{index}")
        unseen = split == "unseen"
        self.task_type = TASK_TYPES[index % len(TASKS)]  # every family equally often
        two = self.task_type == "pick_two_obj_and_place"
        while True:  # until the layout offers a start and a goal to the object
            layout = rng.choice(UNSEEN_LAYOUTS if unseen else TRAIN_LAYOUTS)
            self.obj = rng.choice(OBJECTS)
            allowed = sorted({p for p in layout if held_out(self.obj, p) == unseen})
            if len(allowed) >= 2:
                break
        start, self.dest = rng.sample(allowed, 2)  # storage kinds
        self.places = [f"{p} {layout[:i].count(p) + 1}" for i, p in enumerate(layout)]
        rng.shuffle(self.places)
        self.home = {}  # object -> place at the start
        for number in (1, 2) if two else (rng.randint(1, 2),):
            kinds = [p for p in allowed if p != self.dest] if two else [start]
            self.home[f"{self.obj} {number}"] = rng.choice(
                [p for p in self.places if kind(p) in kinds]
            )
        for other in rng.sample([o for o in OBJECTS if o != self.obj], 2):
            free = [p for p in self.places if unseen or not held_out(other, kind(p))]
            if free:
                self.home[f"{other} {rng.randint(1, 2)}"] = rng.choice(free)
        surfaces = [p for p in self.places if kind(p) in OPEN]
        self.lamp = rng.choice(surfaces) if surfaces else self.places[0]
        self.goal_state = NEEDS.get(self.task_type)
        self.task = TASKS[self.task_type].format(obj=self.obj, dest=self.dest)

    # ---- Gymnasium's two calls ------------------------------------------------------------------------------------

    def reset(self, seed=None):
        """Start the task anew -> (observation, info). `seed` is accepted and not needed: nothing here is random."""
        self.at, self.steps, self.won, self.done = None, 0, False, False
        self.where = dict(self.home)  # object -> place, or None when carried
        self.state = {}  # object -> clean, hot, cool
        self.shut = {p for p in self.places if kind(p) in CLOSED}
        self.seen = []  # storage places looked into, in that order
        self.lit = False
        return self._page(), self._info()

    def step(self, action):
        """-> (observation, reward, terminated, truncated, info). What is not admissible costs a step, nothing else."""
        if self.done:
            raise RuntimeError("the episode has ended (or not begun): call reset before step")
        self.steps += 1
        known = action in self.admissible()
        if known:
            self._apply(action)
        self.won = self._solved()
        truncated = not self.won and self.steps >= self.max_steps
        self.done = self.won or truncated
        return (
            ("" if known else "Nothing happens. ") + self._page(),
            float(self.won),
            self.won,
            truncated,
            self._info(),
        )

    def close(self):
        """Nothing to give back."""

    def admissible(self):
        """All commands that do something here, in ALFWorld's grammar."""
        here, held = self.at, self._held()
        acts = [f"go to {p}" for p in [*self.places, *APPLIANCES] if p != here]
        if here in self.shut:
            return acts + [f"open {here}"]
        if here in APPLIANCES:
            return acts + ([f"{APPLIANCES[here][0]} {held} with {here}"] if held else [])
        if here is not None:
            acts += [f"close {here}"] if kind(here) in CLOSED else []
            acts += (
                [f"move {held} to {here}"]
                if held
                else [f"take {o} from {here}" for o in self._at(here)]
            )
            acts += ["use lamp 1"] if here == self.lamp else []
        return acts

    # ---- the rules --------------------------------------------------------------------------------------------------

    def _apply(self, action):
        verb, rest = action.split(" ", 1)
        if verb == "go":
            self.at = rest.removeprefix("to ")
        elif verb == "open":
            self.shut.discard(rest)
        elif verb == "close":
            self.shut.add(rest)
        elif verb == "take":
            self.where[rest.split(" from ")[0]] = None
        elif verb == "move":
            self.where[self._held()] = self.at
        elif verb == "use":
            self.lit = self._held() is not None and kind(self._held()) == self.obj
        else:  # clean, heat, cool
            self.state[self._held()] = APPLIANCES[self.at][1]
        if self.at in self.places and self.at not in self.shut and self.at not in self.seen:
            self.seen.append(self.at)

    def _solved(self):
        if self.task_type == "look_at_obj_in_light":
            return self.lit
        return len(self._delivered()) >= (2 if self.task_type == "pick_two_obj_and_place" else 1)

    def _delivered(self):
        """The task's objects that already lie where they should, in the state asked for."""
        if self.task_type == "look_at_obj_in_light":
            return []
        return [
            o
            for o, p in self.where.items()
            if kind(o) == self.obj
            and p is not None
            and kind(p) == self.dest
            and self.goal_state in (None, self.state.get(o))
        ]

    def _held(self):
        return next((o for o, p in self.where.items() if p is None), None)

    def _at(self, place):
        return [o for o, p in self.where.items() if p == place]

    def _page(self):
        """Where I am, what I hold, what I saw where, and where I did not look yet."""
        done, held, here = self._delivered(), self._held(), self.at
        state = lambda o: "".join(
            f" {word}" for word in (self.state.get(o), o in done and "done") if word
        )
        lamp = lambda p: ["lamp 1"] * (p == self.lamp)
        at = f"{here or 'the middle'}{' closed' * (here in self.shut)}"
        around = (
            " ".join(lamp(here) + [o + state(o) for o in self._at(here)])
            if here in self.seen
            else ""
        )
        elsewhere = [p for p in self.seen if p != here]
        known = ", ".join(
            f"{o} {p}{state(o)}"
            for p in elsewhere
            for o in lamp(p) + [o for o in self._at(p) if o not in done]
        )
        unknown = " ".join(p for p in self.places if p not in self.seen)
        hour = DAY[self.steps * len(DAY) // (self.max_steps + 1)]
        return (
            f"{hour}. At {at}: {around or 'nothing'}. Hold {held + state(held) if held else 'nothing'}. "
            f"Unseen {unknown or 'nothing'}. Seen {' '.join(elsewhere) or 'nothing'}. Recall {known or 'nothing'}."
        )

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
        """The share of the task's subtasks that are done: taken, made clean, hot or cool, delivered (or lit)."""
        mine = [o for o in self.where if kind(o) == self.obj]
        treated = [o for o in mine if self.goal_state in (None, self.state.get(o))]
        goals = {
            "look_at_obj_in_light": [self.lit],
            "pick_two_obj_and_place": [n <= len(self._delivered()) for n in (1, 2)],
        }
        done = [
            any(self.where[o] is None or o in self._delivered() for o in mine),
            *([bool(treated)] if self.goal_state else []),
            *goals.get(self.task_type, [self.won]),
        ]
        return sum(done) / len(done)

    # ---- the scripted expert ------------------------------------------------------------------------------------------

    def expert(self, subgoal):
        """What a good housekeeper with `subgoal` in hand does now -> (switch, subgoal, action); None where no episode runs.

        KEEP while the subgoal is neither reached nor hopeless, whether or not it serves the task; else SWITCH to one that does.
        """
        if self.done:
            return None
        action = self._pursue(subgoal)
        goal = subgoal if action else self._plan()
        return action is None, goal, action or self._pursue(goal)

    def subgoals(self):
        """All that one could set out to do now; what the task wants is among them."""
        held = self._held()
        if held is None:
            return [f"find {self.obj}"]
        if kind(held) != self.obj:
            return [f"drop {kind(held)}"]
        treat = [
            f"{verb} {self.obj}"
            for verb, state in APPLIANCES.values()
            if self.state.get(held) != state
        ]
        return treat + ["use lamp"] * (not self.lit) + [f"put {self.obj} in {self.dest}"]

    def _plan(self):
        """The subgoal that serves the task now."""
        held, goals = self._held(), self.subgoals()
        if held is None or kind(held) != self.obj:
            return goals[0]
        if self.task_type == "look_at_obj_in_light":
            return "use lamp"
        if self.goal_state and self.state.get(held) != self.goal_state:
            return next(
                f"{verb} {self.obj}"
                for verb, state in APPLIANCES.values()
                if state == self.goal_state
            )
        return goals[-1]

    def _pursue(self, subgoal):
        """The next command towards `subgoal`, or None where it is reached, hopeless or not one of ours."""
        if subgoal not in self.subgoals():
            return None
        verb, held = subgoal.split()[0], self._held()
        if verb == "find":
            out = self._delivered()
            lying = [
                o
                for o, p in self.where.items()
                if kind(o) == self.obj and o not in out and p in self.seen
            ]
            return self._fetch(lying[0]) if lying else self._search()
        if verb == "use":
            return (
                (self._reach(self.lamp) or "use lamp 1")
                if self.lamp in self.seen
                else self._search()
            )
        if verb in ("put", "drop"):
            spot = next(
                p
                for p in [self.at, *self.seen, *self.places]
                if p in self.places and (verb == "drop" or kind(p) == self.dest)
            )
            return self._reach(spot) or f"move {held} to {spot}"
        place = next(p for p, (does, _) in APPLIANCES.items() if does == verb)
        return self._reach(place) or f"{verb} {held} with {place}"

    def _fetch(self, thing):
        return self._reach(self.where[thing]) or f"take {thing} from {self.where[thing]}"

    def _search(self):
        """Look into the first place not seen yet, the one at hand before all."""
        here = [self.at] if self.at in self.places and self.at not in self.seen else []
        return self._reach((here + [p for p in self.places if p not in self.seen])[0])

    def _reach(self, place):
        """The next command on the way to `place` standing open, or None when that is done."""
        if self.at != place:
            return f"go to {place}"
        return f"open {place}" if place in self.shut else None
