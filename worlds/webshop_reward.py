"""WebShop's score of a purchase, 0 to 1:

    type * (attributes found + options chosen + [price <= limit]) / (attributes + options + 1)

Its peculiarities are kept, so that scores compare. A chosen option is reduced to the first colour
name that it contains ("rectangular" -> "tan"), but the wanted one is not. Therefore 6.6 % of the
goals (of the 1000 products' 6910) cannot be won even with the right product and options.

Difference from the original: the type depends on the nouns of the titles. Here these are all words
but stop words; the original uses a spaCy model (argument `nouns`).
"""

import functools
import re
from collections.abc import Mapping

from worlds.webshop_search import STOP_WORDS

COLOURS = """
alabaster apricot aqua ash asphalt azure banana beige black blue blush bordeaux bronze brown
burgundy camel camo caramel champagne charcoal cheetah chestnut chocolate christmas coffee cognac
copper coral cranberry cream crystal dark denim eggplant elephant espresso fuchsia gold granite
grape graphite grass gray green grey heather indigo ivory ivy khaki lavender lemon leopard light
lilac lime magenta maroon mauve merlot midnight mint mocha multicolor mushroom mustard natural navy
nude olive orange peach pewter pink plum purple rainbow red rose royal rust sand sapphire seashell
silver skull slate steel stone stonewash sunflower tan taupe teal tiger turquoise violet walnut
wheat white wine yellow
""".split()


def title_words(title):
    """The words of a title without stop words, repeated ones repeated: list of str."""
    return [word for word in re.findall(r"[^\W\d_]{2,}", title.lower()) if word not in STOP_WORDS]


def colour(option):
    """The first colour name in `option`, or `option` itself if there is none.

    option: a value (str) or a (name, value) pair. In a pair only a whole item counts as a colour,
    as in the original.
    """
    return next((name for name in COLOURS if name in option), option)


class Reward:
    """Scores purchases. RuntimeError: rapidfuzz is not installed."""

    def __init__(self, nouns=None):
        try:
            from rapidfuzz import fuzz, utils
        except ImportError as error:
            raise RuntimeError(
                "WebShop needs the package rapidfuzz, which is not installed: "
                "pip install -r requirements-webshop.txt"
            ) from error
        self._ratio = fuzz.token_set_ratio
        self._process = utils.default_process
        self._plain = functools.lru_cache(maxsize=10_000)(self._to_plain)
        self.nouns = functools.lru_cache(maxsize=10_000)(nouns or title_words)

    def score(self, goal, *, wanted, bought, options, price):
        """What buying `bought` with `options` ({name: value}) at `price` scores for `goal`: float.

        wanted, bought: the goal's Product and the bought one.
        """
        wanted_options = goal["options"]
        if isinstance(wanted_options, Mapping):
            wanted_options = wanted_options.items()
        wanted_options = list(wanted_options)
        hits = sum(self._has_attribute(bought, attribute) for attribute in goal["attributes"])
        chosen = [colour(value) for value in options.values()]
        for option in wanted_options:
            hits += any(self.alike(value, colour(option)) for value in chosen)
        hits += price <= goal["price_upper"]
        parts = len(goal["attributes"]) + len(wanted_options) + 1
        return hits / parts * self._type_factor(wanted, bought)

    def alike(self, a, b):
        """Whether two texts share most of their words."""
        return round(self._ratio(self._plain(a), self._plain(b))) > 85

    def _to_plain(self, text):
        latin1 = dict.fromkeys(range(128, 256))  # removed, as by the original's thefuzz
        return self._process(str(text).translate(latin1))

    def _has_attribute(self, product, attribute):
        if any(self.alike(own, attribute) for own in product.attributes):
            return True
        texts = [product.name, " ".join(product.bullets), product.description]
        return any(attribute in text.lower() for text in texts)

    def _type_factor(self, wanted, bought):
        """1.0 for the same type of product, 0.5, 0.1 and 0.0 for ever less related ones."""
        nouns = self.nouns(wanted.name)
        overlap = 0.2
        if nouns:
            overlap = len(set(nouns) & set(self.nouns(bought.name))) / len(nouns)
        if overlap == 0:
            return 0.0
        if overlap < 0.1:
            return 0.1
        same_query = wanted.query == bought.query
        same_category = len(wanted.levels & bought.levels) >= 2
        return 1.0 if overlap > 0.2 or same_query or same_category else 0.5
