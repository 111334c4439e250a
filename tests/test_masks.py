"""Properties of the decision masks that hold for whatever a model may say, over random answers and random splits into tokens.

One seeded generator makes the answers. Where hypothesis is installed it picks the seeds, otherwise they are 0, 1, 2, ...
Always with the tiny tokenizer; with Qwen2.5's too where QWEN_TOKENIZER names its folder.
"""

import os
import random

import pytest
import torch
from transformers import AutoTokenizer

from hiper import KINDS, decision_masks, parse, response_text, token_bytes

try:
    from hypothesis import given, settings, strategies
except ModuleNotFoundError:
    given = None

TAGS = [tag for kind in KINDS for tag in (f"<{kind}>", f"</{kind}>")]
WORDS = [
    "find a pan",
    "go to drawer 1",
    ".",
    ")",
    "<",
    ">",
    "</",
    "a < b",
    "<b>",
    " ",
    "\n",
    "苹果",
    "👩‍🍳",
    "🫕",
    "q\u0301",
    "𝔘",
    "\u3000",
    "\x85",
]


def over_seeds(test, examples=40):
    """Run a test for many values of its argument `seed`."""
    if given is None:
        return pytest.mark.parametrize("seed", range(examples))(test)
    return settings(max_examples=examples, deadline=None, database=None, derandomize=True)(
        given(seed=strategies.integers(0))(test)
    )


@pytest.fixture(scope="module", params=["tiny", "qwen"])
def tokenizer(request):
    if request.param == "tiny":
        return request.getfixturevalue("tiny_tokenizer")
    if "QWEN_TOKENIZER" not in os.environ:
        pytest.skip("QWEN_TOKENIZER names no folder with Qwen2.5's tokenizer")
    return AutoTokenizer.from_pretrained(os.environ["QWEN_TOKENIZER"])


# ---- the generator: answers, and ids that stand for them ----


def say(rng, least=0):
    return "".join(rng.choices(WORDS, k=rng.randrange(least, 5)))


def block(kind, body):
    return f"<{kind}>{body}</{kind}>"


def valid_parts(rng):
    """Text around and between three blocks: [head, switch, gap, subgoal, gap, action, tail]."""
    bodies = (
        rng.choice(("KEEP", "SWITCH", " SWITCH\n")),
        say(rng) + rng.choice(("a pan", "a pan.", "果)")),
        "x" + say(rng),
    )
    blocks = [block(kind, body) for kind, body in zip(KINDS, bodies)]
    around = [say(rng) if rng.random() < 0.3 else "" for _ in range(4)]
    return [around[0], blocks[0], around[1], blocks[1], around[2], blocks[2], around[3]]


def damaged(rng):
    """A text with a tag or block missing, repeated, nested, reordered, empty, truncated, or with no order at all."""
    parts, tag, kind = valid_parts(rng), rng.choice(TAGS), rng.choice(KINDS)
    text, at = "".join(parts), 1 + 2 * KINDS.index(kind)
    return rng.choice(
        (
            lambda: text.replace(tag, "", 1),  # a tag is missing
            lambda: text.replace(tag, rng.choice(TAGS)),  # or another one
            lambda: text.replace(tag, tag + say(rng) + tag),  # repeated
            lambda: text.replace(
                f"</{kind}>", tag + say(rng) + f"</{kind}>"
            ),  # inside a block, as in the subgoal
            lambda: text.replace(
                f"</{kind}>", rng.choice(parts[1::2]) + f"</{kind}>"
            ),  # a block inside a block
            lambda: "".join(
                parts[:at]
                + [block(kind, rng.choice(("", " ", "\u3000\x85", "keep")))]
                + parts[at + 1 :]
            ),  # empty
            lambda: "".join(parts + parts[at : at + 1]),  # a block twice
            lambda: "".join(rng.sample(parts, len(parts))),  # reordered
            lambda: text[: rng.randrange(len(text))],  # truncated
            lambda: "".join(rng.choices(TAGS + WORDS, k=rng.randrange(16))),
        )
    )()


def spell(text, tokenizer, rng):
    """Ids that stand for `text`: the tokenizer's own, some of them broken into bytes so that characters and tags are split."""
    ids, table = tokenizer(text, add_special_tokens=False)["input_ids"], token_bytes(tokenizer)
    byte, broken = (
        {table[i]: i for i in range(300) if len(table[i]) == 1},
        rng.choice((0, 0.1, 0.6)),
    )
    return [
        j
        for i in ids
        for j in ([byte[bytes([b])] for b in table[i]] if rng.random() < broken else [i])
    ]


