"""One page of all that a player of ALFWorld has seen so far, for a model too small to remember it.

    Nothing happens. At desk 1: mug 2. Hold nothing. Seen mug 1 at bed 1. Named shelf 1 with mug 3,
    shelf 2. Unseen drawer 1, fridge 1.

The page has only what the engine has told the player, and only objects of kinds that the task
names. Its parts:

At       the current place and what lies there, or that it is closed
Hold     the object in hand and what was done to it: `Hold mug 2 clean`
Seen     objects elsewhere
Named    the places of a kind that the task names, and what lies there
Lamp     where the task's lamp is
Unseen   the places not inspected yet, in natural order, starting from the current one
"""

import re

from worlds.alfworld_expert import APPLIANCES, kind

NOTHING = "Nothing happens."
LAMPS = ("desklamp", "floorlamp")  # they cannot be taken


class Page:
    """Updated after every action; `str(page)` is its text.

    places  the names of all places, in natural order
    task    the task sentence
    """

    def __init__(self, places, task):
        self.places = places
        self.task_words = set(re.findall(r"[a-z]+", task))
        self.place = None  # where the player stands
        self.held = None
        self.locations = {}  # thing -> the place where it was last seen
        self.inspected = set()  # places whose contents were seen
        self.closed = set()
        self.treatments = {}  # thing -> list of clean, heat, cool
        self.nothing_happened = False

    def update(self, verb, thing, place, observation):
        """Take in an action (see alfworld_expert.parse_action) and the engine's answer to it."""
        self.nothing_happened = observation == NOTHING
        if self.nothing_happened:
            return
        if verb in ("go", "open", "close"):
            self._look(verb, place or thing, observation)
        elif verb == "take":
            self.held = thing
            self.locations.pop(thing, None)
        elif verb == "move":
            self.held = None
            self.locations[thing] = place
        elif verb in APPLIANCES:
            self._treat(verb, thing)

    def _look(self, verb, place, observation):
        self.place = place
        if verb == "close" or "is closed" in observation:
            self.closed.add(place)
        else:
            self.closed.discard(place)
        if "you see" in observation:
            self.inspected.add(place)
            elsewhere = {thing: at for thing, at in self.locations.items() if at != place}
            here = dict.fromkeys(re.findall(r"\ban? ([a-z]+ \d+)", observation), place)
            self.locations = {**elsewhere, **here}

    def _treat(self, verb, thing):
        """Heating and cooling undo each other; cleaning undoes neither and is not undone."""
        earlier = self.treatments.get(thing, [])
        kept = [other for other in earlier if other != verb and "clean" in (other, verb)]
        self.treatments[thing] = [*kept, verb]

    def places_from_here(self):
        """All places in natural order, starting from the current one."""
        start = self.places.index(self.place) if self.place else 0
        return self.places[start:] + self.places[:start]

    def __str__(self):
        sentences = [NOTHING] if self.nothing_happened else []
        sentences.append(self._at())
        hold = [self.held or "nothing", *self.treatments.get(self.held, [])]
        sentences.append(f"Hold {' '.join(hold)}.")
        lists = {
            "Seen": self._seen(),
            "Named": self._named_places(),
            "Lamp": self._lamps(),
            "Unseen": self._unseen(),
        }
        sentences += [f"{title} {', '.join(items)}." for title, items in lists.items() if items]
        return " ".join(sentences)

    def _at(self):
        if not self.place:
            return "In the middle."
        if self.place in self.closed:
            return f"At {self.place} closed."
        return f"At {self.place}: {self._contents(self.place) or 'nothing'}."

    def _seen(self):
        return [
            f"{thing} at {place}"
            for thing, place in self._things().items()
            if place != self.place and not self._is_named(place)
        ]

    def _named_places(self):
        described = []
        for place in filter(self._is_named, self.places):
            contents = self._contents(place)
            described.append(f"{place} with {contents}" if contents else place)
        return described

    def _lamps(self):
        return [
            f"{thing} at {place}"
            for thing, place in self.locations.items()
            if self._is_named(thing) and kind(thing) in LAMPS
        ]

    def _unseen(self):
        return [
            place
            for place in self.places_from_here()
            if place not in self.inspected and place != self.place
        ]

    def _contents(self, place):
        return ", ".join(thing for thing, at in self._things().items() if at == place)

    def _things(self):
        """Thing -> place, for the things that the task names and that can be taken."""
        return {
            thing: place
            for thing, place in self.locations.items()
            if self._is_named(thing) and kind(thing) not in LAMPS
        }

    def _is_named(self, name):
        return kind(name) in self.task_words
