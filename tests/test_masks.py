"""Properties of the decision masks that hold whatever a model says and however it is tokenized.

One seeded generator makes the answers. Where hypothesis is installed it picks the seeds, otherwise
they are 0, 1, 2, ... Always with the tiny tokenizer; with Qwen2.5's too where QWEN_TOKENIZER names
its folder.
"""

import random

import pytest
import torch

from hiper import decision_masks, parse, subgoal_positions
from sample_texts import KINDS, TAGS, block, encode, qwen_tokenizer
from support.tokens import response_text, token_bytes

try:
    from hypothesis import given, settings, strategies
except ModuleNotFoundError:
    given = None

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
    return qwen_tokenizer()


# ---- the generator: answers, and ids that stand for them ---------------------------------------


def say(rng, least=0):
    return "".join(rng.choices(WORDS, k=rng.randrange(least, 5)))


def valid_parts(rng):
    """Text around and between three blocks: [head, switch, gap, subgoal, gap, action, tail]."""
    bodies = (
        rng.choice(("KEEP", "SWITCH", " SWITCH\n")),
        say(rng) + rng.choice(("a pan", "a pan.", "果)")),
        "x" + say(rng),
    )
    blocks = [block(kind, body) for kind, body in zip(KINDS, bodies, strict=True)]
    around = [say(rng) if rng.random() < 0.3 else "" for _ in range(4)]
    return [around[0], blocks[0], around[1], blocks[1], around[2], blocks[2], around[3]]


def damaged(rng):
    """A text in which one thing is wrong, or that has no order at all."""
    parts = valid_parts(rng)
    tag = rng.choice(TAGS)
    kind = rng.choice(KINDS)
    text = "".join(parts)
    closing = f"</{kind}>"
    place = 1 + 2 * KINDS.index(kind)
    damage = rng.randrange(10)
    if damage == 0:  # a tag is missing
        return text.replace(tag, "", 1)
    if damage == 1:  # or another one
        return text.replace(tag, rng.choice(TAGS))
    if damage == 2:  # repeated
        return text.replace(tag, tag + say(rng) + tag)
    if damage == 3:  # inside a block
        return text.replace(closing, tag + say(rng) + closing)
    if damage == 4:  # a block inside a block
        return text.replace(closing, rng.choice(parts[1::2]) + closing)
    if damage == 5:  # an empty block
        parts[place] = block(kind, rng.choice(("", " ", "\u3000\x85", "keep")))
        return "".join(parts)
    if damage == 6:  # a block twice
        return "".join(parts + parts[place : place + 1])
    if damage == 7:  # reordered
        return "".join(rng.sample(parts, len(parts)))
    if damage == 8:  # truncated
        return text[: rng.randrange(len(text))]
    return "".join(rng.choices(TAGS + WORDS, k=rng.randrange(16)))


def spell(text, tokenizer, rng):
    """Ids that stand for `text`: the tokenizer's own, some of them broken into bytes.

    So characters and tags are split.
    """
    table = token_bytes(tokenizer)
    id_of_byte = {table[i]: i for i in range(300) if len(table[i]) == 1}
    broken = rng.choice((0, 0.1, 0.6))
    ids = []
    for i in encode(tokenizer, text):
        if rng.random() < broken:
            ids += [id_of_byte[bytes([byte])] for byte in table[i]]
        else:
            ids.append(i)
    return ids


