"""What a player of ALFWorld has seen so far, on one page, for a model too small to keep it in mind from the game's own sentences.

    Nothing happens. At desk 1: mug 2. Hold nothing. Seen mug 1 at bed 1. Named shelf 1 with mug 3, shelf 2. Unseen drawer 1, fridge 1.

Nothing is there but what the engine has said to the player, and of that what concerns the task: no things but of the kinds that it
names. `At` tells the place and what lies in it, or that it is closed; `Named` the places of a kind that the task names, and what
lies there; `Seen` what lies elsewhere; `Lamp` where the task's lamp is; `Unseen` the places not yet looked into, in the order of
their names, round from where one is. What is in hand has the marks of what was done to it: `Hold mug 2 clean`.
"""

import re

from worlds.alfworld_expert import APPLIANCES, kind

NOTHING = "Nothing happens."
LAMPS = ("desklamp", "floorlamp")  # which nobody takes


class Page:
    """places: names in their order; task: the sentence."""

    def __init__(self, places, task):
        self.places, self.words = places, set(re.findall(r"[a-z]+", task))
        self.place, self.held, self.lies, self.known, self.shut, self.marks, self.nothing = (
            None,
            None,
            {},
            set(),
            set(),
            {},
            False,
        )

    def follow(self, verb, thing, place, observation):
        """An action's parts (see alfworld_expert.parts) and what the engine answered."""
        self.nothing = observation == NOTHING
        if self.nothing:
            return
        if verb in ("go", "open", "close"):
            self.place = place = place or thing
            (self.shut.add if "is closed" in observation or verb == "close" else self.shut.discard)(
                place
            )
            if "you see" in observation:
                self.known.add(place)
                self.lies = {what: where for what, where in self.lies.items() if where != place}
                self.lies.update(
                    dict.fromkeys(re.findall(r"\ban? ([a-z]+ \d+)", observation), place)
                )
        elif verb == "take":
            self.held = thing
            self.lies.pop(thing, None)
        elif verb == "move":
            self.held, self.lies[thing] = None, place
        elif verb in APPLIANCES:
            marks = self.marks.setdefault(thing, [])
            marks[:] = [mark for mark in marks if "clean" in (verb, mark) and mark != verb] + [
                verb
            ]  # what is heated is not cool

    def around(self):
        """All places in the order of their names, round from where one is."""
        turn = self.places.index(self.place) if self.place else 0
        return self.places[turn:] + self.places[:turn]

    def __str__(self):
        named = lambda name: kind(name) in self.words
        things = {
            thing: place
            for thing, place in self.lies.items()
            if named(thing) and kind(thing) not in LAMPS
        }
        lying = {
            place: ", ".join(thing for thing, where in things.items() if where == place)
            for place in self.places
        }
        at = (
            "In the middle."
            if not self.place
            else f"At {self.place} closed."
            if self.place in self.shut
            else f"At {self.place}: {lying[self.place] or 'nothing'}."
        )
        lists = {
            "Seen": [
                f"{thing} at {place}"
                for thing, place in things.items()
                if place != self.place and not named(place)
            ],
            "Named": [
                place + f" with {lying[place]}" * bool(lying[place])
                for place in self.places
                if named(place)
            ],
            "Lamp": [
                f"{thing} at {place}"
                for thing, place in self.lies.items()
                if named(thing) and kind(thing) in LAMPS
            ],
            "Unseen": [
                place for place in self.around() if place not in self.known and place != self.place
            ],
        }
        hold = " ".join([self.held or "nothing", *self.marks.get(self.held, ())])
        return " ".join(
            [NOTHING] * self.nothing
            + [at, f"Hold {hold}."]
            + [f"{name} {', '.join(x)}." for name, x in lists.items() if x]
        )
