"""WebShop (text): search a catalogue, open a product, choose its options, buy. Own implementation.

    shop = WebShop(Catalogue.load(folder))
    observation = shop.reset(shop.catalogue.goals[0])
    observation, score, done = shop.step("search[red shoes]")

The catalogue is read-only: any number of shops may share it. webshop.py makes this a world.

Data:     a folder with the files of WebShop's own set-up script: items_shuffle_1000.json and
          items_ins_v2_1000.json, or, for the full set, items_shuffle.json and items_ins_v2.json.
Package:  rapidfuzz (requirements-webshop.txt), imported when a catalogue is made.

Pages, their texts joined by " [SEP] ": index, results (ten of at most 50 hits), item, description,
features, reviews, done. Actions: search[words], on every page, and click[text], where `clickables`
has that text. Any other action changes nothing, and click[search] neither. The page does not show
which options are chosen.

Differences from the original:
 1. The type of a product in the score: see webshop_reward.py.
 2. Search: see webshop_search.py. The queries <r>, <a>, <c>, <q>, which developers use, are
    ordinary words.
 3. The last page has only the score. There are no reviews, ratings (the original's 1000 products
    have none) or images.
 4. Goals are the generated ones. Those written by people (items_human_ins.json) are not read.
 5. Prices and then limits are drawn from `seed`. The original draws them at every start.
 6. An action must match as a whole: the original also acts on `click[red] please`.
"""

import itertools
import json
import random
import re
from pathlib import Path

from worlds.webshop_reward import Reward
from worlds.webshop_search import Index

FILES = (
    ("items_shuffle_1000.json", "items_ins_v2_1000.json"),
    ("items_shuffle.json", "items_ins_v2.json"),
)
SUBPAGES = ("description", "features", "reviews")
ACTION = re.compile(r"(search|click)\[([^\[\n]+)\]")
MAX_ACTION = 4096  # characters; a longer action changes nothing
HITS_PER_PAGE = 10


def join(*texts):
    """One page. Empty texts are left out, blank ones are not, as in the original."""
    return " [SEP] ".join(text.strip() for text in texts if text)


class Product:
    """One product. raw: a dict of the products file; attributes: list of str."""

    def __init__(self, raw, attributes):
        bullets = raw["small_description"]
        self.asin = raw["asin"]  # its number
        self.name = raw["name"]
        self.description = raw["full_description"]
        self.bullets = bullets if isinstance(bullets, list) else [bullets]
        self.attributes = attributes
        self.category = raw["category"]
        self.query = raw["query"].lower().strip()
        self.levels = {level.strip() for level in raw["product_category"].split("\u203a")}
        self.options = _options(raw["customization_options"])
        self.prices = _prices(raw.get("pricing"))  # one, or a low and a high one
        price = " to ".join(f"${price}" for price in self.prices)
        self.hit = join(self.asin, self.name, price)  # its part of a page of results
        self.page = self._item_page(price)
        self.links = self._item_links()

    def _item_page(self, price):
        texts = ["Back to Search", "< Prev"]
        for name, values in self.options.items():
            texts += [name, *values]
        texts += [self.name, f"Price: {price}", "Rating: N.A."]
        return join(*texts, "Description", "Features", "Reviews", "Buy Now")

    def _item_links(self):
        """Clickable text -> the option it belongs to, None for a button."""
        links = dict.fromkeys(["back to search", "< prev", *SUBPAGES, "buy now"])
        for name, values in self.options.items():
            links.update(dict.fromkeys(values, name))  # the later option has a shared value
        return links

    def text(self):
        """What the search indexes."""
        options = [f"{name}: {', '.join(values)}" for name, values in self.options.items()]
        return " ".join([self.name, self.description, *self.bullets[:1], ", and ".join(options)])


def _options(raw):
    """{option name: list of values}, in lower case."""
    options = {}
    for name, values in (raw or {}).items():
        if values is not None:
            texts = [value["value"].strip().replace("/", " | ").lower() for value in values]
            options[name.lower()] = texts
    return options