def answers(seed, tokenizer, n=6):
    """-> random generator, n id rows, the first of them valid, some with a stray half character or an id beyond the tokenizer."""
    rng = random.Random(seed)
    rows = [spell("".join(valid_parts(rng)), tokenizer, rng)] + [
        spell(damaged(rng), tokenizer, rng) for _ in range(n - 1)
    ]
    for row in rows[n // 2 :]:
        if rng.random() < 0.4:
            row.insert(
                rng.randrange(len(row) + 1),
                rng.choice((spell("🫕", tokenizer, rng)[0], len(tokenizer) + 7)),
            )
    return rng, rows


def owners(rows, tokenizer, width=None):
    """Id rows -> owner of each token, a kind or None; no token has two, padding (here the longest row's ids) has none."""
    lengths, longest = torch.tensor([len(row) for row in rows]), max(rows, key=len)
    ids = torch.tensor(longest + [0] * ((width or 0) - len(longest)), dtype=torch.long).repeat(
        len(rows), 1
    )  # [N, L]
    for n, row in enumerate(rows):
        ids[n, : len(row)] = torch.tensor(row)
    masks = torch.stack(decision_masks(ids, lengths, tokenizer))  # [3, N, L]
    assert masks.dtype == torch.bool and masks.shape[1:] == ids.shape
    assert int(masks.sum(0).max() if masks.numel() else 0) <= 1
    assert not masks[:, torch.arange(ids.shape[1]) >= lengths[:, None]].any()
    which = [
        [next((k for k, on in zip(KINDS, token) if on), None) for token in row]
        for row in masks.permute(1, 2, 0).tolist()
    ]
    return [owner[: len(row)] for owner, row in zip(which, rows)]


# ---- the oracle: paint the bytes, then look at each token's first one ----


def painted(pieces):
    """Tokens as bytes -> owner of each token."""
    raw = b"".join(pieces)
    tags = [(i, tag) for i in range(len(raw)) for tag in TAGS if raw.startswith(tag.encode(), i)]
    paint, body = [None] * (len(raw) + 1), b""
    for kind in KINDS:
        for (i, tag), (j, after) in zip(tags, tags[1:]):
            if (tag, after) == (f"<{kind}>", f"</{kind}>"):
                paint[i : j + len(after)] = [kind] * (j + len(after) - i)
                body = raw[i + len(tag) : j] if kind == "action" else body
                break
    if not body.decode("utf-8", "replace").strip():
        return ["action"] * len(pieces)
    return [paint[len(b"".join(pieces[:n]))] for n in range(len(pieces))]


# ---- the properties ----


@over_seeds
def test_masks_are_the_painted_bytes_and_agree_with_the_parser(tokenizer, seed):
    _, rows = answers(seed, tokenizer)
    for row, owner in zip(rows, owners(rows, tokenizer)):
        assert owner == painted([token_bytes(tokenizer)[i] for i in row])
        decision = parse(response_text(row, tokenizer))
        if not decision.action:
            assert owner == ["action"] * len(row)
        if decision.valid:  # three runs, in order
            assert sorted(set(owner) - {None}) == sorted(KINDS)
            order = [KINDS.index(kind) for kind in owner if kind]
            assert order == sorted(order)
        assert "action" in owner or not row  # something is always trained


@over_seeds
def test_every_token_of_a_valid_answer_is_where_it_was_written(tokenizer, seed):
    rng = random.Random(seed)
    parts = valid_parts(rng)
    row = spell("".join(parts), tokenizer, rng)
    written = [
        kind
        for part, kind in zip(parts, (None, "switch", None, "subgoal", None, "action", None))
        for _ in part.encode()
    ]
    at, (owner,) = 0, owners([row], tokenizer)
    assert parse("".join(parts)).valid
    for i, kind in zip(row, owner):
        assert kind == written[at]
        at += len(token_bytes(tokenizer)[i])
    assert at == len(written)


@over_seeds
def test_an_answer_may_stop_at_any_token(tokenizer, seed):
    _, rows = answers(seed, tokenizer, 2)
    for row in rows:
        cut = [row[:n] for n in range(len(row) + 1)]
        for short, owner in zip(cut, owners(cut, tokenizer)):
            assert owner == painted([token_bytes(tokenizer)[i] for i in short])


@over_seeds
def test_neither_padding_nor_the_other_rows_matter(tokenizer, seed):
    rng, rows = answers(seed, tokenizer)
    together, order = owners(rows, tokenizer), rng.sample(range(len(rows)), len(rows))
    assert owners(rows, tokenizer, max(map(len, rows)) + rng.randrange(1, 30)) == together
    assert owners([rows[n] for n in order], tokenizer) == [together[n] for n in order]
    assert owners(rows[:1], tokenizer) == together[:1]


def test_the_generator_makes_what_it_should(tokenizer):
    """Valid and invalid answers, tags within one token and over several, characters split over tokens."""
    texts = [
        parse(response_text(row, tokenizer))
        for seed in range(40)
        for row in answers(seed, tokenizer)[1]
    ]
    assert 40 <= sum(decision.valid for decision in texts) <= 120
    for word in ("no <", "not well-formed", "more than one", "empty", "not KEEP", "out of order"):
        assert any(word in decision.error for decision in texts), word
    pieces = {
        token_bytes(tokenizer)[i]
        for seed in range(40)
        for row in answers(seed, tokenizer)[1]
        for i in row
    }
    assert {b"<", b"\xf0"} < pieces and any(
        p.startswith(b".</") or p == b"</subgoal>" for p in pieces
    )
