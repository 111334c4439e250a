"""A demonstrator for one game of ALFWorld, for where there are no pretrained weights: what he is to do he has from the game's walkthrough.

    demonstrator = Demonstrator(gamefile, walkthrough)
    demonstrator.reset(page)                            at the game's beginning; an alfworld_page.Page, which knows what happened since
    demonstrator.follow(*parts(action))                 after each action that did something, and after the page
    switch, subgoal, action = demonstrator.advise(carried, admissible)

Where a thing lies that he has not seen he pretends not to know: he begins up to four places before and looks into all that the page names
as unseen, one after the other. Nothing here needs the engine; admissible actions are lists of str.
"""

import re
import zlib
from pathlib import Path

APPLIANCES = {"clean": "sinkbasin 1", "heat": "microwave 1", "cool": "fridge 1"}


class Demonstrator:
    """gamefile: the names of its folders decide where a search begins. walkthrough: actions that win the game; empty for no advice."""

    def __init__(self, gamefile, walkthrough):
        self._game, here = "/".join(Path(gamefile).parts[-3:-1]), None  # wherever the data lies
        self._where, self._kind, self._seek, self._treat, self._dest, self._light, self._lamp = [
            ""
        ] * 7
        for action in walkthrough:  # what it gives away
            verb, thing, place = parts(action)
            if verb == "go":
                here = place
            elif verb == "take":
                self._where, self._kind, self._seek = (
                    self._where or place,
                    self._kind or kind(thing),
                    self._seek or subgoal_of(action),
                )
            elif verb in APPLIANCES:
                self._treat = verb
            elif verb == "move":
                self._dest = place
            elif verb == "use":
                self._light, self._lamp = subgoal_of(action), here

    def reset(self, page):
        """The game begins; nothing has been done yet."""
        self._page, self._delivered = page, set()

    def follow(self, verb, thing, place):
        """Keep in mind what lies where it shall."""
        if verb == "take":
            self._delivered.discard(thing)
        elif (
            verb == "move"
            and self._dest
            and kind(place) == kind(self._dest)
            and kind(thing) == self._kind
            and self._treated(thing)
        ):
            self._delivered.add(thing)

    def advise(self, subgoal, admissible):
        """What he does now who carries `subgoal` -> (switch, subgoal, action), or None where he cannot say.

        KEEP until the subgoal is reached or hopeless, whether or not it serves the task; else SWITCH to one that does.
        """
        if not self._kind:
            return None
        keeps = self._pursue(subgoal, admissible)
        goal = subgoal if keeps else self._plan()
        action = keeps or self._pursue(goal, admissible)
        return (not keeps, goal, action) if action else None

    def subgoals(self):
        """All that one could set out to do now; what the task wants is among them. Empty for a game without walkthrough."""
        if not self._kind:
            return []
        if self._page.held is None:
            return [self._seek]
        if kind(self._page.held) != self._kind:
            return [f"put down {kind(self._page.held)}"]
        treat = [
            subgoal_of(f"{verb} {self._page.held} with {place}")
            for verb, place in APPLIANCES.items()
            if place in self._page.places and verb not in self._page.marks.get(self._page.held, ())
        ]
        bring = [subgoal_of(f"move {self._page.held} to {self._dest}")] if self._dest else []
        return treat + [self._light] * bool(self._light) + bring

    def _plan(self):
        """The subgoal that serves the task now."""
        goals = self.subgoals()
        if self._page.held is None or kind(self._page.held) != self._kind:
            return goals[0]
        return goals[-1] if self._treated(self._page.held) else f"{self._treat} {self._kind}"

    def _treated(self, thing):
        return not self._treat or self._treat in self._page.marks.get(thing, ())

    def _pursue(self, subgoal, admissible):
        """The next action towards `subgoal`, or None where it is reached, hopeless or not one of ours."""
        if subgoal not in self.subgoals():
            return None
        verb, held = subgoal.split(" ", 1)[0], self._page.held
        if verb == "find":
            return self._find(admissible)
        if verb == "use":
            here = [a for a in admissible if a.startswith(subgoal)]
            return (
                here[0]
                if here
                else self._toward(subgoal.removeprefix("use "), self._lamp, admissible)
            )
        if verb in APPLIANCES:
            place = APPLIANCES[verb]
            return next(
                (a for a in (f"{verb} {held} with {place}", f"go to {place}") if a in admissible),
                None,
            )
        if subgoal.startswith("put down"):  # not everything can be put everywhere
            return next((a for a in admissible if a.startswith(f"move {held} to ")), None) or reach(
                self._page.around(), admissible
            )
        spot = next(place for place in self._page.places if kind(place) == kind(self._dest))
        return reach([spot], admissible) or f"move {held} to {spot}"

    def _find(self, admissible):
        """Take one of the things, or go on towards one."""
        wanted = (
            a
            for a in admissible
            if a.startswith(f"take {self._kind} ") and parts(a)[1] not in self._delivered
        )
        return next(wanted, None) or self._toward(self._kind, self._where, admissible)

    def _toward(self, sort, place, admissible):
        """Go where a thing of this kind was seen; else into the next place unseen; at the game's beginning near `place`, where one is."""
        seen = [
            place
            for thing, place in self._page.lies.items()
            if kind(thing) == sort and thing not in self._delivered
        ]
        if not seen and not self._page.place:
            seen = [
                self._page.places[
                    max(0, self._page.places.index(place) - zlib.crc32(self._game.encode()) % 5)
                ]
            ]
        return reach(
            seen[:1] or [place for place in self._page.around() if place not in self._page.known],
            admissible,
        )


