"""WebShop (text): search a catalogue, open a product, choose its options, buy. Our own engine, which plays as the original does.

    shop = WebShop(Catalogue.load(folder))                # the catalogue is read-only: any number of shops may share it
    observation = shop.reset(shop.catalogue.goals[0])
    observation, score, done = shop.step("search[red shoes]")

webshop_env.py makes it a world.

Data:     a folder with the files of WebShop's own set-up script: items_shuffle_1000.json and items_ins_v2_1000.json, or, for
          the full set, items_shuffle.json and items_ins_v2.json.
Package:  rapidfuzz (requirements-webshop.txt), imported when a catalogue is made.

Pages, their texts joined by " [SEP] ": index, results (ten of at most 50 hits), item, description, features, reviews, done.
Actions: search[words], on every page, and click[text], where `clickables` has that text; anything else changes nothing.

Score of a purchase, 0 to 1:   type * (attributes found + options chosen + [price <= limit]) / (attributes + options + 1)

Its quirks are kept, so that scores compare: a chosen option is cut down to the first colour name in it ("rectangular" -> "tan"),
the wanted one is not, so that 6.6 % of the goals are lost even with the right product and options (of the 1000 products' 6910);
what was chosen is nowhere seen; click[search] does nothing.

Differences from the original:
 1. Nouns of a title, for the type: its words without stop words, where the original asks a model of spaCy (`nouns` takes another).
 2. Search: see webshop_search.py. The queries <r>, <a>, <c>, <q>, a back door for developers, are words like others.
 3. The last page is only the score. There are no reviews or ratings (the original's 1000 products have none) and no images.
 4. Goals are the generated ones; those that people wrote (items_human_ins.json) are not read.
 5. Prices and then limits are drawn from `seed`; the original draws them anew each time it starts.
"""

import functools
import itertools
import json
import random
import re
from collections.abc import Mapping
from pathlib import Path

from worlds.webshop_search import STOP_WORDS, Index

FILES = (
    ("items_shuffle_1000.json", "items_ins_v2_1000.json"),
    ("items_shuffle.json", "items_ins_v2.json"),
)
COLOURS = """alabaster apricot aqua ash asphalt azure banana beige black blue blush bordeaux bronze brown burgundy camel camo caramel
champagne charcoal cheetah chestnut chocolate christmas coffee cognac copper coral cranberry cream crystal dark denim eggplant
elephant espresso fuchsia gold granite grape graphite grass gray green grey heather indigo ivory ivy khaki lavender lemon leopard
light lilac lime magenta maroon mauve merlot midnight mint mocha multicolor mushroom mustard natural navy nude olive orange peach
pewter pink plum purple rainbow red rose royal rust sand sapphire seashell silver skull slate steel stone stonewash sunflower tan
taupe teal tiger turquoise violet walnut wheat white wine yellow""".split()
SUBPAGES = ("description", "features", "reviews")
ACTION = re.compile(r"(.+)\[(.+)\]")


def join(*texts):
    """One page. An empty text is not seen, a blank one is, as in the original."""
    return " [SEP] ".join(text.strip() for text in texts if text)


def title_words(title):
    """The words of a title without stop words, repeated ones repeated: list of str."""
    return [word for word in re.findall(r"[^\W\d_]{2,}", title.lower()) if word not in STOP_WORDS]


class Product:
    """What is known of one product. `raw`: a dict of the products file."""

    def __init__(self, raw, attributes):
        bullets = raw["small_description"]
        self.asin, self.name, self.description = raw["asin"], raw["name"], raw["full_description"]
        self.bullets = bullets if isinstance(bullets, list) else [bullets]
        self.attributes, self.category, self.query = (
            attributes,
            raw["category"],
            raw["query"].lower().strip(),
        )
        self.levels = {level.strip() for level in raw["product_category"].split("\u203a")}
        self.options = {
            name.lower(): [value["value"].strip().replace("/", " | ").lower() for value in values]
            for name, values in (raw["customization_options"] or {}).items()
            if values is not None
        }
        self.prices = [
            float(re.sub(r"[^\d.]", "", price))
            for price in (raw.get("pricing") or "").split("$")[1:]
        ][:2] or [100.0]
        tag = " to ".join(f"${price}" for price in self.prices)
        self.hit = join(self.asin, self.name, tag)
        self.page = join(
            "Back to Search",
            "< Prev",
            *itertools.chain(*([name, *values] for name, values in self.options.items())),
            self.name,
            f"Price: {tag}",
            "Rating: N.A.",
            "Description",
            "Features",
            "Reviews",
            "Buy Now",
        )
        self.links = dict.fromkeys(
            ("back to search", "< prev", *SUBPAGES, "buy now")
        )  # text -> option; None: a button
        for name, values in self.options.items():
            self.links.update(dict.fromkeys(values, name))  # of two options the later has it

    def text(self):
        """What the search knows of it."""
        options = ", and ".join(
            f"{name}: {', '.join(values)}" for name, values in self.options.items()
        )
        return " ".join([self.name, self.description, *self.bullets[:1], options])