def answers(seed, tokenizer, n=6):
    """-> random generator, n id rows, the first of them valid.

    Some have a stray half character or an id beyond the tokenizer.
    """
    rng = random.Random(seed)
    texts = ["".join(valid_parts(rng))] + [damaged(rng) for _ in range(n - 1)]
    rows = [spell(text, tokenizer, rng) for text in texts]
    for row in rows[n // 2 :]:
        if rng.random() < 0.4:
            stray = rng.choice((spell("🫕", tokenizer, rng)[0], len(tokenizer) + 7))
            row.insert(rng.randrange(len(row) + 1), stray)
    return rng, rows


def owners(rows, tokenizer, width=None):
    """Id rows -> owner of each token, a kind or None. No token has two, and padding has none.

    The padding holds the longest row's ids.
    """
    lengths = torch.tensor([len(row) for row in rows])
    longest = max(rows, key=len)
    filler = longest + [0] * ((width or 0) - len(longest))
    ids = torch.tensor(filler, dtype=torch.long).repeat(len(rows), 1)  # [N, L]
    for n, row in enumerate(rows):
        ids[n, : len(row)] = torch.tensor(row)
    masks = torch.stack(decision_masks(ids, lengths, tokenizer))  # [3, N, L]
    assert masks.dtype == torch.bool
    assert masks.shape[1:] == ids.shape
    assert int(masks.sum(0).max() if masks.numel() else 0) <= 1
    assert not masks[:, torch.arange(ids.shape[1]) >= lengths[:, None]].any()
    which = [
        [next((k for k, on in zip(KINDS, token, strict=True) if on), None) for token in row]
        for row in masks.permute(1, 2, 0).tolist()
    ]
    return [owner[: len(row)] for owner, row in zip(which, rows, strict=True)]


# ---- the oracle: paint the bytes, then look at each token's first one --------------------------


def painted(pieces):
    """Tokens as bytes -> owner of each token."""
    raw = b"".join(pieces)
    tags = [(i, tag) for i in range(len(raw)) for tag in TAGS if raw.startswith(tag.encode(), i)]
    paint = [None] * (len(raw) + 1)
    body = b""
    for kind in KINDS:
        for (i, tag), (j, after) in zip(tags, tags[1:], strict=False):
            if (tag, after) == (f"<{kind}>", f"</{kind}>"):
                paint[i : j + len(after)] = [kind] * (j + len(after) - i)
                if kind == "action":
                    body = raw[i + len(tag) : j]
                break
    if not body.decode("utf-8", "replace").strip():
        return ["action"] * len(pieces)
    return [paint[len(b"".join(pieces[:n]))] for n in range(len(pieces))]


# ---- the properties ----------------------------------------------------------------------------


@over_seeds
def test_masks_are_the_painted_bytes_and_agree_with_the_parser(tokenizer, seed):
    _, rows = answers(seed, tokenizer)
    for row, owner in zip(rows, owners(rows, tokenizer), strict=True):
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
    kinds = (None, "switch", None, "subgoal", None, "action", None)
    written = [kind for part, kind in zip(parts, kinds, strict=True) for _ in part.encode()]
    [owner] = owners([row], tokenizer)
    assert parse("".join(parts)).valid
    start = 0
    for i, kind in zip(row, owner, strict=True):
        assert kind == written[start]
        start += len(token_bytes(tokenizer)[i])
    assert start == len(written)


@over_seeds
def test_v_low_is_read_inside_the_subgoal_block_of_a_valid_answer(tokenizer, seed):
    """No token after the place begins inside the block, but for the final `>`."""
    rng, rows = answers(seed, tokenizer)
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for n, row in enumerate(rows):
        ids[n, : len(row)] = torch.tensor(row)
    places = subgoal_positions(ids, torch.tensor([len(row) for row in rows]), tokenizer)
    for row, owner, place in zip(rows, owners(rows, tokenizer), places.tolist(), strict=True):
        if not parse(response_text(row, tokenizer)).valid:
            continue
        assert owner[place] == "subgoal"
        inside = [n for n in range(place + 1, len(row)) if owner[n] == "subgoal"]
        after = [token_bytes(tokenizer)[row[n]] for n in inside]
        assert b"".join(after)[:1] in (b"", b">")
        assert len([piece for piece in after if piece]) <= 1


@over_seeds
def test_an_answer_may_stop_at_any_token(tokenizer, seed):
    _, rows = answers(seed, tokenizer, 2)
    for row in rows:
        cut = [row[:n] for n in range(len(row) + 1)]
        for short, owner in zip(cut, owners(cut, tokenizer), strict=True):
            assert owner == painted([token_bytes(tokenizer)[i] for i in short])


@over_seeds
def test_neither_padding_nor_the_other_rows_matter(tokenizer, seed):
    rng, rows = answers(seed, tokenizer)
    together = owners(rows, tokenizer)
    order = rng.sample(range(len(rows)), len(rows))
    assert owners(rows, tokenizer, max(map(len, rows)) + rng.randrange(1, 30)) == together
    assert owners([rows[n] for n in order], tokenizer) == [together[n] for n in order]
    assert owners(rows[:1], tokenizer) == together[:1]


def test_the_generator_makes_what_it_should(tokenizer):
    """Valid and invalid answers, tags in one token and over several, characters over tokens."""
    rows = [row for seed in range(40) for row in answers(seed, tokenizer)[1]]
    decisions = [parse(response_text(row, tokenizer)) for row in rows]
    assert 40 <= sum(decision.valid for decision in decisions) <= 120
    for word in ("no <", "not well-formed", "more than one", "empty", "not KEEP", "out of order"):
        assert any(word in decision.error for decision in decisions), word
    pieces = {token_bytes(tokenizer)[i] for row in rows for i in row}
    assert {b"<", b"\xf0"} < pieces
    assert any(piece.startswith(b".</") or piece == b"</subgoal>" for piece in pieces)
