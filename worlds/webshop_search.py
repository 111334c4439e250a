"""Full-text search that ranks as Lucene does with WebShop's settings: BM25, k1 0.9, b 0.4.

Analysis of a text: words by Unicode's word boundaries (UAX 29) and emoji, lower case, without
possessive 's, without Lucene's 33 stop words, stemmed by Porter's stemmer. The score of a document
is the sum over the query's terms, repeated ones counted, of

    idf * tf / (tf + k1 * (1 - b + b * length / mean length))
    idf = ln(1 + (N - n + 0.5) / (n + 0.5))

with N documents, n of them with the term. Lucene stores the length in one byte, which is exact up
to 40 and coarser above. Terms are rounded to 32 bits as in Lucene, so that near-ties rank as there.
Documents of equal score come in the order of their names, as in Anserini, which WebShop uses.

Left out: the dictionary that splits Thai, Lao and Khmer into words.
"""

import functools
import math
import re
from collections import Counter, defaultdict

import numpy as np

STOP_WORDS = frozenset(
    "a an and are as at be but by for if in into is it no not of on or such that the their then "
    "there these they this to was will with".split()
)
K1 = np.float32(0.9)
B = np.float32(0.4)

# Han and Hiragana: every character is a word.
_ALONE = (
    "\u2e80-\u2fd5\u3005\u3007\u3021-\u3029\u3041-\u3096\u309d-\u309f\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff"
)
# Superscripts, fractions and numbers in circles, which Python counts as word characters.
_NUMBERS = (
    "\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u209c\u2150-\u215f\u2460-\u249b\u24ea-\u24ff"
    "\u2776-\u2793"
)
_EMOJI = (
    "\u203c\u2049\u2139\u2194-\u2199\u21a9-\u21aa\u231a-\u231b\u2328\u2388\u23cf\u23e9-\u23f3"
    "\u23f8-\u23fa\u24c2\u25aa-\u25ab\u25b6\u25c0\u25fb-\u25fe\u2600-\u2605\u2607-\u2612"
    "\u2614-\u2685\u2690-\u2705\u2708-\u2712\u2714\u2716\u271d\u2721\u2728\u2733-\u2734\u2744"
    "\u2747\u274c\u274e\u2753-\u2755\u2757\u2763-\u2767\u2795-\u2797\u27a1\u27b0\u27bf"
    "\u2934-\u2935\u2b05-\u2b07\u2b1b-\u2b1c\u2b50\u2b55\u3030\u303d\u3297\u3299"
    "\U0001f000-\U0001faff"
)
# Combining characters, invisible ones and skin tones belong to the character before them.
_MARK = "[\u00ad\u0300-\u036f\u200d-\u200f\ufe00-\ufe0f\U0001f3fb-\U0001f3ff]*"
_LETTER = rf"[^\W\d_{_ALONE}{_NUMBERS}]{_MARK}"
_WORD = re.compile(
    rf"""
    (?:(?<!_)_+)?(?:{_LETTER}|\d{_MARK})
    (?: _*(?:{_LETTER}|\d{_MARK})
      | (?<=[^\W\d_])[:\u00b7.'\u2018\u2019\u2024\u2027\uff1a](?={_LETTER})  # l'eau, e.g
      | (?<=\d)[.,;'\u2018\u2019\u2024\u2044\uff0c](?=\d)                    # 1,000.50
    )*_*
    | [{_ALONE}]{_MARK}
    | [{_EMOJI}]{_MARK}(?:(?<=\u200d)[{_EMOJI}]{_MARK})*
    """,
    re.VERBOSE,
)
_POSSESSIVE = re.compile("['\u2019\uff07]s$")


# ---- Porter's stemmer, as Lucene has it ----


def stem(word):
    """Porter's stemmer with its author's three later changes.

    The changes: words of two letters stay, bli -> ble, logi -> log.

    >>> [stem(word) for word in ("assembly", "assembled", "hopping", "us", "relational")]
    ['assembl', 'assembl', 'hop', 'us', 'relat']
    """
    if len(word) < 3:
        return word
    word = _step_1a(word)
    word = _step_1b(word)
    if word.endswith("y") and _has_vowel(word[:-1]):  # step 1c
        word = word[:-1] + "i"
    word = _replace_ending(word, _STEP_2)
    word = _replace_ending(word, _STEP_3)
    found = _STEP_4.search(word)
    if found and _measure(word[: found.start()]) > 1:
        word = word[: found.start()]
    return _step_5(word)


def _step_1a(word):
    """Plurals."""
    if word.endswith(("sses", "ies")):
        return word[:-2]
    if word.endswith("s") and not word.endswith("ss"):
        return word[:-1]
    return word


def _step_1b(word):
    """Past and progressive forms."""
    if word.endswith("eed"):
        return word[:-1] if _measure(word[:-3]) else word
    found = re.search("(ed|ing)$", word)
    if not found or not _has_vowel(word[: found.start()]):
        return word
    base = word[: found.start()]
    if base.endswith(("at", "bl", "iz")):
        return base + "e"
    if _ends_in_double_consonant(base):
        return base if base[-1] in "lsz" else base[:-1]
    return base + "e" if _measure(base) == 1 and _ends_short(base) else base