def _prices(text):
    """ "$1,985.00 to $1,990" -> [1985.0, 1990.0]; 100 dollars where no price is given."""
    amounts = (text or "").split("$")[1:3]
    return [float(re.sub(r"[^\d.]", "", amount)) for amount in amounts] or [100.0]


class Catalogue:
    """Products, their search index and the goals.

    products, instructions  the two files, parsed
    seed                    of the prices, where a range is given, and then of the price limits
    nouns                   title -> collection of nouns, `title_words` unless given

    goals: list of dicts asin, instruction, attributes, options ({name: value}), price_upper
    (dollars), in the original's order before it shuffles: by product as in the file, then by
    combination of values, options sorted by name, the last one varying fastest.

    RuntimeError: rapidfuzz is not installed.
    """

    def __init__(self, products, instructions, *, seed=42, nouns=None):
        self.reward = Reward(nouns)
        self.products = {}  # asin -> Product
        for raw in products:
            asin = raw["asin"]
            if asin != "nan" and len(asin) <= 10 and asin not in self.products:
                attributes = instructions.get(asin, {}).get("attributes", ["DUMMY_ATTR"])
                self.products[asin] = Product(raw, attributes)
        self.order = list(self.products.values())
        self.index = Index([product.text() for product in self.order], list(self.products))
        rng = random.Random(seed)
        self.prices = {}  # asin -> dollars
        for product in self.order:
            fixed = len(product.prices) == 1
            self.prices[product.asin] = product.prices[0] if fixed else rng.uniform(*product.prices)
        self.goals = []
        for product in self.order:
            instruction = instructions.get(product.asin, {})
            if instruction.get("instruction"):
                self.goals += self._goals_of(product, instruction, rng)

    @classmethod
    def load(cls, data_dir, *, seed=42, nouns=None):
        """The catalogue of a folder; the 1000 products where it holds both sets.

        RuntimeError: the folder or a file is missing, or a file is not JSON.
        """
        folder = Path(data_dir)
        needed = f"{' and '.join(FILES[0])}, or {' and '.join(FILES[1])}"
        if not folder.is_dir():
            raise RuntimeError(
                f"there is no folder {folder}: set WEBSHOP_DATA to the one that holds {needed}"
            )
        names = next((pair for pair in FILES if (folder / pair[0]).is_file()), FILES[0])
        parsed = []
        for name in names:
            try:
                parsed.append(json.loads((folder / name).read_text(encoding="utf-8")))
            except FileNotFoundError:
                raise RuntimeError(f"{folder} has no {name}: WebShop needs {needed}") from None
            except ValueError as error:
                raise RuntimeError(
                    f"{folder / name} is not a JSON file ({error}): download it again"
                ) from None
        return cls(*parsed, seed=seed, nouns=nouns)

    def _goals_of(self, product, instruction, rng):
        """One goal for every combination of the product's option values: list of dicts."""
        limit = self._price_limit(product, rng)
        names = sorted(product.options)
        goals = []
        for values in itertools.product(*[product.options[name] for name in names]):
            options = dict(zip(names, values, strict=True))
            text = instruction["instruction"]
            if options:
                wanted = [f"{name}: {value}" for name, value in options.items()]
                text += " with " + ", and ".join(wanted)
            if limit is not None:
                text += f", and price lower than {limit:.2f} dollars"
            goal = {
                "asin": product.asin,
                "instruction": text,
                "attributes": instruction["instruction_attributes"],
                "options": options,
                "price_upper": 1_000_000 if limit is None else limit,
            }
            goals.append(goal)
        return goals

    def _price_limit(self, product, rng):
        """The larger of two of the next four multiples of 10 above the price; None at the top."""
        price = self.prices[product.asin]
        limits = [limit for limit in range(10, 1000, 10) if limit > price][:4]
        return float(max(rng.sample(limits, 2))) if len(limits) > 1 else None

    def score(self, goal, asin, options):
        """What buying product `asin` with `options` ({name: value}) scores for `goal`: float."""
        return self.reward.score(
            goal,
            wanted=self.products[goal["asin"]],
            bought=self.products[asin],
            options=options,
            price=self.prices[asin],
        )


