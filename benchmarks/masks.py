"""How fast are decision masks? `python benchmarks/masks.py`, less than half a minute.

`hiper.decision_masks` on 4000 responses of 25 to 40 tokens, against decoding the generated ids and
searching the text. Where a token begins in the text is found in one of two usual ways:

    by token     decode each token alone and add up the lengths (the reference of the last line)
    by prefix    decode every prefix of the ids: slower, and more often right

Both err where a token holds part of a character: alone it decodes to U+FFFD. What is right is said
by a third, untimed way: by bytes. All agree on the ASCII responses that are timed; this is checked.

QWEN_TOKENIZER names a folder with Qwen2.5's tokenizer; without it one is trained on the responses.
"""

import os
import random
import re
import sys
import time
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from hiper import decision_masks, format_response
from support.cloning import train_tokenizer
from support.protocol import KINDS
from support.tokens import token_bytes

COUNT = 4000
PHRASES = (
    "go to drawer 1",
    "take mug 2 from",
    "clean the plate",
    "put it in the fridge",
    "heat some apple",
    "look at desk 1",
)
TAG = re.compile("<(/?)(switch|subgoal|action)>")
TAGS = ("<switch>", "</switch>", "<subgoal>", "</subgoal>", "<action>", "</action>")
VALID = "<switch>SWITCH</switch><subgoal>find a pan.</subgoal><action>go to drawer 1</action>"
ADVERSARIAL = [  # texts; each is also cut after every one of its tokens
    VALID,
    VALID.replace("><", ">\n\n<"),
    "Well. " + VALID + " So.",
    VALID + VALID,
    "",
    "nothing",
    VALID.replace("find a pan", "苹果 👩‍🍳 e\u0301 🥘𝔘"),
    VALID.replace("drawer 1", "🫕🫕"),
    VALID.replace("pan.", "<b>pan</b>)"),
    *(VALID.replace(tag, "") for tag in TAGS),
    *(VALID.replace(tag, tag + tag) for tag in ("<switch>", "</subgoal>", "<action>")),
    VALID.replace("find a pan", "find <action>a</action> pan"),
    VALID.replace("find a pan", "find <subgoal>a</subgoal> pan"),
    VALID.replace("find a pan", "find </action> pan"),
    VALID.replace("find a pan.", ""),
    VALID.replace("go to drawer 1", " \u3000"),
    "<action>look</action><subgoal>a pan</subgoal><switch>KEEP</switch>",
    "<action>look</action>",
    VALID.upper(),
]


# ---- the references: id row -> the kind that owns each token -----------------------------------


def owners(text, starts, read=str):
    """For tokens that begin at `starts`: 0 switch, 1 subgoal, 2 action, -1 none.

    A block is an opening tag that its closing tag follows; the first of a kind counts.
    """
    tags = list(TAG.finditer(text))
    blocks = {}
    for tag, after in zip(tags, tags[1:], strict=False):
        if (tag[1], after[1]) == ("", "/") and tag[2] == after[2]:
            body = text[tag.end() : after.start()]
            blocks.setdefault(tag[2], (tag.start(), after.end(), body))
    if "action" not in blocks or not read(blocks["action"][2]).strip():
        return [2] * len(starts)  # no readable action
    result = []
    for place in starts:
        inside = [kind for kind, (start, end, _) in blocks.items() if start <= place < end]
        result.append(KINDS.index(inside[0]) if inside else -1)
    return result


def by_token(row, tokenizer):
    text = ""
    starts = []
    for token_id in row:
        starts.append(len(text))
        text += tokenizer.decode([token_id])
    return owners(text, starts)


def by_prefix(row, tokenizer):
    starts = [len(tokenizer.decode(row[:n]).rstrip("\ufffd")) for n in range(len(row))]
    return owners(tokenizer.decode(row), starts)


