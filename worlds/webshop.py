"""WebShop as a world (see envs.py): goals split once and for all, an oracle buyer, and a made-up catalogue where there is no data.

    env = make("test", 0)
    observation, info = env.reset()
    observation, reward, terminated, truncated, info = env.step("search[red shoes]")

observation  str: the page from the instruction on; the instruction itself is `info["task"]`.
reward       1.0 for a purchase that scores 1.0, else 0.0.
terminated   something was bought. truncated: `max_steps` steps without buying.
info         task (str), task_type (str, the product's category), admissible (list of str), won (bool), score (float: WebShop's
             own score of the purchase, 0 to 1; its mean times 100 is the "task score" of papers), subgoals (list of str),
             progress (float, see --checklist), page (str, see --page).

Data: $WEBSHOP_DATA, see webshop.py. Unset: the made-up catalogue, and a line on stderr that says so.

Splits. All goals are shuffled once (seed 233, the original's); the first 500 are test, all others train, but for doubles of test
goals (one in the 1000 products). In the released code of the paper's line each worker process shuffles for itself, so that training
meets the test goals: `overlap` says how many. Even so a test goal is seldom a new product: it asks for other options of one (96 %).
"""

import functools
import os
import random
import re
import sys

from worlds.webshop_engine import SUBPAGES, Catalogue, WebShop

SPLITS = ("train", "test")
IN_PROCESS = True  # pure Python: envs.Runner may keep many in one process
MAX_STEPS = 15
TEST, SHUFFLE = 500, 233  # goals in test; the seed of the one shuffle


def size(split):
    """Number of goals in `split`; errors as in `goals`."""
    return len(goals(split))


def make(split="train", index=0, max_steps=MAX_STEPS):
    """The env of goal `index` of `split`, the same one every time. IndexError where there is none; others as in `goals`."""
    if not 0 <= index < size(split):
        raise IndexError(f"webshop's split {split!r} has tasks 0 to {size(split) - 1}, not {index}")
    return WebShopEnv(_load(_folder())[0], goals(split)[index], max_steps)


def goals(split):
    """The goals of a split: list of dicts as in Catalogue.goals. ValueError: no such split. RuntimeError: see Catalogue.load."""
    if split not in SPLITS:
        raise ValueError(f"webshop has no split {split!r}: choose one of {', '.join(SPLITS)}")
    return _load(_folder())[1][split]


def overlap(workers, number=6910):
    """Share of the 500 test goals that are trained on where each of `workers` shuffles all `number` goals with a seed of its own
    (0, 1, ...) and trains on what comes after its first 500, as in the released code. Here it is 0."""
    trained = set().union(*(_shuffled(number, seed)[TEST:] for seed in range(workers)))
    return len(trained.intersection(_shuffled(number, SHUFFLE)[:TEST])) / TEST


def _folder():
    return os.environ.get("WEBSHOP_DATA", "")


@functools.lru_cache(maxsize=1)
def _load(folder):
    """(catalogue, {split: goals}), read once per process and shared by its envs."""
    if not folder:
        print(
            "WEBSHOP_DATA is not set: a made-up catalogue stands in for WebShop's products.",
            file=sys.stderr,
        )
    catalogue = Catalogue.load(folder) if folder else Catalogue(*made_up())
    shuffled = [catalogue.goals[i] for i in _shuffled(len(catalogue.goals), SHUFFLE)]
    test, same = shuffled[:TEST], lambda goal: (goal["asin"], goal["instruction"])
    seen = set(map(same, test))  # a product may list one value twice
    return catalogue, {
        "test": test,
        "train": [goal for goal in shuffled[TEST:] if same(goal) not in seen],
    }


def _shuffled(number, seed):
    order = list(range(number))
    random.Random(seed).shuffle(order)
    return order