class Catalogue:
    """Products, their search index and the goals.

    products, instructions  the two files, parsed
    seed                    of the prices, where a range is given, and then of the goals' price limits
    nouns                   title -> collection of nouns, `title_words` unless given

    goals: list of dicts asin, instruction, attributes, options ({name: value}), price_upper (dollars), in the original's order
    before it shuffles: by product as in the file, then by combination of values, options sorted by name, the last varying fastest.

    RuntimeError: rapidfuzz is not installed."""

    def __init__(self, products, instructions, *, seed=42, nouns=None):
        try:
            from rapidfuzz import fuzz, utils
        except ImportError as error:
            raise RuntimeError(
                "WebShop needs the package rapidfuzz, which is not installed: "
                "pip install -r requirements-webshop.txt"
            ) from error
        latin1 = dict.fromkeys(range(128, 256))  # what thefuzz takes for "not ASCII"
        plain = functools.lru_cache(maxsize=10_000)(
            lambda text: utils.default_process(str(text).translate(latin1))
        )
        self.alike = lambda a, b: round(fuzz.token_set_ratio(plain(a), plain(b))) > 85
        self.nouns = functools.lru_cache(maxsize=10_000)(nouns or title_words)
        self.products = {}  # asin -> Product
        for raw in products:
            if raw["asin"] != "nan" and len(raw["asin"]) <= 10 and raw["asin"] not in self.products:
                attributes = instructions.get(raw["asin"], {}).get("attributes", ["DUMMY_ATTR"])
                self.products[raw["asin"]] = Product(raw, attributes)
        self.order = list(self.products.values())
        self.index = Index([product.text() for product in self.order])
        rng = random.Random(seed)
        self.prices = {
            p.asin: p.prices[0] if len(p.prices) == 1 else rng.uniform(*p.prices)
            for p in self.order
        }
        self.goals = [
            goal
            for p in self.order
            if instructions.get(p.asin, {}).get("instruction")
            for goal in self._goals(p, instructions[p.asin], rng)
        ]

    @classmethod
    def load(cls, data_dir, *, seed=42, nouns=None):
        """The catalogue of a folder; of the 1000 products where it holds both sets.

        RuntimeError: the folder or a file is missing, or a file is not JSON."""
        folder = Path(data_dir)
        if not folder.is_dir():
            raise RuntimeError(
                f"there is no folder {folder}: set WEBSHOP_DATA to the one that holds {' and '.join(FILES[0])}, "
                f"or {' and '.join(FILES[1])}"
            )
        names = next((pair for pair in FILES if (folder / pair[0]).is_file()), FILES[0])
        parsed = []
        for name in names:
            try:
                parsed.append(json.loads((folder / name).read_text(encoding="utf-8")))
            except FileNotFoundError:
                raise RuntimeError(
                    f"{folder} has no {name}: WebShop needs {' and '.join(FILES[0])}, "
                    f"or {' and '.join(FILES[1])}"
                ) from None
            except ValueError as error:
                raise RuntimeError(
                    f"{folder / name} is not a JSON file ({error}): download it again"
                ) from None
        return cls(*parsed, seed=seed, nouns=nouns)

    def _goals(self, product, instruction, rng):
        limits = [limit for limit in range(10, 1000, 10) if limit > self.prices[product.asin]][:4]
        limit = float(max(rng.sample(limits, 2))) if len(limits) > 1 else 1_000_000
        names = sorted(product.options)
        for values in itertools.product(*map(product.options.get, names)):
            options = dict(zip(names, values))
            text = instruction["instruction"]
            if options:
                text += " with " + ", and ".join(
                    f"{name}: {value}" for name, value in options.items()
                )
            if len(limits) > 1:
                text += f", and price lower than {limit:.2f} dollars"
            yield {
                "asin": product.asin,
                "instruction": text,
                "attributes": instruction["instruction_attributes"],
                "options": options,
                "price_upper": limit,
            }

    def score(self, goal, asin, options):
        """What buying product `asin` with `options` ({name: value}) scores for `goal`: float, 0 to 1."""
        wanted, bought = self.products[goal["asin"]], self.products[asin]
        nouns = self.nouns(wanted.name)
        overlap = len(set(nouns) & set(self.nouns(bought.name))) / len(nouns) if nouns else 0.2
        related = (
            overlap > 0.2 or wanted.query == bought.query or len(wanted.levels & bought.levels) >= 2
        )
        kind = 0.0 if overlap == 0 else 0.1 if overlap < 0.1 else 1.0 if related else 0.5
        texts = [bought.name.lower(), " ".join(bought.bullets).lower(), bought.description.lower()]
        hits = sum(
            any(self.alike(own, attribute) for own in bought.attributes)
            or any(attribute in text for text in texts)
            for attribute in goal["attributes"]
        )
        pairs = list(
            goal["options"].items() if isinstance(goal["options"], Mapping) else goal["options"]
        )
        chosen = [colour(value) for value in options.values()]
        hits += sum(any(self.alike(value, colour(pair)) for value in chosen) for pair in pairs)
        hits += self.prices[asin] <= goal["price_upper"]
        return hits / (len(goal["attributes"]) + len(pairs) + 1) * kind


