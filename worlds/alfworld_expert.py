"""A scripted expert for one game of ALFWorld. It reads from the game's walkthrough what to do.

    expert = Expert(gamefile, walkthrough)
    expert.reset(page)                          when the game starts; an alfworld_page.Page
    expert.update(*parse_action(action))        after each action that did something, and after the
                                                page's own update
    switch, subgoal, action = expert.advise(subgoal, admissible)

It does not use the walkthrough's knowledge of where an object lies that was not seen yet. It starts
up to four places before that place and inspects, one after the other, all places that the page
lists as unseen. Nothing here needs the engine.
"""

import re
import zlib
from pathlib import Path

APPLIANCES = {"clean": "sinkbasin 1", "heat": "microwave 1", "cool": "fridge 1"}


class Expert:
    """gamefile: its folders' names decide where a search starts. walkthrough: actions that win.

    An empty walkthrough means no advice and no subgoals.
    """

    def __init__(self, gamefile, walkthrough):
        self._game = "/".join(Path(gamefile).parts[-3:-1])  # the same wherever the data lies
        self._target = ""  # the kind of the object that the task is about
        self._target_place = ""
        self._find_goal = ""
        self._treatment = ""  # clean, heat or cool
        self._destination = ""
        self._light_goal = ""
        self._lamp_place = ""
        here = None
        for action in walkthrough:
            verb, thing, place = parse_action(action)
            if verb == "go":
                here = place
            elif verb == "take" and not self._target:
                self._target = kind(thing)
                self._target_place = place
                self._find_goal = subgoal_of(action)
            elif verb in APPLIANCES:
                self._treatment = verb
            elif verb == "move":
                self._destination = place
            elif verb == "use":
                self._light_goal = subgoal_of(action)
                self._lamp_place = here

    def reset(self, page):
        """The game starts; nothing has been done yet."""
        self._page = page
        self._delivered = set()

    def update(self, verb, thing, place):
        """Keep track of the objects that lie at the destination in the required state."""
        if verb == "take":
            self._delivered.discard(thing)
        elif verb == "move" and self._delivers(thing, place):
            self._delivered.add(thing)

    def _delivers(self, thing, place):
        at_destination = self._destination and kind(place) == kind(self._destination)
        return at_destination and kind(thing) == self._target and self._is_treated(thing)

    def advise(self, subgoal, admissible):
        """The decision under `subgoal` -> (switch, subgoal, action), or None without advice.

        It keeps the subgoal until it is reached or cannot be reached, whether or not it serves the
        task. Then it switches to one that serves the task. admissible: list of str.
        """
        if not self._target:
            return None
        action = self._pursue(subgoal, admissible)
        if action:
            return False, subgoal, action
        subgoal = self._plan()
        action = self._pursue(subgoal, admissible)
        return (True, subgoal, action) if action else None

    def subgoals(self):
        """All subgoals that can be pursued now. The one that serves the task is among them."""
        if not self._target:
            return []
        held = self._page.held
        if held is None:
            return [self._find_goal]
        if kind(held) != self._target:
            return [f"put down {kind(held)}"]
        goals = []
        for verb, appliance in APPLIANCES.items():
            treated = verb in self._page.treatments.get(held, ())
            if appliance in self._page.places and not treated:
                goals.append(subgoal_of(f"{verb} {held} with {appliance}"))
        if self._light_goal:
            goals.append(self._light_goal)
        if self._destination:
            goals.append(subgoal_of(f"move {held} to {self._destination}"))
        return goals

    def _plan(self):
        """The subgoal that serves the task now."""
        goals = self.subgoals()
        held = self._page.held
        if held is None or kind(held) != self._target:
            return goals[0]
        return goals[-1] if self._is_treated(held) else f"{self._treatment} {self._target}"

    def _is_treated(self, thing):
        return not self._treatment or self._treatment in self._page.treatments.get(thing, ())

    def _pursue(self, subgoal, admissible):
        """The next action towards `subgoal`, or None where it is reached or cannot be pursued."""
        if subgoal not in self.subgoals():
            return None
        verb = subgoal.split(" ", 1)[0]
        if verb == "find":
            return self._find(admissible)
        if verb == "use":
            return self._use_lamp(subgoal, admissible)
        if verb in APPLIANCES:
            return self._treat(verb, admissible)
        if subgoal.startswith("put down"):
            return self._put_down(admissible)
        return self._deliver(admissible)

    def _find(self, admissible):
        """Take one of the target objects, or go on towards one."""
        for action in admissible:
            _, thing, _ = parse_action(action)
            if action.startswith(f"take {self._target} ") and thing not in self._delivered:
                return action
        return self._approach(self._target, self._target_place, admissible)

    def _use_lamp(self, subgoal, admissible):
        for action in admissible:
            if action.startswith(subgoal):
                return action
        return self._approach(subgoal.removeprefix("use "), self._lamp_place, admissible)

    def _treat(self, verb, admissible):
        appliance = APPLIANCES[verb]
        actions = [f"{verb} {self._page.held} with {appliance}", f"go to {appliance}"]
        return _first_admissible(actions, admissible)

    def _put_down(self, admissible):
        """Put the held object down here; if this place takes nothing, go to the next one."""
        for action in admissible:
            if action.startswith(f"move {self._page.held} to "):
                return action
        return reach(self._page.places_from_here(), admissible)

    def _deliver(self, admissible):
        wanted = kind(self._destination)
        place = next(place for place in self._page.places if kind(place) == wanted)
        return reach([place], admissible) or f"move {self._page.held} to {place}"

    def _approach(self, thing_kind, hidden_place, admissible):
        """Go to where a thing of this kind was seen, else to the next place not inspected yet.

        A search starts, at the beginning of the game, up to four places before `hidden_place`,
        where the walkthrough finds the thing.
        """
        page = self._page
        for thing, place in page.locations.items():
            if kind(thing) == thing_kind and thing not in self._delivered:
                return reach([place], admissible)
        if not page.place:
            offset = zlib.crc32(self._game.encode()) % 5
            start = max(0, page.places.index(hidden_place) - offset)
            return reach([page.places[start]], admissible)
        unseen = [place for place in page.places_from_here() if place not in page.inspected]
        return reach(unseen, admissible)