class WebShopEnv:
    """One goal; Gymnasium's signatures."""

    def __init__(self, catalogue, goal, max_steps=MAX_STEPS):
        self.shop, self.goal, self.max_steps, self.done = WebShop(catalogue), goal, max_steps, True
        self.product = catalogue.products[goal["asin"]]

    def reset(self, seed=None):
        """-> (observation, info). `seed` is accepted and not needed: nothing here is random."""
        self.shop.reset(self.goal)
        self.steps, self.done = 0, False
        return self.shop.body, self._info()

    def step(self, action):
        """-> (observation, reward, terminated, truncated, info). What is not admissible costs a step, nothing else."""
        if self.done:
            raise RuntimeError("the episode has ended (or not begun): call reset before step")
        _, score, bought = self.shop.step(action)
        self.steps += 1
        truncated = not bought and self.steps >= self.max_steps
        self.done = bought or truncated
        return self.shop.body, float(score == 1.0), bought, truncated, self._info()

    def close(self):
        pass

    def _info(self):
        actions = ["search[<your query>]"] * (self.shop.page == "index") + [
            f"click[{text}]" for text in self.shop.clickables
        ]
        return {
            "task": self.goal["instruction"],
            "task_type": self.product.category,
            "admissible": actions,
            "won": self.shop.score == 1.0,
            "score": self.shop.score,
            "subgoals": self.subgoals(),
            "progress": self._progress(),
            "page": self._page(),
        }

    def _page(self):
        """What the shop shows, in a line, for a model too small to read all of it: of a product the first words of its name, the values
        that the instruction asks for, of options not yet chosen, and those chosen; of ten results the first words."""
        shop, products = self.shop, self.shop.catalogue.products
        brief = lambda asin: " ".join(
            [asin, *re.findall(r"[a-z]+", products[asin].name.lower())[:5]]
        )
        if shop.page == "results":
            return f"Results {shop.number}: {', '.join(map(brief, filter(None, shop.links.values()))) or 'none'}."
        if not shop.asin:
            return "Search."
        left = [
            value
            for option, values in products[shop.asin].options.items()
            if option not in shop.options
            for value in values
            if f": {value}," in self.goal["instruction"] + ","
        ]
        where = "Product" if shop.page == "item" else shop.page.capitalize() + " of"
        return f"{where} {brief(shop.asin)}. Options: {', '.join(left) or 'none'}. Chosen: {', '.join(shop.options.values()) or 'none'}."

    def _progress(self):
        """The share of the task's subtasks that are done: the product's page open, each of its options chosen."""
        opened = self.shop.asin == self.product.asin
        chosen = (
            sum(self.shop.options.get(option) == value for option, value in self._options.items())
            if opened
            else 0
        )
        return (opened + chosen) / (1 + len(self._options))

    # ---- the oracle buyer ---------------------------------------------------------------------------------------------

    def expert(self, subgoal):
        """What one who knows the product would do with `subgoal` in hand -> (switch, subgoal, action).

        KEEP while the subgoal is not reached, whether or not it serves the task (`buy` too early); else SWITCH to one that does.
        None where no episode runs, or where even the right product with the right options scores less than 1.
        """
        if self.done or not self.winnable:
            return None
        action = self._pursue(subgoal)
        goal = subgoal if action else self._plan()
        return action is None, goal, action or self._pursue(goal)

    def subgoals(self):
        """All that one could set out to do now; what the task wants is among them."""
        if self.shop.asin == self.product.asin:
            return [f"choose {value}" for value in self._options.values()] + ["buy"]
        return ["open product" if self._listed() else "find product"]

    def _plan(self):
        """The subgoal that serves the task now. Options come in the page's order: the page does not show what is chosen, so that the
        subgoal one carries is all that tells what comes next."""
        missing = [
            f"choose {value}"
            for option, value in self._options.items()
            if self.shop.options.get(option) != value
        ]
        return (
            (missing or ["buy"])[0] if self.shop.asin == self.product.asin else self.subgoals()[0]
        )

    def _pursue(self, subgoal):
        """The next action towards `subgoal`, or None where it is reached or not one of ours."""
        shop, value = self.shop, subgoal.removeprefix("choose ")
        if (
            subgoal not in self.subgoals()
            or shop.options.get(self.product.links.get(value)) == value
        ):
            return None
        if shop.asin:
            wrong = shop.asin != self.product.asin or shop.page in SUBPAGES
            return (
                "click[< Prev]"
                if wrong
                else "click[Buy Now]"
                if subgoal == "buy"
                else f"click[{value}]"
            )
        if subgoal == "open product":
            return f"click[{self.product.asin}]"
        if shop.page == "results" and self._number in shop.hits:
            later = shop.hits.index(self._number) >= 10 * shop.number
            return f"click[{'Next >' if later else '< Prev'}]"
        return f"search[{self._query}]"

    def _listed(self):
        """Whether the product is on the page of results at hand."""
        return self.shop.page == "results" and self.product.asin.lower() in self.shop.links

    @functools.cached_property
    def winnable(self):
        """Whether the goal's own product with its options scores 1.0."""
        return self.shop.catalogue.score(self.goal, self.product.asin, self._options) == 1.0

    @functools.cached_property
    def _options(self):
        """{option: value} as clicking the goal's values leaves them, in the page's order: a value that two options share goes to the
        later one."""
        wanted = [
            value for value in self.goal["options"].values() if "[" not in value
        ]  # which no action can say
        chosen = {self.product.links[value]: value for value in wanted if self.product.links[value]}
        return {option: chosen[option] for option in self.product.options if option in chosen}

    @functools.cached_property
    def _number(self):
        return self.shop.catalogue.order.index(self.product)

    @functools.cached_property
    def _query(self):
        """What the instruction calls the product, and the values it asks for; where that does not find it, the instruction without its
        price, or the product's name."""
        short = " ".join([self.product.query, *self.goal["options"].values()])
        whole = re.sub(
            r"^Find me |, and price lower than \S+ dollars$", "", self.goal["instruction"]
        )
        find = self.shop.catalogue.index.search
        return next(
            (query for query in (short, whole) if self._number in find(query)), self.product.name
        )


