"""How fast are decision masks? `python benchmarks/masks.py`, less than half a minute.

`hiper.decision_masks` on 4000 answers of about 40 tokens, against the usual way: decode the generated ids and search the text.
    by token    decode each token alone and add up the lengths: the reference of the last line, though the text is not what was said
    by prefix   decode every prefix of the ids, whose length is where the next token starts: dearer, and right more often
    by bytes    untimed, the judge: a token starts at the byte after the tokens before it
Text goes wrong where a token holds a part of a character, which decodes to U+FFFD until the rest comes, if it comes: split white
space looks readable, a prefix looks longer than it is. All agree on ASCII, which is what is timed; this is checked.

QWEN_TOKENIZER names the folder of Qwen2.5's tokenizer; without it one is trained on the answers.
"""

import os
import random
import re
import sys
import time
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path[0] = str(
    Path(__file__).resolve().parent.parent
)  # hae.py beside this file is not the library's

import torch
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from support import cloning as scratch
from hiper import KINDS, decision_masks, response, token_bytes

N = 4000
PHRASES = (
    "go to drawer 1",
    "take mug 2 from",
    "clean the plate",
    "put it in the fridge",
    "heat some apple",
    "look at desk 1",
)
TAG = re.compile("<(/?)(switch|subgoal|action)>")
OK = "<switch>SWITCH</switch><subgoal>find a pan.</subgoal><action>go to drawer 1</action>"
ADVERSARIAL = [  # texts; each is also cut after every one of its tokens
    OK,
    OK.replace("><", ">\n\n<"),
    "Well. " + OK + " So.",
    OK + OK,
    "",
    "nothing",
    OK.replace("find a pan", "苹果 👩‍🍳 e\u0301 🥘𝔘"),
    OK.replace("drawer 1", "🫕🫕"),
    OK.replace("pan.", "<b>pan</b>)"),
    *(
        OK.replace(tag, "")
        for tag in ("<switch>", "</switch>", "<subgoal>", "</subgoal>", "<action>", "</action>")
    ),
    *(OK.replace(tag, tag + tag) for tag in ("<switch>", "</subgoal>", "<action>")),
    OK.replace("find a pan", "find <action>a</action> pan"),
    OK.replace("find a pan", "find <subgoal>a</subgoal> pan"),
    OK.replace("find a pan", "find </action> pan"),
    OK.replace("find a pan.", ""),
    OK.replace("go to drawer 1", " \u3000"),
    "<action>look</action><subgoal>a pan</subgoal><switch>KEEP</switch>",
    "<action>look</action>",
    OK.upper(),
]


# ---- the references: where tokens start, then one search for all of them ----


def search(text, starts, read=str):
    """-> owner of each token: 0 switch, 1 subgoal, 2 action, -1 none. A block is an opening tag that its closing tag follows."""
    tags, blocks = list(TAG.finditer(text)), {}
    for tag, after in zip(tags, tags[1:]):
        if (tag[1], after[1]) == ("", "/") and tag[2] == after[2]:
            blocks.setdefault(tag[2], (tag.start(), after.end(), text[tag.end() : after.start()]))
    if "action" not in blocks or not read(blocks["action"][2]).strip():
        return [2] * len(starts)  # no readable action
    return [
        next(
            (KINDS.index(kind) for kind, (start, end, _) in blocks.items() if start <= at < end), -1
        )
        for at in starts
    ]


def by_token(row, tokenizer):
    text, starts = "", []
    for i in row:
        starts.append(len(text))
        text += tokenizer.decode([i])
    return search(text, starts)


def by_prefix(row, tokenizer):
    starts = [len(tokenizer.decode(row[:j]).rstrip("\ufffd")) for j in range(len(row))]
    return search(tokenizer.decode(row), starts)


