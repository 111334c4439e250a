"""Responses, from valid to nonsense, and tokenizers that split them differently."""

import functools
import os
import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from support import cloning

KINDS = ("switch", "subgoal", "action")
TAGS = [tag for kind in KINDS for tag in (f"<{kind}>", f"</{kind}>")]
VALID = "<switch>SWITCH</switch><subgoal>find a pan.</subgoal><action>go to drawer 1</action>"
WORDS = (
    "KEEP",
    "SWITCH",
    "go to drawer 1",
    "find a pan.",
    " ",
    "\n",
    "x",
    "<",
    "</",
    ">",
    "<b>",
    "é",
    "苹果",
    "👩‍🍳",
    "\u3000",
    "\x00",
    "KEEP or SWITCH",
    "<SWITCH>",
    "a.",
    ")",
)


# ---- responses ---------------------------------------------------------------------------------


def block(kind, body):
    return f"<{kind}>{body}</{kind}>"


def said(switch="KEEP", subgoal="a pan", action="look"):
    """A response of three blocks, whatever they hold."""
    return block("switch", switch) + block("subgoal", subgoal) + block("action", action)


def soup(rng):
    """A text that is valid, nearly valid, or nonsense; no U+FFFD in it."""

    def say():
        return "".join(rng.choices(WORDS, k=rng.randrange(4)))

    parts = [
        block("switch", rng.choice(("KEEP", "SWITCH", "SWITCH", say()))),
        block("subgoal", say() + "."),
        block("action", say() + "x"),
    ]
    damage = rng.randrange(12)
    if damage == 0:
        del parts[rng.randrange(3)]
    elif damage == 1:
        parts.insert(rng.randrange(4), rng.choice(parts))
    elif damage == 2:
        rng.shuffle(parts)
    elif damage == 3:
        parts[1] = block("subgoal", say() + rng.choice((parts[2], parts[0], *TAGS)) + say())
    elif damage == 4:
        parts = ["".join(parts)[: rng.randrange(90)]]
    elif damage == 5:
        parts = ["".join(parts).replace(rng.choice(TAGS), rng.choice(("", *TAGS, "<Action>")))]
    elif damage == 6:
        kind = rng.choice(KINDS)
        parts[KINDS.index(kind)] = block(kind, rng.choice(("", " ", "\n", "\u3000")))
    elif damage == 7:
        parts = [say()] + [piece for part in parts for piece in (part, say())]
    elif damage == 8:
        parts = rng.choices([*TAGS, *TAGS, *WORDS], k=rng.randrange(14))
    return "".join(parts)


# ---- the oracle: list the tags; a block is an opening tag whose next tag is its closing one -----


def oracle_blocks(text):
    """{kind: (start, end of the opening tag, start of the closing tag, end)}, first blocks only."""
    tags = [(i, tag) for i in range(len(text)) for tag in TAGS if text.startswith(tag, i)]
    found = {}
    for (i, tag), (j, after) in zip(tags, tags[1:], strict=False):
        kind = tag[1:-1]
        if kind in KINDS and after == f"</{kind}>" and kind not in found:
            found[kind] = (i, i + len(tag), j, j + len(after))
    return found


def oracle_parse(text):
    """-> (switch, subgoal, action, valid)"""
    found = oracle_blocks(text)
    body = dict.fromkeys(KINDS, "")
    for kind, (_, start, end, _) in found.items():
        body[kind] = text[start:end].strip()
    valid = (
        body["switch"] in ("KEEP", "SWITCH")
        and bool(body["subgoal"])
        and bool(body["action"])
        and all(text.count(tag) == 1 for tag in TAGS)
        and sorted(found, key=found.get) == list(KINDS)
    )
    return body["switch"] == "SWITCH", body["subgoal"], body["action"], valid


# ---- tokenizers --------------------------------------------------------------------------------


def encode(tokenizer, text):
    """Text, or a list of texts -> ids."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@functools.cache
def merging_texts():
    """Texts at whose tags BPE learns tokens such as `.</` and `><`."""
    rng = random.Random(5)
    things = ("find a pan", "heat it", "go to drawer", "take 苹果", "café")
    texts = []
    for _ in range(200):
        word = rng.choice(("KEEP", "SWITCH"))
        subgoal = rng.choice(things) + rng.choice((".", "", ")"))
        texts.append(said(word, subgoal, rng.choice(things)))
    return texts


@functools.cache
def bytes_tokenizer():
    """One token a byte, and the end token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return Qwen2Tokenizer({token: i for i, token in enumerate(["<|endoftext|>", *letters])}, [])


@functools.cache
def merging_tokenizer():
    """Qwen2's way to split words, so tags are split and merged with their neighbours."""
    return bytes_tokenizer().train_new_from_iterator(
        merging_texts(),
        900,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )


@functools.cache
def glued_tokenizer():
    """BPE that does not split words first, so one token may hold several tags and blocks."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        special_tokens=["<|end|>"],
    )
    core.train_from_iterator(merging_texts(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|end|>")


@functools.cache
def scratch_tokenizer():
    """The tiny agent's kind: tags are whole tokens."""
    return cloning.train_tokenizer(merging_texts(), 600)


@functools.cache
def _load_qwen(folder):
    return AutoTokenizer.from_pretrained(folder)


def qwen_tokenizer():
    """Qwen2.5's; the test is skipped where QWEN_TOKENIZER does not name its folder."""
    if "QWEN_TOKENIZER" not in os.environ:
        pytest.skip(
            "QWEN_TOKENIZER names no folder with Qwen2.5's vocab.json, merges.txt and "
            "tokenizer_config.json"
        )
    return _load_qwen(os.environ["QWEN_TOKENIZER"])
