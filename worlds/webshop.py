"""WebShop as a world (see envs.py): fixed splits of the goals, and a scripted expert.

    env = make("test", 0)
    observation, info = env.reset()
    observation, reward, terminated, truncated, info = env.step("search[red shoes]")

observation  str: the page from the instruction on; the instruction itself is `info["task"]`.
             With `page=True`: a summary of the page in one line.
reward       1.0 for a purchase that scores 1.0, else 0.0.
terminated   something was bought.
truncated    `max_steps` steps were taken without buying.
info         task (str), task_type (str, the product's category), admissible (list of str), won
             (bool), score (float, WebShop's own score of the purchase, 0 to 1; its mean times 100
             is the "task score" of papers), subgoals (list of str), progress (float, 0 to 1).

Data: $WEBSHOP_DATA, see webshop_engine.py. If it is unset, a made-up catalogue is used
(webshop_made_up.py), and a line on stderr says so.

Splits. All goals are shuffled once (seed 233, the original's). The first 500 are test. All others
are train, except those equal to a test goal (one in the 1000 products). In the released code each
worker process shuffles for itself, so that training meets the test goals; `overlap` says how many.
Even with disjoint goals a test goal is seldom a new product: 96 % ask for other options of a
product in train.
"""

import functools
import os
import random
import re
import sys

from worlds.webshop_engine import HITS_PER_PAGE, SUBPAGES, Catalogue, WebShop
from worlds.webshop_made_up import made_up

SPLITS = ("train", "test")
IN_PROCESS = True  # pure Python: envs.EnvPool may keep many of these in one process
MAX_STEPS = 15
# Options of `make` for a tiny agent trained from scratch.
TINY_AGENT = {"page": True}
# Keyword arguments of support.demonstrations for this world.
DEMONSTRATOR = {"random_subgoals": 0.9, "action_noise": 0.25}

TEST_SIZE = 500
SHUFFLE_SEED = 233


def size(split):
    """Number of goals in `split`. Errors: see `goals`."""
    return len(goals(split))


def make(split="train", index=0, max_steps=MAX_STEPS, page=False):
    """The env of goal `index` of `split`, the same one every time.

    IndexError: there is no such goal. Others: see `goals`.
    """
    last = size(split) - 1
    if not 0 <= index <= last:
        raise IndexError(f"webshop's split {split!r} has tasks 0 to {last}, not {index}")
    catalogue, _ = _load(_data_folder())
    return WebShopEnv(catalogue, goals(split)[index], max_steps, page=page)


def goals(split):
    """The goals of a split: list of dicts as in Catalogue.goals.

    ValueError: unknown split. RuntimeError: see Catalogue.load.
    """
    if split not in SPLITS:
        raise ValueError(f"webshop has no split {split!r}: choose one of {', '.join(SPLITS)}")
    _, splits = _load(_data_folder())
    return splits[split]


def overlap(workers, number=6910):
    """Share of the 500 test goals that are also trained on in the released code.

    There each of `workers` shuffles all `number` goals with its own seed (0, 1, ...) and trains on
    those after its first 500. Here the share is 0.
    """
    trained = set()
    for seed in range(workers):
        trained.update(_shuffled(number, seed)[TEST_SIZE:])
    test = _shuffled(number, SHUFFLE_SEED)[:TEST_SIZE]
    return len(trained.intersection(test)) / TEST_SIZE


def _data_folder():
    return os.environ.get("WEBSHOP_DATA", "")


@functools.lru_cache(maxsize=1)
def _load(folder):
    """(catalogue, {split: goals}), read once per process and shared by its envs."""
    if folder:
        catalogue = Catalogue.load(folder)
    else:
        print(
            "WEBSHOP_DATA is not set: a made-up catalogue stands in for WebShop's products.",
            file=sys.stderr,
        )
        catalogue = Catalogue(*made_up())
    order = _shuffled(len(catalogue.goals), SHUFFLE_SEED)
    shuffled = [catalogue.goals[i] for i in order]
    test = shuffled[:TEST_SIZE]
    # Two goals are equal where a product lists one value twice.
    in_test = {_identity(goal) for goal in test}
    train = [goal for goal in shuffled[TEST_SIZE:] if _identity(goal) not in in_test]
    return catalogue, {"test": test, "train": train}


def _identity(goal):
    return goal["asin"], goal["instruction"]


def _shuffled(number, seed):
    order = list(range(number))
    random.Random(seed).shuffle(order)
    return order