def by_bytes(row, tokenizer):
    """One character a byte, so that no token holds a part of one; the bytes of a token by transformers' own table."""
    byte_of, added = (
        {char: chr(byte) for byte, char in bytes_to_unicode().items()},
        tokenizer.added_tokens_decoder,
    )
    text, starts = "", []
    for i, token in zip(row, tokenizer.convert_ids_to_tokens(row)):
        starts.append(len(text))
        text += token if i in added else "".join(byte_of[c] for c in token)
    return search(text, starts, lambda body: body.encode("latin-1").decode("utf-8", "replace"))


# ---- data and measuring ----


def answers(n):
    rng = random.Random(0)
    some = lambda most: " ".join(rng.choices(PHRASES, k=rng.randint(2, most)))
    return [response(rng.random() < 0.3, some(4) + ".", some(2)) for _ in range(n)]


def make_tokenizer(texts):
    if "QWEN_TOKENIZER" in os.environ:
        return "Qwen2.5's tokenizer", AutoTokenizer.from_pretrained(os.environ["QWEN_TOKENIZER"])
    return (
        "a tokenizer trained on the answers (QWEN_TOKENIZER is not set)",
        scratch.train_tokenizer(texts, 600),
    )


def adversarial(tokenizer):
    """Id rows: each text as the tokenizer writes it and character by character, cut after every token; and half characters."""
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    rows = [
        row
        for text in ADVERSARIAL
        for row in (encode(text), [i for char in text for i in encode(char)])
    ]
    ok, half = encode(OK), encode("🫕")[:1]
    return [row[:n] for row in rows for n in range(len(row) + 1)] + [
        ok[:n] + half + ok[n:] for n in range(len(ok) + 1)
    ]


def ours(rows, tokenizer):
    """Id rows -> owners as `search` says them, and the seconds that decision_masks took."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.tensor([row + [0] * (int(lengths.max()) - len(row)) for row in rows])  # [N, L]
    times = []
    for _ in range(5):
        start = time.perf_counter()
        masks = decision_masks(ids, lengths, tokenizer)
        times.append(time.perf_counter() - start)
    owner = sum((k + 1) * mask.long() for k, mask in enumerate(masks)) - 1  # [N, L]
    assert int(sum(mask.long() for mask in masks).max()) <= 1, "a token has two owners"
    assert (owner[torch.arange(ids.shape[1]) >= lengths[:, None]] == -1).all(), "padding is masked"
    return [row[:n] for row, n in zip(owner.tolist(), lengths.tolist())], min(times)


def theirs(method, rows, tokenizer, runs=1):
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        found = [method(row, tokenizer) for row in rows]
        times.append(time.perf_counter() - start)
    return found, min(times)


if __name__ == "__main__":
    torch.set_num_threads(min(2, os.cpu_count()))
    texts = answers(N)
    name, tokenizer = make_tokenizer(texts)
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    hard = adversarial(tokenizer)
    start = time.perf_counter()
    token_bytes(tokenizer)
    print(
        f"{name}: {N} answers of {sum(map(len, rows)) / N:.0f} tokens; "
        f"its table of bytes, made once, takes {1e3 * (time.perf_counter() - start):.0f} ms"
    )
    truth, trap = theirs(by_bytes, rows, tokenizer)[0], theirs(by_bytes, hard, tokenizer)[0]
    found, seconds = ours(rows, tokenizer)
    assert found == truth and ours(hard, tokenizer)[0] == trap, (
        "decision_masks is not what the bytes say"
    )
    print(
        f"decision_masks {1e3 * seconds:8.1f} ms           wrong on 0 of {N} valid and 0 of {len(hard)} adversarial answers"
    )
    slow = {}
    for label, method in {"by token": by_token, "by prefix": by_prefix}.items():
        found, slow[label] = theirs(method, rows, tokenizer, runs=2)
        assert found == truth, f"{label}: not the same on valid ASCII answers"
        wrong = sum(a != b for a, b in zip(theirs(method, hard, tokenizer)[0], trap))
        print(
            f"{label:14s} {1e3 * slow[label]:8.1f} ms ({slow[label] / seconds:5.1f}x)  wrong on 0 of {N} and {wrong} of {len(hard)}"
        )
    print(f"masks: {slow['by token'] / seconds:.0f}x")