def by_bytes(row, tokenizer):
    """One character per byte, by transformers' own table, so that no token holds part of one."""
    byte_of = {character: chr(byte) for byte, character in bytes_to_unicode().items()}
    added = tokenizer.added_tokens_decoder
    text = ""
    starts = []
    for token_id, token in zip(row, tokenizer.convert_ids_to_tokens(row), strict=True):
        starts.append(len(text))
        text += token if token_id in added else "".join(byte_of[c] for c in token)
    return owners(text, starts, lambda body: body.encode("latin-1").decode("utf-8", "replace"))


# ---- data and measuring ------------------------------------------------------------------------


def make_responses():
    rng = random.Random(0)

    def phrases(most):
        return " ".join(rng.choices(PHRASES, k=rng.randint(2, most)))

    return [format_response(rng.random() < 0.3, phrases(4) + ".", phrases(2)) for _ in range(COUNT)]


def make_tokenizer(texts):
    """-> (what it is, tokenizer)"""
    folder = os.environ.get("QWEN_TOKENIZER")
    if folder:
        return "Qwen2.5's tokenizer", AutoTokenizer.from_pretrained(folder)
    name = "a tokenizer trained on the responses (QWEN_TOKENIZER is not set)"
    return name, train_tokenizer(texts, 600)


def adversarial_rows(tokenizer):
    """Id rows: each text as one and character by character, cut at every token; half characters."""

    def encode(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    rows = []
    for text in ADVERSARIAL:
        rows.append(encode(text))
        rows.append([token_id for character in text for token_id in encode(character)])
    cut = [row[:n] for row in rows for n in range(len(row) + 1)]
    valid, half = encode(VALID), encode("🫕")[:1]
    return cut + [valid[:n] + half + valid[n:] for n in range(len(valid) + 1)]


def ours(rows, tokenizer):
    """-> (owners of each row's tokens, seconds of decision_masks)"""
    lengths = torch.tensor([len(row) for row in rows])
    width = int(lengths.max())
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])  # [N, L]
    masks, seconds = best_time(5, decision_masks, ids, lengths, tokenizer)
    assert int(sum(mask.long() for mask in masks).max()) <= 1, "a token has two owners"
    owner = sum((k + 1) * mask.long() for k, mask in enumerate(masks)) - 1  # [N, L]
    padding = torch.arange(width) >= lengths[:, None]
    assert (owner[padding] == -1).all(), "padding is masked"
    pairs = zip(owner.tolist(), lengths.tolist(), strict=True)
    return [row[:length] for row, length in pairs], seconds


def by_text(method, rows, tokenizer):
    return [method(row, tokenizer) for row in rows]


def best_time(runs, function, *arguments):
    """-> (result, seconds of the fastest run)"""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        result = function(*arguments)
        times.append(time.perf_counter() - start)
    return result, min(times)


def main():
    texts = make_responses()
    name, tokenizer = make_tokenizer(texts)
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    hard = adversarial_rows(tokenizer)
    _, table_seconds = best_time(1, token_bytes, tokenizer)
    print(
        f"{name}: {COUNT} responses of {sum(map(len, rows)) / COUNT:.0f} tokens; its table of "
        f"bytes, made once, takes {1e3 * table_seconds:.0f} ms"
    )
    right = by_text(by_bytes, rows, tokenizer)
    right_hard = by_text(by_bytes, hard, tokenizer)
    found, seconds = ours(rows, tokenizer)
    assert found == right, "decision_masks is not what the bytes say"
    assert ours(hard, tokenizer)[0] == right_hard, "decision_masks is not what the bytes say"
    print(f"decision_masks {1e3 * seconds:8.1f} ms           wrong on 0 of {len(hard)} hard ones")
    ratio = {}
    for method in (by_prefix, by_token):
        found, slow = best_time(2, by_text, method, rows, tokenizer)
        assert found == right, f"{method.__name__}: not the same on ASCII responses"
        found = by_text(method, hard, tokenizer)
        wrong = sum(a != b for a, b in zip(found, right_hard, strict=True))
        ratio[method] = slow / seconds
        print(
            f"{method.__name__:14s} {1e3 * slow:8.1f} ms ({ratio[method]:5.1f}x)  wrong on {wrong}"
        )
    print(f"masks: {ratio[by_token]:.0f}x")


if __name__ == "__main__":
    main()