class WebShopEnv:
    """One goal; Gymnasium's signatures. page: whether the observation is the summary."""

    def __init__(self, catalogue, goal, max_steps=MAX_STEPS, page=False):
        self.shop = WebShop(catalogue)
        self.goal = goal
        self.max_steps = max_steps
        self.page = page
        self.product = catalogue.products[goal["asin"]]
        self.done = True  # until the first reset

    def reset(self, seed=None):
        """-> (observation, info). `seed` is ignored: nothing here is random."""
        self.shop.reset(self.goal)
        self.steps = 0
        self.done = False
        return self._observe(), self._info()

    def step(self, action):
        """-> (observation, reward, terminated, truncated, info).

        An action that is not admissible costs a step and changes nothing else.
        """
        if self.done:
            raise RuntimeError("the episode has ended (or not begun): call reset before step")
        _, score, bought = self.shop.step(action)
        self.steps += 1
        truncated = not bought and self.steps >= self.max_steps
        self.done = bought or truncated
        return self._observe(), float(score == 1.0), bought, truncated, self._info()

    def close(self):
        """Does nothing: there is nothing to release."""

    def _info(self):
        admissible = [f"click[{text}]" for text in self.shop.clickables]
        if self.shop.page == "index":
            admissible.insert(0, "search[<your query>]")
        return {
            "task": self.goal["instruction"],
            "task_type": self.product.category,
            "admissible": admissible,
            "won": self.shop.score == 1.0,
            "score": self.shop.score,
            "subgoals": self.subgoals(),
            "progress": self._progress(),
        }

    def _progress(self):
        """The share of the subtasks that are done: open the product, choose each option."""
        done = 0
        if self.shop.asin == self.product.asin:
            done = 1 + sum(self._is_chosen(option) for option in self._options)
        return done / (1 + len(self._options))

    def _is_chosen(self, option):
        return self.shop.options.get(option) == self._options[option]

    # ---- the observation ----

    def _observe(self):
        return self._summary() if self.page else self.shop.body

    def _summary(self):
        """The page in one line, for a model too small to read all of it.

        Of a product it has the first words of its name, the values of options not yet chosen that
        the instruction asks for, and the chosen values. Of ten results it has the first words.
        """
        if self.shop.page == "results":
            asins = [asin for asin in self.shop.links.values() if asin]
            results = ", ".join(self._brief(asin) for asin in asins)
            return f"Results {self.shop.number}: {results or 'none'}."
        if not self.shop.asin:
            return "Search."
        where = "Product" if self.shop.page == "item" else f"{self.shop.page.capitalize()} of"
        options = ", ".join(self._values_left())
        chosen = ", ".join(self.shop.options.values())
        return (
            f"{where} {self._brief(self.shop.asin)}. Options: {options or 'none'}. "
            f"Chosen: {chosen or 'none'}."
        )

    def _brief(self, asin):
        name = self.shop.catalogue.products[asin].name
        return " ".join([asin, *re.findall(r"[a-z]+", name.lower())[:5]])

    def _values_left(self):
        """The open product's values that the instruction names, of options not yet chosen."""
        instruction = self.goal["instruction"] + ","
        left = []
        for option, values in self.shop.catalogue.products[self.shop.asin].options.items():
            if option not in self.shop.options:
                left += [value for value in values if f": {value}," in instruction]
        return left

    # ---- scripted expert ----

    def expert(self, subgoal):
        """The scripted expert's decision under `subgoal` -> (switch, subgoal, action).

        It knows the product. It keeps the subgoal until it is reached, whether or not it serves the
        task (`buy` too early); then it switches to one that does. None where no episode runs, or
        where even the right product with the right options scores less than 1.
        """
        if self.done or not self.winnable:
            return None
        action = self._pursue(subgoal)
        if action:
            return False, subgoal, action
        subgoal = self._plan()
        return True, subgoal, self._pursue(subgoal)

    def subgoals(self):
        """All subgoals that can be pursued now. The one that serves the task is among them."""
        if self.shop.asin == self.product.asin:
            return [f"choose {value}" for value in self._options.values()] + ["buy"]
        return ["open product" if self._is_listed() else "find product"]

    def _plan(self):
        """The subgoal that serves the task now.

        Options come in the page's order. The page does not show what is chosen, so the current
        subgoal is all that tells an agent which option comes next.
        """
        if self.shop.asin != self.product.asin:
            return self.subgoals()[0]
        for option, value in self._options.items():
            if not self._is_chosen(option):
                return f"choose {value}"
        return "buy"

    def _pursue(self, subgoal):
        """The next action towards `subgoal`, or None where it is reached or cannot be pursued."""
        if subgoal not in self.subgoals():
            return None
        value = subgoal.removeprefix("choose ")
        if self.shop.options.get(self.product.links.get(value)) == value:
            return None
        if self.shop.asin:
            return self._pursue_on_product(subgoal, value)
        if subgoal == "open product":
            return f"click[{self.product.asin}]"
        if self.shop.page == "results" and self._number in self.shop.hits:
            is_later = self.shop.hits.index(self._number) >= HITS_PER_PAGE * self.shop.number
            return "click[Next >]" if is_later else "click[< Prev]"
        return f"search[{self._query}]"

    def _pursue_on_product(self, subgoal, value):
        if self.shop.asin != self.product.asin or self.shop.page in SUBPAGES:
            return "click[< Prev]"
        return "click[Buy Now]" if subgoal == "buy" else f"click[{value}]"

    def _is_listed(self):
        """Whether the current page of results has the product."""
        return self.shop.page == "results" and self.product.asin.lower() in self.shop.links

    @functools.cached_property
    def winnable(self):
        """Whether the goal's own product with its options scores 1.0."""
        return self.shop.catalogue.score(self.goal, self.product.asin, self._options) == 1.0

    @functools.cached_property
    def _options(self):
        """{option: value} after clicking the goal's values, in the page's order.

        A value that two options share goes to the later one. A value with "[" cannot be clicked.
        """
        chosen = {}
        for value in self.goal["options"].values():
            if "[" not in value and self.product.links[value]:
                chosen[self.product.links[value]] = value
        return {option: chosen[option] for option in self.product.options if option in chosen}

    @functools.cached_property
    def _number(self):
        """The product's number in the search index."""
        return self.shop.catalogue.order.index(self.product)

    @functools.cached_property
    def _query(self):
        """The shortest query that finds the product.

        Its kind of product and the wanted values; else the instruction without its price; else the
        product's name.
        """
        instruction = self.goal["instruction"]
        short = " ".join([self.product.query, *self.goal["options"].values()])
        long = re.sub(r"^Find me |, and price lower than \S+ dollars$", "", instruction)
        for query in (short, long):
            if self._number in self.shop.catalogue.index.search(query):
                return query
        return self.product.name


if __name__ == "__main__":
    from support import play

    raise SystemExit(play.main("webshop"))
