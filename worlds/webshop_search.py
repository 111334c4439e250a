"""Full-text search that ranks as Lucene does with WebShop's settings: BM25 (k1 0.9, b 0.4) over English analysis.

Analysis: words by Unicode's word boundaries (UAX 29) and emoji, lower case, possessive 's off, Lucene's 33 stop words out, Porter's
stemmer. Score of a document: sum over the query's terms, repeated ones counted, of

    idf * tf / (tf + k1 * (1 - b + b * length / mean length))        idf = ln(1 + (N - n + 0.5) / (n + 0.5))

with N documents, n of them with the term, and a length that Lucene stores in one byte: exact below 40, coarser above. Terms are
rounded to 32 bits as there, so that near-ties fall as there; equal scores keep the order of the documents.

Left out: the dictionary that splits Thai, Lao and Khmer into words.
"""

import functools
import math
import re
from collections import Counter, defaultdict

import numpy as np

STOP_WORDS = frozenset(
    "a an and are as at be but by for if in into is it no not of on or such that the their then there these "
    "they this to was will with".split()
)
K1, B = np.float32(0.9), np.float32(0.4)

_ALONE = "\u2e80-\u2fd5\u3005\u3007\u3021-\u3029\u3041-\u3096\u309d-\u309f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # Han, Hiragana
_NUMBERS = "\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u209c\u2150-\u215f\u2460-\u249b\u24ea-\u24ff\u2776-\u2793"  # superscripts, fractions
_EMOJI = (
    "\u203c\u2049\u2139\u2194-\u2199\u21a9-\u21aa\u231a-\u231b\u2328\u2388\u23cf\u23e9-\u23f3\u23f8-\u23fa\u24c2"
    "\u25aa-\u25ab\u25b6\u25c0\u25fb-\u25fe\u2600-\u2605\u2607-\u2612\u2614-\u2685\u2690-\u2705\u2708-\u2712"
    "\u2714\u2716\u271d\u2721\u2728\u2733-\u2734\u2744\u2747\u274c\u274e\u2753-\u2755\u2757\u2763-\u2767"
    "\u2795-\u2797\u27a1\u27b0\u27bf\u2934-\u2935\u2b05-\u2b07\u2b1b-\u2b1c\u2b50\u2b55\u3030\u303d\u3297\u3299"
    "\U0001f000-\U0001faff"
)
_MARK = "[\u00ad\u0300-\u036f\u200d-\u200f\ufe00-\ufe0f\U0001f3fb-\U0001f3ff]*"  # combining, invisible, skin tones
_LETTER = rf"[^\W\d_{_ALONE}{_NUMBERS}]{_MARK}"
_WORD = re.compile(
    rf"""_*(?:{_LETTER}|\d{_MARK})
                        (?:_*(?:{_LETTER}|\d{_MARK})
                        |(?<=[^\W\d_])[:\u00b7.'\u2018\u2019\u2024\u2027\uff1a](?={_LETTER})         # l'eau, e.g
                        |(?<=\d)[.,;'\u2018\u2019\u2024\u2044\uff0c](?=\d))*_*                       # 1,000.50
                        |[{_ALONE}]{_MARK}
                        |[{_EMOJI}]{_MARK}(?:(?<=\u200d)[{_EMOJI}]{_MARK})*""",
    re.VERBOSE,
)
_POSSESSIVE = re.compile("['\u2019\uff07]s$")


def stem(word):
    """Porter's stemmer with its author's three later changes, which Lucene has: words of two letters stay, bli -> ble, logi -> log.

    >>> [stem(word) for word in ("assembly", "assembled", "hopping", "us", "relational")]
    ['assembl', 'assembl', 'hop', 'us', 'relat']
    """
    if len(word) < 3:
        return word
    if word.endswith("s"):  # 1a: plurals
        word = (
            word[:-2]
            if word.endswith(("sses", "ies"))
            else word
            if word.endswith("ss")
            else word[:-1]
        )
    past = re.search("(ed|ing)$", word)  # 1b
    if word.endswith("eed"):
        word = word[:-1] if _measure(word[:-3]) else word
    elif past and "v" in _shape(word[: past.start()]):
        word = word[: past.start()]
        if (
            word.endswith(("at", "bl", "iz"))
            or not _double(word)
            and _measure(word) == 1
            and _short(word)
        ):
            word += "e"
        elif _double(word) and word[-1] not in "lsz":
            word = word[:-1]
    if word.endswith("y") and "v" in _shape(word[:-1]):  # 1c
        word = word[:-1] + "i"
    for endings in _ENDINGS:  # 2 and 3: ...ization -> ...ize
        found = re.search(f"({'|'.join(endings)})$", word)
        if found and _measure(word[: found.start()]):
            word = word[: found.start()] + endings[found[0]]
    found = _SUFFIX.search(word)  # 4: ...able -> ...
    if found and _measure(word[: found.start()]) > 1:
        word = word[: found.start()]
    if word.endswith("e"):  # 5
        measure = _measure(word[:-1])
        word = word[:-1] if measure > 1 or measure == 1 and not _short(word[:-1]) else word
    return word[:-1] if word.endswith("ll") and _measure(word) > 1 else word


