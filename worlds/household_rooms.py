"""The rooms of household.py: their places and objects, and what the train split never has.

A *layout* is the multiset of the storage kinds of a room. A *pair* is an object kind and a storage
kind where it starts or must be brought. Rooms of the unseen split have layouts that never occur in
train. Their target object starts in a pair, and must be brought to a pair, that never occurs in
train, not even for other objects. Every object has two such places, so an unseen task moves things
between desk and drawer, shelf and cabinet, or table and box.
"""

import itertools
from dataclasses import dataclass

OPEN = ("desk", "shelf", "table")
CLOSED = ("drawer", "cabinet", "box")
STORAGE = OPEN + CLOSED
OBJECTS = ("mug", "plate", "apple", "egg", "knife", "book", "watch", "cloth", "soap")
LAYOUTS = [
    layout
    for layout in itertools.combinations_with_replacement(STORAGE, 4)
    if max(map(layout.count, layout)) <= 2
]
UNSEEN_LAYOUTS = LAYOUTS[::4]
TRAIN_LAYOUTS = [layout for layout in LAYOUTS if layout not in UNSEEN_LAYOUTS]


@dataclass(frozen=True)
class Room:
    places: list  # storage places, e.g. "shelf 2"
    home: dict  # object -> the place where it starts
    lamp: str  # the place with the lamp
    obj: str  # kind of the target objects
    dest: str  # kind of the place where the task wants them


def kind(name):
    """'mug 2' -> 'mug'"""
    return name.rpartition(" ")[0]


def held_out(obj, place):
    """Whether the pair (object kind, storage kind) is kept out of train: two of six per object."""
    return (OBJECTS.index(obj) + STORAGE.index(place)) % 3 == 0


def draw_room(rng, unseen, two):
    """A random room. `two`: with two target objects. The order of the draws defines the tasks."""
    layout, obj, allowed = _draw_layout(rng, unseen)
    start, dest = rng.sample(allowed, 2)
    places = [f"{p} {layout[:i].count(p) + 1}" for i, p in enumerate(layout)]
    rng.shuffle(places)
    if two:
        numbers = [1, 2]
        start_kinds = [p for p in allowed if p != dest]
    else:
        numbers = [rng.randint(1, 2)]
        start_kinds = [start]
    home = {}
    for number in numbers:
        home[f"{obj} {number}"] = rng.choice([p for p in places if kind(p) in start_kinds])
    for other in rng.sample([o for o in OBJECTS if o != obj], 2):
        candidates = [p for p in places if unseen or not held_out(other, kind(p))]
        if candidates:
            place = rng.choice(candidates)
            home[f"{other} {rng.randint(1, 2)}"] = place
    surfaces = [p for p in places if kind(p) in OPEN]
    lamp = rng.choice(surfaces) if surfaces else places[0]
    return Room(places, home, lamp, obj=obj, dest=dest)


def _draw_layout(rng, unseen):
    """-> (layout, object kind, the two or more storage kinds allowed as its start and goal)."""
    while True:
        layout = rng.choice(UNSEEN_LAYOUTS if unseen else TRAIN_LAYOUTS)
        obj = rng.choice(OBJECTS)
        allowed = sorted({p for p in layout if held_out(obj, p) == unseen})
        if len(allowed) >= 2:
            return layout, obj, allowed