class WebShop:
    """One session.

    page     its kind: index, results, item, description, features, reviews or done
    body     its text without the instruction
    links    clickable text -> None for a button, an option on an item page, an asin on results
    asin     the open product, or None
    options  {name: value}, what is chosen
    query, number, hits     of the last search: its text, the page of results, the found products
    """

    def __init__(self, catalogue):
        self.catalogue = catalogue
        self.done = True

    def reset(self, goal):
        """goal: a dict like those of `catalogue.goals` -> observation.

        ValueError: its product is not in the catalogue.
        """
        if goal["asin"] not in self.catalogue.products:
            raise ValueError(f"the goal's product {goal['asin']!r} is not in this catalogue")
        self.goal = goal
        self.score = 0.0
        self.done = False
        self._show_index()
        return self.observation

    @property
    def clickables(self):
        """The texts that can be clicked now: list of str, in lower case."""
        return list(self.links)

    @property
    def observation(self):
        """The whole page."""
        if self.done:
            return self.body
        title = "WebShop" if self.page == "index" else ""
        head = join(title, "Instruction:", self.goal["instruction"])
        return f"{head} [SEP] {self.body}"

    def step(self, action):
        """-> (observation, score of the purchase or 0.0, done).

        RuntimeError: bought already, or not begun.
        """
        if self.done:
            raise RuntimeError("the session has ended (or not begun): call reset before step")
        match = ACTION.fullmatch(action) if len(action) <= MAX_ACTION else None
        verb, text = match.groups() if match else ("", "")
        text = text.lower()
        if verb == "search":
            self._show_results(text, 1)
        elif verb == "click" and text in self.links and text != "search":
            self._click(text)
        return self.observation, self.score, self.done

    def _click(self, text):
        if text == "buy now":
            self._buy()
        elif text == "back to search":
            self._show_index()
        elif self.page == "results" and text == "next >":
            self._show_results(self.query, self.number + 1)
        elif self.page == "results" and text == "< prev":
            self._show_results(self.query, self.number - 1)
        elif self.page == "item" and text == "< prev":
            self._show_results(self.query, self.number)
        elif text in SUBPAGES:
            self._show_subpage(text)
        else:
            if self.page == "results":
                self.asin = self.links[text]
            elif self.page == "item":
                self.options[self.links[text]] = text
            self._show_item()

    def _buy(self):
        self.score = self.catalogue.score(self.goal, self.asin, self.options)
        self.done = True
        self._show("done", {}, f"Your score: {self.score}")

    def _show(self, page, links, body):
        self.page = page
        self.links = links
        self.body = body

    def _show_index(self):
        self.query = ""
        self.number = 0
        self.asin = None
        self.options = {}
        self._show("index", {"search": None}, "Search")

    def _show_results(self, query, number):
        """Page `number` of the results, from 1. It forgets the chosen options."""
        self.query = query
        self.number = number
        self.asin = None
        self.options = {}
        self.hits = self.catalogue.index.search(query)
        end = HITS_PER_PAGE * number
        products = [self.catalogue.order[i] for i in self.hits[end - HITS_PER_PAGE : end]]
        buttons = ["< Prev", "Next >"] if number > 1 else ["Next >"]
        links = dict.fromkeys(text.lower() for text in ["Back to Search", *buttons])
        links.update({product.asin.lower(): product.asin for product in products})
        title = f"Page {number} (Total results: {len(self.hits)})"
        texts = ["Back to Search", title, *buttons, *[product.hit for product in products]]
        self._show("results", links, " [SEP] ".join(texts))

    def _show_item(self):
        product = self.catalogue.products[self.asin]
        self._show("item", product.links, product.page)

    def _show_subpage(self, page):
        product = self.catalogue.products[self.asin]
        texts = {
            "description": [product.description],
            "features": [" " + bullet for bullet in product.bullets],
            "reviews": [],
        }
        links = dict.fromkeys(["back to search", "< prev"])
        self._show(page, links, join("Back to Search", "< Prev", *texts[page]))