def _replace_ending(word, endings):
    """Steps 2 and 3: the longest of `endings` is replaced, if a syllable is before it."""
    found = re.search(f"({'|'.join(endings)})$", word)
    if found and _measure(word[: found.start()]):
        return word[: found.start()] + endings[found[0]]
    return word


def _step_5(word):
    """A final e, and one of two final l."""
    if word.endswith("e"):
        base = word[:-1]
        measure = _measure(base)
        if measure > 1 or measure == 1 and not _ends_short(base):
            word = base
    if word.endswith("ll") and _measure(word) > 1:
        word = word[:-1]
    return word


def _pairs(text):
    """ "ical>ic ful>" -> {"ical": "ic", "ful": ""}"""
    return dict(pair.split(">") for pair in text.split())


_STEP_2 = _pairs(
    "ational>ate tional>tion enci>ence anci>ance izer>ize bli>ble alli>al entli>ent eli>e "
    "ousli>ous ization>ize ation>ate ator>ate alism>al iveness>ive fulness>ful ousness>ous "
    "aliti>al iviti>ive biliti>ble logi>log"
)
_STEP_3 = _pairs("icate>ic ative> alize>al iciti>ic ical>ic ful> ness>")
_STEP_4 = re.compile(
    "(al|ance|ence|er|ic|able|ible|ant|ement|ment|ent|(?<=[st])ion|ou|ism|ate|iti|ous|ive|ize)$"
)


def _shape(word):
    """Consonants and vowels: "trying" -> "ccvvcc". A y is a vowel after a consonant."""
    shape = ""
    for letter in word:
        is_vowel = letter in "aeiou" or (letter == "y" and shape.endswith("c"))
        shape += "v" if is_vowel else "c"
    return shape


def _has_vowel(word):
    return "v" in _shape(word)


def _measure(word):
    """Porter's m: how many times a consonant follows a vowel."""
    return _shape(word).count("vc")


def _ends_in_double_consonant(word):
    return len(word) > 1 and word[-1] == word[-2] and _shape(word).endswith("c")


def _ends_short(word):
    """Porter's *o: ends in consonant, vowel, consonant, the last one not w, x or y."""
    return _shape(word).endswith("cvc") and word[-1] not in "wxy"


# ---- the index ----


class Index:
    """texts: list of str, one per document; names: as many, for ties, else the documents' order
    decides. Read-only once built: environments may share it.

    search(query): numbers of the at most 50 best documents, best first, as a tuple of int. Cached,
    because the agents of one task send the same queries.
    """

    def __init__(self, texts, names=None):
        by_name = sorted(range(len(texts)), key=names.__getitem__) if names else range(len(texts))
        self.place = np.argsort(np.array(by_name, int))  # [N] of each document among the names
        self._stem = functools.lru_cache(maxsize=100_000)(stem)
        self.search = functools.lru_cache(maxsize=4096)(self._search)
        occurrences = defaultdict(list)  # term -> list of (document, how often)
        lengths = []
        for number, text in enumerate(texts):
            terms = self.terms(text)
            lengths.append(len(terms))
            for term, times in Counter(terms).items():
                occurrences[term].append((number, times))
        self.size = len(lengths)
        norm = _length_norm(lengths)
        self.postings = {}  # term -> (documents [n], idf, tf / (tf + norm) [n])
        for term, pairs in occurrences.items():
            numbers, times = np.array(pairs, np.int32).T
            n = len(pairs)
            idf = np.float32(math.log(1 + (self.size - n + 0.5) / (n + 0.5)))
            saturation = (times / (times + norm[numbers])).astype(np.float32)
            self.postings[term] = numbers, idf, saturation

    def terms(self, text):
        """The index terms of a text, in order: list of str."""
        words = [_POSSESSIVE.sub("", word) for word in _WORD.findall(text.lower())]
        return [self._stem(word) for word in words if word not in STOP_WORDS]

    def _search(self, query, limit=50):
        scores = np.zeros(self.size)
        for term, times in Counter(self.terms(query)).items():
            if term in self.postings:
                numbers, idf, saturation = self.postings[term]
                scores[numbers] += idf * np.float32(times) * saturation
        hits = np.flatnonzero(scores)
        order = np.lexsort((self.place[hits], -scores[hits].astype(np.float32)))[:limit]
        return tuple(hits[order].tolist())


def _length_norm(lengths):
    """k1 * (1 - b + b * length / mean length) of every document: float32 [N]"""
    stored = np.array([stored_length(length) for length in lengths], np.float32)
    not_empty = sum(length > 0 for length in lengths)
    mean = np.float32(sum(lengths) / max(1, not_empty))
    return K1 * ((1 - B) + B * stored / max(mean, np.float32(1e-9)))


def stored_length(length):
    """A document's length as Lucene stores it in a byte.

    Exact below 24; above, 4 significant bits of the excess.

    >>> [stored_length(n) for n in (23, 39, 40, 41, 42, 100)]
    [23, 39, 40, 40, 42, 96]
    """
    excess = length - 24
    if excess < 16:
        return length
    lost_bits = excess.bit_length() - 4
    return 24 + (excess >> lost_bits << lost_bits)