def parts(action):
    """ "take mug 1 from desk 2" -> ("take", "mug 1", "desk 2"); "go to desk 2" -> ("go", "", "desk 2"); "use desklamp 1" -> (..., "")"""
    verb, _, rest = action.partition(" ")
    thing, *place = re.split("(?:^| )(?:from|to|with) ", rest, maxsplit=1)
    return verb, thing, "".join(place)


def kind(name):
    """'mug 2' -> 'mug'"""
    return name.rpartition(" ")[0]


def natural(name):
    """Names in the order of kind and number."""
    return kind(name), int(name.rpartition(" ")[2])


def subgoal_of(deed):
    """Without numbers: "take mug 1 from desk 2" -> "find and take mug"; "move mug 1 to shelf 2" -> "put mug in shelf";
    "clean mug 1 with sinkbasin 1" -> "clean mug"; "use desklamp 1" -> "use desklamp"."""
    words = re.sub(r" \d+", "", deed).split()
    if words[0] == "take":
        return f"find and take {words[1]}"
    return f"put {words[1]} in {words[3]}" if words[0] == "move" else " ".join(words[:2])


def reach(places, admissible):
    """The next action on the way to the first of `places` that one does not stand at with its door open; None where that is done.
    Two places may be one spot to stand on."""
    return next(
        (
            action
            for place in places
            for action in (f"go to {place}", f"open {place}")
            if action in admissible
        ),
        None,
    )


def disguise(episodes, rng):
    """Episodes' texts with kinds of things, and kinds of places, called by each other's names, in each episode in another way.

    What a clone would else recite ("a mug lies in desk 1") it must then read. The appliances keep their names: that one heats in a
    microwave is no matter of reading. episodes: lists of (text, text, anything) -> the same.
    """
    text = "\n".join(text for turns in episodes for *texts, _ in turns for text in texts)
    reached = set(re.findall(r"go to ([a-z]+) \d", text))
    places = sorted(reached - {kind(place) for place in APPLIANCES.values()})
    things = sorted(set(re.findall(r"\b([a-z]+) \d", text)) - reached)
    word, shown = re.compile(rf"\b({'|'.join(places + things)})\b"), []
    for turns in episodes:
        called = dict(
            zip(places + things, rng.sample(places, len(places)) + rng.sample(things, len(things)))
        )
        shown.append(
            [
                (*(word.sub(lambda name: called[name[0]], text) for text in texts), left)
                for *texts, left in turns
            ]
        )
    return shown