def colour(option):
    """The first colour name in a str, or among the items of a (name, value) pair (the quirk); the option itself where none is."""
    return next((name for name in COLOURS if name in option), option)


class WebShop:
    """One session. `clickables`: what can be clicked now; `body`: the page without the instruction."""

    def __init__(self, catalogue):
        self.catalogue, self.done = catalogue, True

    def reset(self, goal):
        """goal: a mapping like those of `catalogue.goals` -> observation. ValueError: its product is not in the catalogue."""
        if goal["asin"] not in self.catalogue.products:
            raise ValueError(f"the goal's product {goal['asin']!r} is not in this catalogue")
        self.goal, self.score, self.done = goal, 0.0, False
        self._index()
        return self.observation

    @property
    def clickables(self):
        return list(self.links)

    @property
    def observation(self):
        if self.done:
            return self.body
        return (
            join("WebShop" * (self.page == "index"), "Instruction:", self.goal["instruction"])
            + " [SEP] "
            + self.body
        )

    def step(self, action):
        """-> (observation, score of the purchase or 0.0, done). RuntimeError: bought already, or not begun."""
        if self.done:
            raise RuntimeError("the session has ended (or not begun): call reset before step")
        match = ACTION.match(action)
        verb, text = match.groups() if match else (action, "")
        text = text.lower()
        if verb == "search" and text:
            self._results(text, 1)
        elif verb == "click" and text in self.links and text != "search":
            self._click(text)
        return self.observation, self.score, self.done

    def _click(self, text):
        if text == "buy now":
            self.score, self.done = self.catalogue.score(self.goal, self.asin, self.options), True
            self.page, self.links, self.body = "done", {}, f"Your score: {self.score}"
        elif text == "back to search":
            self._index()
        elif self.page == "results" and text in ("next >", "< prev"):
            self._results(self.query, self.number + (1 if text == "next >" else -1))
        elif text == "< prev" and self.page == "item":
            self._results(self.query, self.number)  # which forgets the options
        elif text in SUBPAGES:
            self._subpage(text)
        else:
            if self.page == "results":
                self.asin = self.links[text]
            elif self.page == "item":
                self.options[self.links[text]] = text
            self._item()

    def _index(self):
        self.page, self.links, self.body = "index", {"search": None}, "Search"
        self.query, self.number, self.asin, self.options = "", 0, None, {}

    def _results(self, query, number):
        self.page, self.query, self.number, self.asin, self.options = (
            "results",
            query,
            number,
            None,
            {},
        )
        self.hits = self.catalogue.index.search(query)
        shown = [self.catalogue.order[i] for i in self.hits[10 * number - 10 : 10 * number]]
        buttons = ["Back to Search", *["< Prev"] * (number > 1), "Next >"]
        self.links = {
            **dict.fromkeys(map(str.lower, buttons)),
            **{product.asin.lower(): product.asin for product in shown},
        }
        self.body = " [SEP] ".join(
            [
                buttons[0],
                f"Page {number} (Total results: {len(self.hits)})",
                *buttons[1:],
                *(product.hit for product in shown),
            ]
        )

    def _item(self):
        product = self.catalogue.products[self.asin]
        self.page, self.links, self.body = "item", product.links, product.page

    def _subpage(self, page):
        product = self.catalogue.products[self.asin]
        texts = {
            "description": [product.description],
            "features": [" " + bullet for bullet in product.bullets],
            "reviews": ["No reviews found"],
        }[page]
        self.page, self.links = page, dict.fromkeys(("back to search", "< prev"))
        self.body = join("Back to Search", "< Prev", *texts)