def parse_action(action):
    """-> (verb, thing, place), "" for what is missing.

    "take mug 1 from desk 2" -> ("take", "mug 1", "desk 2"); "go to desk 2" -> ("go", "", "desk 2");
    "use desklamp 1" -> ("use", "desklamp 1", "")
    """
    verb, _, rest = action.partition(" ")
    thing, *place = re.split("(?:^| )(?:from|to|with) ", rest, maxsplit=1)
    return verb, thing, "".join(place)


def kind(name):
    """'mug 2' -> 'mug'"""
    return name.rpartition(" ")[0]


def natural_order(name):
    """Sort key of a name: its kind, then its number."""
    return kind(name), int(name.rpartition(" ")[2])


def subgoal_of(action):
    """The subgoal that an action reaches, without numbers.

    "take mug 1 from desk 2" -> "find and take mug"; "move mug 1 to shelf 2" -> "put mug in shelf";
    "clean mug 1 with sinkbasin 1" -> "clean mug"; "use desklamp 1" -> "use desklamp"
    """
    words = re.sub(r" \d+", "", action).split()
    if words[0] == "take":
        return f"find and take {words[1]}"
    if words[0] == "move":
        return f"put {words[1]} in {words[3]}"
    return " ".join(words[:2])


def reach(places, admissible):
    """The next action on the way to the first of `places` that the agent is not at or not opened.

    None where there is none left. Two places may share one position of the agent.
    """
    actions = [action for place in places for action in (f"go to {place}", f"open {place}")]
    return _first_admissible(actions, admissible)


def _first_admissible(actions, admissible):
    return next((action for action in actions if action in admissible), None)


def disguise(episodes, rng):
    """Episodes with the kinds of things, and the kinds of places, renamed among each other.

    Each episode is renamed in another way, so that a clone cannot memorize where things lie ("a mug
    is in desk 1") and has to read it. Appliances keep their names, because which of them heats is
    fixed. episodes: list of lists of (text, text, anything) -> the same.
    """
    text = "\n".join(text for turns in episodes for *texts, _ in turns for text in texts)
    reached = set(re.findall(r"go to ([a-z]+) \d", text))
    places = sorted(reached - {kind(place) for place in APPLIANCES.values()})
    things = sorted(set(re.findall(r"\b([a-z]+) \d", text)) - reached)
    names = places + things
    pattern = re.compile(rf"\b({'|'.join(names)})\b")
    disguised = []
    for turns in episodes:
        new_places = rng.sample(places, len(places))
        new_things = rng.sample(things, len(things))
        renamed = dict(zip(names, new_places + new_things, strict=True))
        disguised.append([_rename(turn, pattern, renamed) for turn in turns])
    return disguised


def _rename(turn, pattern, renamed):
    *texts, rest = turn
    new_texts = [pattern.sub(lambda match: renamed[match[0]], text) for text in texts]
    return (*new_texts, rest)