def _pairs(text):
    return {a: b for a, _, b in (pair.partition(">") for pair in text.split())}


_ENDINGS = (
    _pairs(
        "ational>ate tional>tion enci>ence anci>ance izer>ize bli>ble alli>al entli>ent eli>e ousli>ous ization>ize "
        "ation>ate ator>ate alism>al iveness>ive fulness>ful ousness>ous aliti>al iviti>ive biliti>ble logi>log"
    ),
    _pairs("icate>ic ative> alize>al iciti>ic ical>ic ful> ness>"),
)
_SUFFIX = re.compile(
    "(al|ance|ence|er|ic|able|ible|ant|ement|ment|ent|(?<=[st])ion|ou|ism|ate|iti|ous|ive|ize)$"
)


def _shape(word):
    """Consonants and vowels: "trying" -> "ccvvcc", y being a vowel behind a consonant."""
    shape = ""
    for i, letter in enumerate(word):
        shape += "v" if letter in "aeiou" or letter == "y" and i and shape[-1] == "c" else "c"
    return shape


def _measure(word):
    return _shape(word).count("vc")


def _double(word):
    return len(word) > 1 and word[-1] == word[-2] and _shape(word)[-1] == "c"


def _short(word):
    return _shape(word)[-3:] == "cvc" and word[-1] not in "wxy"


class Index:
    """texts: list of str, one per document. Read-only once built: any number of environments may share it."""

    def __init__(self, texts):
        self._stem = functools.lru_cache(maxsize=100_000)(stem)
        found, lengths = defaultdict(list), []
        for number, text in enumerate(texts):
            terms = self.terms(text)
            lengths.append(len(terms))
            for term, times in Counter(terms).items():
                found[term].append((number, times))
        self.size, rounded = len(lengths), np.array([stored_length(n) for n in lengths], np.float32)
        mean = np.float32(sum(lengths) / max(1, sum(n > 0 for n in lengths)))
        norm = K1 * ((1 - B) + B * rounded / max(mean, np.float32(1e-9)))
        self.postings = {}  # term -> documents [n], their scores [n]
        for term, pairs in found.items():
            numbers, times = np.array(pairs, np.int32).T
            idf = np.float32(math.log(1 + (self.size - len(pairs) + 0.5) / (len(pairs) + 0.5)))
            self.postings[term] = numbers, idf, (times / (times + norm[numbers])).astype(np.float32)
        self.search = functools.lru_cache(maxsize=4096)(
            self._search
        )  # agents of one task ask the same

    def terms(self, text):
        """The index terms of a text, in order: list of str."""
        words = (_POSSESSIVE.sub("", word) for word in _WORD.findall(text.lower()))
        return [self._stem(word) for word in words if word not in STOP_WORDS]

    def _search(self, query, limit=50):
        """Numbers of the documents that match `query`, best first, `limit` of them at the most: tuple of int."""
        scores = np.zeros(self.size)
        for term, times in Counter(self.terms(query)).items():
            if term in self.postings:
                numbers, idf, share = self.postings[term]
                scores[numbers] += idf * np.float32(times) * share
        hits = np.flatnonzero(scores)
        order = np.argsort(-scores[hits].astype(np.float32), kind="stable")[:limit]
        return tuple(hits[order].tolist())


def stored_length(length):
    """What is left of a document's length after Lucene's byte: exact below 24; above, the excess in 4 significant bits.

    >>> [stored_length(n) for n in (23, 39, 40, 41, 42, 100)]
    [23, 39, 40, 40, 42, 96]
    """
    excess = length - 24
    if excess < 16:
        return length
    lost = excess.bit_length() - 4
    return 24 + (excess >> lost << lost)