# ---- a catalogue of nothing real ------------------------------------------------------------------------------------------

KINDS = {  # category -> department, products, attributes, options
    "beauty": (
        "Beauty & Personal Care",
        "face cream,hair mask,lip balm,body lotion,shampoo,nail polish",
        "cruelty free,paraben free,tea tree,long lasting,sensitive skin",
        {"size": "50 ml,100 ml,250 ml"},
    ),
    "electronics": (
        "Electronics",
        "headphones,phone case,power bank,desk lamp,keyboard,speaker",
        "fast charging,noise cancelling,easy to use,high speed,hands free",
        {"color": "", "style": "basic,plus,pro"},
    ),
    "fashion": (
        "Clothing, Shoes & Jewelry",
        "running shoes,winter jacket,jeans,summer dress,t-shirt,sandals",
        "machine wash,rubber sole,slim fit,quick drying,elastic waist",
        {"color": "", "size": "small,medium,large,x-large"},
    ),
    "garden": (
        "Home & Kitchen",
        "coffee table,floor rug,wall clock,bookshelf,throw pillow,table lamp",
        "easy assemble,space saving,solid wood,spot clean,living room",
        {"color": "", "size": "2 x 3 ft,4 x 6 ft,5 x 8 ft"},
    ),
    "grocery": (
        "Grocery & Gourmet Food",
        "green tea,trail mix,dark chocolate,pasta sauce,protein bar,olive oil",
        "gluten free,non gmo,low sugar,plant based,dairy free",
        {"flavor name": "plain,chili,garlic", "size": "6 ounce,12 ounce"},
    ),
}
BRANDS = (
    "Alder Bramble Corvo Dunmore Elmira Fennick Garrow Halden Isolde Junip Kestrel Lumen".split()
)
SHADES = "black,blue,green,grey,orange,white"  # every color


def made_up(products=300, seed=0):
    """(products, instructions) in the form of WebShop's two files, the same ones for the same seed."""
    rng, items, instructions = random.Random(seed), [], {}
    for number in range(products):
        category = rng.choice(sorted(KINDS))
        department, things, traits, options = KINDS[category]
        thing, traits = rng.choice(things.split(",")), rng.sample(traits.split(","), 3)
        name = f"{rng.choice(BRANDS)} {thing.title()} No. {number + 1}, {traits[0].title()}"
        low = rng.randint(300, 9000) / 100
        choices = {
            option: rng.sample(values, rng.randint(1, len(values)))
            for option, values in (
                (option, (values or SHADES).split(",")) for option, values in options.items()
            )
        }
        items.append(
            {
                "asin": f"B{number:09d}",
                "name": name,
                "category": category,
                "query": thing,
                "page": 1,
                "images": [""],
                "product_category": f"{department} \u203a {thing.title()}",
                "average_rating": "",
                "full_description": f"A {thing} that is made for {traits[1]} and {traits[2]}.",
                "small_description": [f"{trait.capitalize()} " for trait in traits],
                "pricing": f"${low}" + f" to ${low + 10:.2f}" * (rng.random() < 0.1),
                "customization_options": {
                    key: [{"value": v, "image": None} for v in found]
                    for key, found in choices.items()
                },
            }
        )
        wanted = rng.sample(traits, 2)
        instructions[items[-1]["asin"]] = {
            "attributes": traits,
            "instruction_attributes": wanted,
            "instruction": f"Find me {wanted[0]} {thing} with {wanted[1]}",
        }
    return items, instructions
