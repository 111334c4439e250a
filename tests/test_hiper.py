"""hiper.py: parser, decision masks, losses, actor-critic and prompts against slow, obvious oracles; and rollout's old log-probs.

With QWEN_TOKENIZER set to a folder with Qwen2.5's vocab.json, merges.txt and tokenizer_config.json, its tokenizer is tested too.
"""

import math
import os
import random
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

import hiper
import rollout
from support import cloning as scratch
from hiper import ActorCritic, Decision, decision_masks, parse, response, response_text, token_bytes
from support.last_layer import reading

torch.set_num_threads(1)
KINDS = "switch", "subgoal", "action"
TAGS = [tag for kind in KINDS for tag in (f"<{kind}>", f"</{kind}>")]
VALID = "<switch>SWITCH</switch><subgoal>find a pan.</subgoal><action>go to drawer 1</action>"


def block(kind, body):
    return f"<{kind}>{body}</{kind}>"


def said(switch="KEEP", subgoal="a pan", action="look"):
    return block("switch", switch) + block("subgoal", subgoal) + block("action", action)


# ---- the oracle: walk over the text, list the tags; a block is an opening tag whose next tag is its own closing one ----


def oracle_blocks(text):
    """str -> {kind: (start, end of the opening tag, start of the closing tag, end)} of the first well-formed block."""
    tags, found = (
        [(i, tag) for i in range(len(text)) for tag in TAGS if text.startswith(tag, i)],
        {},
    )
    for (i, tag), (j, after) in zip(tags, tags[1:]):
        kind = tag[1:-1]
        if kind in KINDS and after == f"</{kind}>" and kind not in found:
            found[kind] = i, i + len(tag), j, j + len(after)
    return found


def oracle_parse(text):
    found = oracle_blocks(text)
    body = {
        kind: text[found[kind][1] : found[kind][2]].strip() if kind in found else ""
        for kind in KINDS
    }
    valid = (
        body["switch"] in ("KEEP", "SWITCH")
        and bool(body["subgoal"])
        and bool(body["action"])
        and all(text.count(tag) == 1 for tag in TAGS)
        and sorted(found, key=found.get) == list(KINDS)
    )
    return body["switch"] == "SWITCH", body["subgoal"], body["action"], valid


def oracle_pieces(tokenizer):
    """{id: bytes} of a byte-level tokenizer by transformers' own table."""
    byte_of = {char: byte for byte, char in bytes_to_unicode().items()}
    added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
    return {
        i: added[i].encode() if i in added else bytes(byte_of[c] for c in token)
        for token, i in tokenizer.get_vocab().items()
    }


def oracle_owner(text, starts):
    """text: str; starts: the index of each token's first character -> list of kind or None."""
    found = oracle_blocks(text)
    if not oracle_parse(text)[2]:
        return ["action"] * len(starts)
    return [
        next((kind for kind, (start, _, _, end) in found.items() if start <= s < end), None)
        for s in starts
    ]


def owners(masks, n, length):
    """Row n of Masks -> list of kind or None; checks that a token has one owner at the most, and padding none."""
    columns = torch.stack([mask[n] for mask in masks]).long()  # [3, L]
    assert int(columns.sum(0).max()) <= 1 and not columns[:, length:].any()
    return [
        next((kind for kind, on in zip(KINDS, column) if on), None)
        for column in columns.T[:length].tolist()
    ]


def soup(
    rng,
    words=(
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
    ),
):
    """A text that is valid, nearly valid, or nonsense; no U+FFFD in it."""
    say = lambda: "".join(rng.choices(words, k=rng.randrange(4)))
    parts = [
        block("switch", rng.choice(("KEEP", "SWITCH", "SWITCH", say()))),
        block("subgoal", say() + "."),
        block("action", say() + "x"),
    ]
    hurt = rng.randrange(12)
    if hurt == 0:
        del parts[rng.randrange(3)]
    elif hurt == 1:
        parts.insert(rng.randrange(4), rng.choice(parts))
    elif hurt == 2:
        rng.shuffle(parts)
    elif hurt == 3:
        parts[1] = block("subgoal", say() + rng.choice((parts[2], parts[0], *TAGS)) + say())
    elif hurt == 4:
        parts = ["".join(parts)[: rng.randrange(90)]]
    elif hurt == 5:
        parts = ["".join(parts).replace(rng.choice(TAGS), rng.choice(("", *TAGS, "<Action>")))]
    elif hurt == 6:
        kind = rng.choice(KINDS)
        parts[KINDS.index(kind)] = block(kind, rng.choice(("", " ", "\n", "\u3000")))
    elif hurt == 7:
        parts = [say()] + [piece for part in parts for piece in (part, say())]
    elif hurt == 8:
        parts = rng.choices([*TAGS, *TAGS, *words], k=rng.randrange(14))
    return "".join(parts)


# ---- parse ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, switch, subgoal, action, error",
    [
        (VALID, True, "find a pan.", "go to drawer 1", ""),
        (said(), False, "a pan", "look", ""),
        (said("\nSWITCH ", " \n a pan\t", "\n look\n"), True, "a pan", "look", ""),
        (said().replace("><", ">\n\n<"), False, "a pan", "look", ""),
        (f"Well: {said()} so it is.<|im_end|>", False, "a pan", "look", ""),
        (said(subgoal="line one\nline two"), False, "line one\nline two", "look", ""),
        (said(subgoal="a < b > c </b> <action >"), False, "a < b > c </b> <action >", "look", ""),
        (said(subgoal="苹果 é", action="👩‍🍳"), False, "苹果 é", "👩‍🍳", ""),
        (said(subgoal="\x00", action="a\x00b"), False, "\x00", "a\x00b", ""),
        (said(subgoal="\ud800x", action="\udfff"), False, "?x", "?", ""),
        ("", False, "", "", "no <switch> block"),
        ("no tags at all", False, "", "", "no <switch> block"),
        (said().replace(block("switch", "KEEP"), ""), False, "a pan", "look", "no <switch> block"),
        (
            said("SWITCH").replace(block("subgoal", "a pan"), ""),
            True,
            "",
            "look",
            "no <subgoal> block",
        ),
        (
            said("SWITCH").replace(block("action", "look"), ""),
            True,
            "a pan",
            "",
            "no <action> block",
        ),
        (said(""), False, "a pan", "look", "empty <switch> block"),
        (said("SWITCH", "\n"), True, "", "look", "empty <subgoal> block"),
        (said("SWITCH", action=" "), True, "a pan", "", "empty <action> block"),
        (said(action="\u3000\xa0"), False, "a pan", "", "empty <action> block"),
        (block("switch", "SWITCH") + said(), True, "a pan", "look", "more than one <switch> tag"),
        (said() + block("subgoal", "b"), False, "a pan", "look", "more than one <subgoal> tag"),
        (said() + block("action", "b"), False, "a pan", "look", "more than one <action> tag"),
        (said() + "<action>", False, "a pan", "look", "more than one <action> tag"),
        (said() + "</action>", False, "a pan", "look", "more than one <action> tag"),
        ("<action>" + said(), False, "a pan", "look", "more than one <action> tag"),
        (said(action="a<action>b"), False, "a pan", "b", "more than one <action> tag"),
        (said(action="<action>b</action>"), False, "a pan", "b", "more than one <action> tag"),
        (
            said(subgoal="a" + block("action", "b")),
            False,
            "",
            "b",
            "<subgoal> block not well-formed",
        ),
        (said("KEEP</subgoal>"), False, "a pan", "look", "<switch> block not well-formed"),
        (said(subgoal="a</switch>b"), False, "", "look", "more than one <switch> tag"),
        (said().replace("</action>", ""), False, "a pan", "", "<action> block not well-formed"),
        (said().replace("<action>", ""), False, "a pan", "", "<action> block not well-formed"),
        ("</action>look<action>", False, "", "", "no <switch> block"),
        (
            block("subgoal", "a") + block("switch", "SWITCH") + block("action", "b"),
            True,
            "a",
            "b",
            "out of order",
        ),
        (
            block("switch", "SWITCH") + block("action", "b") + block("subgoal", "a"),
            True,
            "a",
            "b",
            "out of order",
        ),
        (
            block("action", "b") + block("switch", "KEEP") + block("subgoal", "a"),
            False,
            "a",
            "b",
            "out of order",
        ),
        (said("keep"), False, "a pan", "look", "'keep'"),
        (said("switch"), False, "a pan", "look", "'switch'"),
        (said("KEEP|SWITCH"), False, "a pan", "look", "'KEEP|SWITCH'"),
        (said("SWITCH SWITCH"), False, "a pan", "look", "not KEEP or SWITCH"),
        (said("SWITCH."), False, "a pan", "look", "not KEEP or SWITCH"),
        (said("\ud800"), False, "a pan", "look", "not KEEP or SWITCH"),
        (said().upper(), False, "", "", "no <switch> block"),
        (said().replace("action>", "Action>"), False, "a pan", "", "no <action> block"),
    ],
)
def test_parse(text, switch, subgoal, action, error):
    decision = parse(text)
    assert decision[:4] == (switch, subgoal, action, not error)
    assert error in decision.error and bool(decision.error) == bool(error)
    assert decision[:4] == oracle_parse(text.encode("utf-8", "replace").decode())


def test_parse_is_invalid_until_the_text_is_complete():
    for n in range(len(VALID)):
        decision = parse(VALID[:n])
        assert not decision.valid and decision.error and decision.action == ""
    assert parse(VALID).valid and parse(VALID + "\n<").valid


def test_parse_random_soup():
    rng, valid = random.Random(0), 0
    for _ in range(4000):
        text = soup(rng)
        decision = parse(text)
        assert decision[:4] == oracle_parse(text), text
        assert decision.valid == (decision.error == "")
        assert not decision.valid or text.strip() != "" and decision.subgoal and decision.action
        valid += decision.valid
    assert 1000 < valid < 3000  # the soup has both


@pytest.mark.parametrize(
    "text, valid",
    [
        ("<switch>" * 125_000, False),
        ("</action>" * 110_000, False),
        ("<" * 1_000_000, False),
        ("<action>" + "<" * 1_000_000, False),
        ("<action>" + "x" * 1_000_000, False),
        ("<action>x</subgoal>" * 50_000, False),
        (block("switch", "KEEP") * 40_000, False),
        (said("x" * 1_000_000), False),
        (said(subgoal="é<" * 400_000), True),
        (said() + " " * 1_000_000, True),
    ],
)
def test_parse_a_megabyte_quickly(text, valid):
    start = time.perf_counter()
    decision = parse(text)
    assert time.perf_counter() - start < 3  # 0.1 s on an idle core
    assert decision.valid == valid and len(decision.error) < 100  # "a few words", whatever the text


# ---- decision masks ---------------------------------------------------------------------------------------------------


def merging_texts():
    rng, things = random.Random(5), ("find a pan", "heat it", "go to drawer", "take 苹果", "café")
    return [
        said(
            rng.choice(("KEEP", "SWITCH")),
            rng.choice(things) + rng.choice((".", "", ")")),
            rng.choice(things),
        )
        for _ in range(200)
    ]


def glued_tokenizer():
    """Byte-level BPE that does not split words first, so one token may hold several tags and blocks."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        decoders.ByteLevel(),
    )
    core.train_from_iterator(
        merging_texts(),
        trainers.BpeTrainer(
            vocab_size=900,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
            special_tokens=["<|end|>"],
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|end|>")


def bytes_tokenizer():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return Qwen2Tokenizer({token: i for i, token in enumerate(["<|endoftext|>", *letters])}, [])


def merging_tokenizer():
    return bytes_tokenizer().train_new_from_iterator(
        merging_texts(),
        900,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )


def qwen_tokenizer():
    if "QWEN_TOKENIZER" not in os.environ:
        pytest.skip(
            "QWEN_TOKENIZER names no folder with Qwen2.5's vocab.json, merges.txt and tokenizer_config.json"
        )
    return AutoTokenizer.from_pretrained(os.environ["QWEN_TOKENIZER"])


MAKERS = dict(
    scratch=lambda: scratch.train_tokenizer(merging_texts(), 600),
    merging=merging_tokenizer,
    glued=glued_tokenizer,
    bytes=bytes_tokenizer,
    qwen=qwen_tokenizer,
)


@pytest.fixture(scope="module", params=MAKERS)
def tok(request):
    """A tokenizer, what its ids stand for by the oracle, and the way back."""
    tokenizer = MAKERS[request.param]()
    pieces = oracle_pieces(tokenizer)
    return SimpleNamespace(
        name=request.param,
        tokenizer=tokenizer,
        pieces=pieces,
        id_of={piece: i for i, piece in pieces.items()},
    )


def encode(tok, text):
    return tok.tokenizer(text, add_special_tokens=False)["input_ids"]


def any_split(tok, raw, rng, longest=24):
    """Bytes -> ids that stand for them, split anywhere the vocabulary allows: no tokenizer would write them."""
    ids, at = [], 0
    while at < len(raw):
        ends = [n for n in range(at + 1, min(at + longest, len(raw)) + 1) if raw[at:n] in tok.id_of]
        ids.append(tok.id_of[raw[at : (end := rng.choice(ends))]])
        at = end
    return ids


def masks_of(tok, rows, rng):
    """Rows of ids -> Masks, padded with arbitrary ids, two columns wider than need be."""
    width = max(map(len, rows)) + 2
    ids = [row + [rng.choice((0, 7, 10**9, -1)) for _ in range(width - len(row))] for row in rows]
    return decision_masks(
        torch.tensor(ids), torch.tensor([len(row) for row in rows]), tok.tokenizer
    )


def check_by_bytes(tok, rows, rng):
    """Masks of id rows against the oracle on bytes; and with what `parse` reads."""
    masks = masks_of(tok, rows, rng)
    for n, row in enumerate(rows):
        pieces = [tok.pieces[i] for i in row]
        starts = [len(b"".join(pieces[:j])) for j in range(len(row))]
        raw = b"".join(pieces)
        spread = "".join(
            chr(b) if b < 128 else "\u0100" for b in raw
        )  # one character a byte; 128 and up are not space
        want = (
            oracle_owner(spread, starts)
            if parse(raw.decode("utf-8", "replace")).action
            else ["action"] * len(row)
        )
        got = owners(masks, n, len(row))
        assert got == want, (raw, got, want)
        assert response_text(row, tok.tokenizer) == raw.decode("utf-8", "replace")
        if not parse(response_text(row, tok.tokenizer)).action:
            assert got == ["action"] * len(row)


def test_tokenizers_are_what_the_tests_need(tok):
    merged = {
        "scratch": [b"<switch>", b"KEEP", b"</subgoal>"],
        "merging": [b".</", b"><", b")</"],
        "qwen": [b".</", b"><", b"></", b">\n"],
        "glued": [b"</subgoal><action>"],
        "bytes": [b"<", b"\xf0"],
    }[tok.name]
    for piece in merged:
        assert any(piece in p for p in tok.pieces.values()), piece
    if tok.name == "merging":
        assert any(tok.pieces[i] == b"><" for i in encode(tok, VALID)) and any(
            tok.pieces[i] == b".</" for i in encode(tok, VALID)
        )
    if tok.name == "bytes":
        assert len(encode(tok, "苹é")) == 5


def test_masks_match_prefix_decoding(tok):
    rng, rows = random.Random(1), []
    for _ in range(150 if tok.name != "qwen" else 250):
        text = soup(rng)
        rows.append(rng.choice((encode(tok, text), any_split(tok, text.encode(), rng))))
    masks = masks_of(tok, rows, rng)
    for n, row in enumerate(rows):
        text = tok.tokenizer.decode(row)
        starts = [len(tok.tokenizer.decode(row[:j]).rstrip("\ufffd")) for j in range(len(row))]
        assert owners(masks, n, len(row)) == oracle_owner(text, starts), text


def test_masks_match_bytes_on_any_split(tok):
    rng, rows = random.Random(2), []
    ends = list(tok.tokenizer.added_tokens_decoder)[:3]
    for _ in range(400):
        raw = soup(rng).encode()
        raw = (
            raw[: rng.randrange(len(raw) + 1)] if rng.random() < 0.2 else raw
        )  # may end amid a character
        row = any_split(tok, raw, rng)
        if rng.random() < 0.3:
            row.insert(
                rng.randrange(len(row) + 1),
                rng.choice(ends + [tok.id_of[b"\xff"], tok.id_of[b"\x85"]]),
            )
        rows.append(row)
    rows += [rng.choices(list(tok.pieces), k=rng.randrange(40)) for _ in range(50)]
    check_by_bytes(tok, rows, rng)


def test_masks_of_a_plain_answer_cover_it(tok):
    rng = random.Random(3)
    for switch, subgoal, action in [
        (True, "find a pan.", "go to drawer 1"),
        (False, "苹果)", "look"),
        (True, "👩‍🍳 é", "take 👩‍🍳"),
    ]:
        text = response(switch, subgoal, action)
        for row in (encode(tok, text), any_split(tok, text.encode(), rng)):
            got = owners(masks_of(tok, [row], rng), 0, len(row))
            assert None not in got
            assert got == sorted(got, key=KINDS.index)  # one run each, in order
            for kind in KINDS:  # and each run is its block, but for a merged edge
                run = b"".join(tok.pieces[i] for i, k in zip(row, got) if k == kind).decode()
                body = {
                    "switch": "SWITCH" if switch else "KEEP",
                    "subgoal": subgoal,
                    "action": action,
                }[kind]
                assert body in run or tok.name == "glued"


def test_masks_leave_out_what_is_around(tok):
    head, gap, tail = (
        encode(tok, "Well. "),
        encode(tok, "\n\n"),
        encode(tok, " so") + list(tok.tokenizer.added_tokens_decoder)[:1],
    )
    parts = [encode(tok, block(kind, body)) for kind, body in zip(KINDS, ("KEEP", "a pan", "look"))]
    row = (
        head + parts[0] + gap + parts[1] + gap + parts[2] + tail + parts[2]
    )  # the second action block is nobody's
    want = (
        [None] * len(head)
        + ["switch"] * len(parts[0])
        + [None] * len(gap)
        + ["subgoal"] * len(parts[1])
        + [None] * len(gap)
        + ["action"] * len(parts[2])
        + [None] * (len(tail) + len(parts[2]))
    )
    assert owners(masks_of(tok, [row], random.Random(0)), 0, len(row)) == want


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nothing",
        said(action=""),
        said(action="\u3000"),
        said(action="\x85\x1c "),
        VALID[:-1],
        said(action="<switch>"),
        said().replace("<action>", ""),
    ],
)
def test_without_a_readable_action_all_is_action(tok, text):
    row = encode(tok, text) + [list(tok.tokenizer.added_tokens_decoder)[0]]
    assert owners(masks_of(tok, [row], random.Random(0)), 0, len(row)) == ["action"] * len(row)
    assert not parse(response_text(row, tok.tokenizer)).valid


def test_padding_and_empty_rows_change_nothing(tok):
    rows = [encode(tok, VALID), [], encode(tok, "junk"), encode(tok, said())]
    masks = masks_of(tok, rows, random.Random(0))
    other = masks_of(tok, rows, random.Random(1))
    assert all(
        torch.equal(a, b) and a.dtype == torch.bool and a.shape == (4, len(max(rows, key=len)) + 2)
        for a, b in zip(masks, other)
    )
    assert not any(mask[1].any() for mask in masks)
    for n, row in enumerate(rows):  # alone as in the batch
        assert owners(masks_of(tok, [row], random.Random(2)), 0, len(row)) == owners(
            masks, n, len(row)
        )
    end = encode(tok, VALID)  # what lies past a row's length is not read
    cut = decision_masks([end], [len(end) - 1], tok.tokenizer)
    assert owners(cut, 0, len(end) - 1) == ["action"] * (len(end) - 1)
    assert all(
        mask.shape == (0, 5)
        for mask in decision_masks(torch.zeros(0, 5).long(), torch.zeros(0).long(), tok.tokenizer)
    )


@pytest.mark.parametrize(
    "ids, lengths",
    [
        ([1, 2], [2]),
        ([[1, 2]], [3]),
        ([[1, 2]], [1, 1]),
        ([[1, 2]], 2),
        ([[[1]]], [1]),
        ([[1]], [[1]]),
    ],
)
def test_bad_shapes_are_refused(ids, lengths):
    with pytest.raises(ValueError, match=r"\[N, L\]"):
        decision_masks(torch.tensor(ids), torch.tensor(lengths), bytes_tokenizer())


def test_token_bytes_join_to_the_decoded_text(tok):
    table, rng = token_bytes(tok.tokenizer), random.Random(4)
    assert len(table) == len(tok.tokenizer) and dict(enumerate(table)) == tok.pieces
    assert token_bytes(tok.tokenizer) is table  # made once
    for _ in range(100):
        row = any_split(tok, soup(rng).encode(), rng) + rng.choices(
            list(tok.tokenizer.added_tokens_decoder), k=2
        )
        assert response_text(row, tok.tokenizer) == tok.tokenizer.decode(row)
        row = rng.choices(range(len(tok.tokenizer)), k=8)  # any bytes at all
        assert response_text(row, tok.tokenizer) == tok.tokenizer.decode(row)


def test_ids_beyond_the_tokenizer_stand_for_nothing(tok):
    row, size = (
        encode(tok, VALID),
        len(tok.tokenizer),
    )  # a model's vocabulary is padded: it can sample 151665 and up
    assert response_text([size, *row, size + 270], tok.tokenizer) == VALID
    got = owners(
        decision_masks([[size, *row, size + 270]], [len(row) + 2], tok.tokenizer), 0, len(row) + 2
    )
    assert (
        got[1:-1] == owners(decision_masks([row], [len(row)], tok.tokenizer), 0, len(row))
        and got[-1] is None
    )


def test_token_bytes_follow_an_added_token():
    tokenizer = bytes_tokenizer()
    assert len(token_bytes(tokenizer)) == 257
    tokenizer.add_tokens(["<action>"])
    assert token_bytes(tokenizer)[257] == b"<action>"


def test_token_bytes_of_other_kinds():
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0, "go": 1, "to": 5}, "<unk>")),
        unk_token="<unk>",
    )
    assert token_bytes(words)[2] == b"" and token_bytes(words)[0] == b"<unk>"  # ids 2-4 are a gap
    assert response_text([1, 5, 1], words) == " " + words.decode([1, 5, 1])
    core = Tokenizer(
        models.BPE(
            {"<0xC3>": 0, "<0xA9>": 1, "\u2581go": 2, "s": 3, "<0xa9>": 4}, [], byte_fallback=True
        )
    )
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    pieces = PreTrainedTokenizerFast(tokenizer_object=core)
    assert response_text([2, 3, 0, 1, 2], pieces) == pieces.decode([2, 3, 0, 1, 2]) == " gosé go"
    assert token_bytes(pieces)[4] == b"<0xa9>"


def test_qwen_is_the_published_one():
    tokenizer = qwen_tokenizer()
    pieces = [
        tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in ("<switch>", "<subgoal>", "<action>", "KEEP", "SWITCH")
    ]
    assert pieces == [
        [27, 17338, 29],
        [27, 1966, 33939, 29],
        [27, 1311, 29],
        [51801],
        [16844, 24994],
    ]
    assert len(tokenizer) == 151665 and token_bytes(tokenizer)[151645] == b"<|im_end|>"
    assert (
        response_text([151644, 27, 151657], tokenizer)
        == tokenizer.decode([151644, 27, 151657])
        == "<|im_start|><<tool_call>"
    )


# ---- losses against hand-written scalars ------------------------------------------------------------------------------


def test_token_advantages():
    masks = hiper.Masks(
        *torch.tensor([[[1, 0, 0, 0, 0]] * 3, [[0, 1, 1, 0, 0]] * 3, [[0, 0, 0, 1, 0]] * 3]).bool()
    )  # [3, 5] each
    masks.action[2], masks.switch[2], masks.subgoal[2] = (
        torch.tensor([1, 1, 1, 1, 0]).bool(),
        False,
        False,
    )  # unreadable
    adv, trained = hiper.token_advantages(
        masks,
        torch.tensor([True, False, True]),
        torch.tensor([1.0, 2.0, 3.0]),
        torch.tensor([10.0, 20.0, 30.0]),
        torch.tensor([-100.0, -200.0, -300.0]),
    )
    assert adv.tolist() == [[1, 10, 10, -100, 0], [2, 0, 0, -200, 0], [-300, -300, -300, -300, 0]]
    assert trained.tolist() == [
        [True] * 4 + [False],
        [True, False, False, True, False],
        [True] * 4 + [False],
    ]
    assert trained.dtype == torch.bool


@pytest.mark.parametrize(
    "ratio, adv, loss, clipped",
    [
        (1.0, 3.0, -3.0, False),
        (1.1, 2.0, -2.2, False),
        (0.9, -2.0, 1.8, False),  # inside
        (1.5, 2.0, -2.4, True),
        (0.5, -2.0, 1.6, True),  # further than wanted: no gradient
        (0.5, 2.0, -1.0, False),
        (1.5, -2.0, 3.0, False),
        (1.5, 0.0, 0.0, False),
    ],
)  # the wrong way: pulled back in full
def test_policy_loss(ratio, adv, loss, clipped):
    logp = torch.tensor([[math.log(ratio) - 1.5]], dtype=torch.float64, requires_grad=True)
    got, active = hiper.policy_loss(
        logp, torch.tensor([[-1.5]], dtype=torch.float64), torch.tensor([[adv]]), clip=0.2
    )
    got.sum().backward()
    assert (
        got.item() == pytest.approx(loss) and active.tolist() == [[clipped]] and got.shape == (1, 1)
    )
    assert logp.grad.item() == pytest.approx(0 if clipped else -ratio * adv)


def test_policy_loss_clip_is_the_argument():
    old, adv = torch.zeros(1), torch.ones(1)
    assert hiper.policy_loss(torch.tensor([1.0]), old, adv)[0].item() == pytest.approx(-1.2)
    assert hiper.policy_loss(torch.tensor([1.0]), old, adv, clip=0.5)[0].item() == pytest.approx(
        -1.5
    )
    assert hiper.policy_loss(torch.tensor([-1.0]), old, -adv, clip=0.5)[0].item() == pytest.approx(
        0.5
    )


def test_k3_estimates_kl_with_the_right_sign():
    pi, ref = (
        torch.tensor([0.7, 0.2, 0.09, 0.01]).double(),
        torch.tensor([0.25, 0.25, 0.3, 0.2]).double(),
    )
    kl, other_way = (pi * (pi / ref).log()).sum().item(), (ref * (ref / pi).log()).sum().item()
    k3 = hiper.kl_k3(pi.log(), ref.log())
    assert (k3 > 0).all() and (hiper.kl_k3(pi.log(), pi.log()) == 0).all()
    assert k3[0].item() == pytest.approx(0.25 / 0.7 - 1 - math.log(0.25 / 0.7))
    assert (pi * k3).sum().item() == pytest.approx(kl)  # the exact expectation under pi
    sampled = (
        k3[
            torch.multinomial(
                pi, 20000, replacement=True, generator=torch.Generator().manual_seed(0)
            )
        ]
        .mean()
        .item()
    )
    assert abs(sampled - kl) < 0.05 < abs(other_way - kl) / 2


@pytest.mark.parametrize(
    "value, old, target, clip, loss, grad",
    [
        (2.0, 1.0, 5.0, 0, 4.5, -3.0),
        (2.0, 1.0, 5.0, 0.5, 6.125, 0.0),  # moved too far: the clipped error is worse
        (1.2, 1.0, 5.0, 0.5, 7.22, -3.8),
        (2.0, 1.0, -1.0, 0.5, 4.5, 3.0),  # inside; too far the wrong way
        (0.0, 1.0, -5.0, 0.5, 15.125, 0.0),
        (0.0, 1.0, -5.0, 2.0, 12.5, 5.0),
    ],
)
def test_value_loss(value, old, target, clip, loss, grad):
    value = torch.tensor([value], requires_grad=True)
    got = hiper.value_loss(value, torch.tensor([old]), torch.tensor([target]), clip)
    got.sum().backward()
    assert got.tolist() == pytest.approx([loss]) and value.grad.item() == pytest.approx(
        grad, abs=1e-6
    )


def test_value_loss_clips_at_a_half_by_default():
    assert hiper.value_loss(
        torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor([5.0])
    ).item() == pytest.approx(6.125)


# ---- actor-critic -----------------------------------------------------------------------------------------------------

BYTES = bytes_tokenizer()


@pytest.fixture
def actor():
    torch.manual_seed(0)
    return scratch.tiny_model(BYTES, hidden=32, layers=1)


def policy_of(actor, critic="shared", temperature=1.0):
    policy = ActorCritic(actor, critic, temperature)
    torch.nn.init.normal_(policy.heads.weight, generator=torch.Generator().manual_seed(1))
    torch.nn.init.normal_(policy.heads.bias, generator=torch.Generator().manual_seed(2))
    return policy


def samples(n=5, seed=0, texts=None):
    """Ragged random samples on the byte tokenizer: valid answers, junk, an empty response."""
    rng = random.Random(seed)
    texts = texts or [VALID, "junk", said(), "", said("SWITCH", "é.", "x")][:n] + [
        soup(rng)[:60] for _ in range(n - 5)
    ]
    prompts = [[rng.randrange(257) for _ in range(rng.randrange(1, 30))] for _ in texts]
    return rollout.samples_of(
        prompts, [BYTES(text, add_special_tokens=False)["input_ids"] for text in texts], BYTES
    )


def forward(policy, batch, index=None, **kwargs):
    return policy(
        *batch.rows(list(range(len(batch.prompts))) if index is None else index, "cpu"), **kwargs
    )


@pytest.mark.parametrize("temperature", [1.0, 0.4])
@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_scores_match_a_full_forward_row_by_row(actor, critic, temperature):
    policy, batch = policy_of(actor, critic, temperature), samples()
    scores = forward(policy, batch)
    assert (
        scores.logp.shape == scores.entropy.shape == batch.masks.switch.shape
        and scores.logp.dtype == torch.float32
    )
    exact = scratch.tiny_model(BYTES, hidden=32, layers=1).double()  # the same weights in float64
    exact.load_state_dict(actor.state_dict())
    weight, bias = policy.heads.weight.double(), policy.heads.bias.double()
    for n, (prompt, answer) in enumerate(zip(batch.prompts, batch.responses)):
        out = exact(input_ids=torch.tensor([prompt + answer]), output_hidden_states=True)
        logp = (out.logits[0] / temperature).log_softmax(-1)  # [P + L, V]
        p, length = len(prompt), len(answer)
        want = [logp[p + j - 1, answer[j]].item() for j in range(length)]
        spread = [-(logp[p + j - 1].exp() * logp[p + j - 1]).sum().item() for j in range(length)]
        assert scores.logp[n, :length].tolist() == pytest.approx(want, abs=1e-5)
        assert scores.entropy[n, :length].tolist() == pytest.approx(spread, abs=1e-5)
        assert not scores.logp[n, length:].any() and not scores.entropy[n, length:].any()
        hidden = out.hidden_states[-1][0]  # [P + L, H] after the last norm
        ends = [j for j, kind in enumerate(owners(batch.masks, n, length)) if kind == "subgoal"]
        at = p + ends[-1] if ends else p - 1
        assert bool(ends) == ("</subgoal>" in response_text(answer, BYTES))
        assert scores.v_high[n].item() == pytest.approx(
            (hidden[p - 1] @ weight[0] + bias[0]).item(), abs=1e-5
        )
        assert scores.v_low[n].item() == pytest.approx(
            (hidden[at] @ weight[1] + bias[1]).item(), abs=1e-5
        )
        assert scores.v_switch[n].item() == pytest.approx(
            (hidden[p - 1] @ weight[2] + bias[2]).item(), abs=1e-5
        )
        alone = forward(policy, batch, [n])
        for whole, one in zip(scores, alone):
            one = one[0]
            assert torch.allclose(whole[n][: len(one)] if one.ndim else whole[n], one, atol=1e-5)


def test_parts_not_asked_for_are_none(actor):
    policy, batch = policy_of(actor), samples()
    whole, logp, values = (
        forward(policy, batch),
        forward(policy, batch, parts=("logp",)),
        forward(policy, batch, parts=("values",)),
    )
    assert logp[2:] == (None,) * 3 and values[:2] == (None,) * 2
    assert torch.equal(logp.logp, whole.logp) and torch.equal(values.v_low, whole.v_low)


def test_values_see_what_they_may_see(actor):
    policy = policy_of(actor)
    one, *others = [
        forward(policy, samples(texts=[text]))
        for text in (
            said(action="look"),
            said(action="fly"),
            said(subgoal="a pot"),
            said("SWITCH", "a pan"),
            VALID,
        )
    ]
    for other in others:
        assert torch.allclose(one.v_high, other.v_high, atol=1e-5) and torch.allclose(
            one.v_switch, other.v_switch, atol=1e-5
        )
    assert torch.allclose(one.v_low, others[0].v_low, atol=1e-5)  # nothing of the action
    assert not any(torch.allclose(one.v_low, other.v_low, atol=1e-3) for other in others[1:])
    second = samples(texts=[said()])
    second.prompts[0][-1] ^= 1
    assert not torch.allclose(one.v_high, forward(policy, second).v_high, atol=1e-3)


def test_heads_start_at_zero_and_a_separate_critic_is_a_copy(actor):
    policy = ActorCritic(actor, "separate")
    assert not any(forward(policy, samples(), parts=("values",))[k].any() for k in (2, 3, 4))
    copies = list(zip(policy.critic.parameters(), actor.base_model.parameters()))
    assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in copies)
    assert ActorCritic(actor).critic is None
    for word in ("", "none", "Shared", None):
        with pytest.raises(ValueError, match="shared or separate"):
            ActorCritic(actor, word)


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_value_loss_reaches_its_own_backbone(actor, critic):
    policy = policy_of(actor, critic)
    scores = forward(policy, samples(), parts=("values",))
    (scores.v_high + scores.v_low + scores.v_switch).pow(2).sum().backward()
    moved = lambda module: any(
        p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters()
    )
    assert moved(policy.heads) and moved(actor) == (critic == "shared")
    assert critic == "shared" or moved(policy.critic)
    policy.zero_grad(set_to_none=True)
    forward(policy, samples(), parts=("logp",)).logp.sum().backward()
    assert (
        moved(actor)
        and not moved(policy.heads)
        and (critic == "shared" or not moved(policy.critic))
    )


# ---- the last layer is computed where it is read -----------------------------------------------------------------------

SMALL = dict(
    vocab_size=257,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
KINDS_OF_LM = {
    "qwen2": 3,
    "qwen3": 3,
    "llama": 3,
    "mistral": 3,
    "gemma2": 3,
    "olmo2": 3,
    "phi3": 2,
    "cohere": 3,
    "qwen3_moe": 3,
    "mixtral": 3,
    "gpt2": 0,
}  # and how many modules of the last layer are left out where nobody reads


@pytest.mark.parametrize("kind", KINDS_OF_LM)
def test_reading_leaves_what_is_read_as_it_is(kind):
    torch.manual_seed(0)
    more = (
        dict(num_experts=4, num_local_experts=4, moe_intermediate_size=16, num_experts_per_tok=2)
        if "mo" in kind or "mix" in kind
        else {}
    )
    model = (
        AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL, **more))
        .eval()
        .base_model
    )
    ids, where = torch.randint(3, 257, (3, 9)), torch.rand(3, 9) < 0.3
    where[0], where[1, -1] = False, True
    weights = torch.randn(27, 32)

    def read(context, which=where):
        model.zero_grad()
        with context:
            hidden = model(input_ids=ids, use_cache=False).last_hidden_state[which]  # [M, H]
        (hidden * weights[: len(hidden)]).sum().backward()
        return hidden.detach(), [
            torch.zeros(()) if p.grad is None else p.grad.clone() for p in model.parameters()
        ]

    wrapped, before = (
        [],
        {name: vars(module).get("forward") for name, module in model.named_modules()},
    )
    with reading(model, where):
        wrapped = [
            name
            for name, module in model.named_modules()
            if vars(module).get("forward") is not before[name]
        ]
        assert len(wrapped) == KINDS_OF_LM[kind] and all(
            f".{SMALL['num_hidden_layers'] - 1}." in name for name in wrapped
        )
    last = torch.zeros_like(where)
    last[:, -1] = True
    for which, argument in ((where, where), (last, None)):
        (want, wanted), (got, had) = (
            read(nullcontext(), which),
            read(reading(model, argument), which),
        )
        assert torch.allclose(got, want, atol=1e-5) and all(
            torch.allclose(a, b, atol=1e-4) for a, b in zip(had, wanted)
        )
    with pytest.raises(ZeroDivisionError), reading(model, where):
        1 / 0
    assert before == {name: vars(module).get("forward") for name, module in model.named_modules()}


def test_reading_computes_no_more_than_that(actor):
    rows = []  # the critic, a copy, counts there too
    actor.base_model.layers[-1].mlp.gate_proj.register_forward_hook(
        lambda module, args, out: rows.append(args[0].shape[-2])
    )
    batch, policy = samples(), policy_of(actor, "separate")
    turns, tokens = len(batch.prompts), int(batch.lengths.sum())
    forward(policy, batch)
    assert len(rows) == 2 and tokens <= rows[0] <= tokens + turns and turns <= rows[1] <= 2 * turns
    forward(policy, batch, parts=("values",))
    assert rows[2:] == rows[1:2]  # the actor is not asked
    rows.clear()
    rollout.generate(actor, BYTES, [[1, 2, 3], [3], [4, 5]], temperature=1.0, max_response=1)
    assert rows == [3]


def test_what_recomputes_its_activations_is_left_alone(actor):
    actor.gradient_checkpointing_enable()
    with reading(actor.base_model):
        assert not any("forward" in vars(module) for module in actor.modules())


def test_a_forward_of_somebody_else_s_comes_back(actor):
    """Accelerate sets `forward` on modules that it moves between devices."""
    mlp = actor.base_model.layers[-1].mlp
    mlp.forward = theirs = lambda x: torch.zeros_like(x)
    with reading(actor.base_model):
        assert mlp.forward is not theirs
    assert mlp.forward is theirs


class CountingHead(torch.nn.Linear):
    def forward(self, x):
        self.most, self.calls = max(getattr(self, "most", 0), len(x)), getattr(self, "calls", 0) + 1
        return super().forward(x)


@pytest.mark.parametrize("chunk, rows", [(1, 1), (11, 1), (33, 3), (10**6, 13)])
def test_chunks_change_nothing_but_memory(chunk, rows):
    torch.manual_seed(0)
    head, hidden, targets = (
        CountingHead(8, 11),
        torch.randn(13, 8, requires_grad=True),
        torch.randint(11, (13,)),
    )
    weights = torch.randn(13)
    logp, entropy = hiper.token_logp(hidden, targets, head, 0.7, chunk)
    assert head.most == rows and not entropy.requires_grad
    calls = head.calls
    (logp * weights).sum().backward()
    assert head.calls == (calls if rows == 13 else 2 * calls)  # chunks are computed again, not kept
    exact = hidden.detach().double().requires_grad_()
    matrix, bias = head.weight.detach().double().requires_grad_(), head.bias.detach().double()
    want = ((exact @ matrix.T + bias) / 0.7).log_softmax(-1)  # [13, 11]
    (want[torch.arange(13), targets] * weights).sum().backward()
    for got, ref in [
        (logp, want[torch.arange(13), targets]),
        (entropy, -(want.exp() * want).sum(-1)),
        (hidden.grad, exact.grad),
        (head.weight.grad, matrix.grad),
    ]:
        assert torch.allclose(got.double(), ref, atol=1e-5)


def test_bf16_weights_give_float32_scores(actor):
    policy, batch = policy_of(actor).bfloat16(), samples()
    scores = forward(policy, batch)
    assert all(x.dtype == torch.float32 for x in scores)
    n = 0  # the logits are bf16, the softmax over them is not
    hidden = actor.base_model(input_ids=batch.rows([0, 1, 2, 3, 4], "cpu")[0]).last_hidden_state[n]
    p, answer = len(batch.prompts[n]), torch.tensor(batch.responses[n])
    want = (
        actor.lm_head(hidden[p - 1 : p - 1 + len(answer)])
        .double()
        .log_softmax(-1)
        .gather(-1, answer[:, None])
        .squeeze(-1)
    )
    assert torch.allclose(scores.logp[n, : len(answer)].double(), want, atol=1e-4)


def test_no_tokens_at_all(actor):
    logp, entropy = hiper.token_logp(
        torch.zeros(0, 32), torch.zeros(0).long(), actor.get_output_embeddings()
    )
    assert logp.shape == entropy.shape == (0,)
    assert forward(policy_of(actor), samples(texts=["", VALID]), [0]).logp.shape == (
        1,
        0,
    )  # a micro-batch of empty answers


# ---- rollout: old log-probs agree with generation ---------------------------------------------------------------------


def test_log_probs_of_generated_ids_agree_with_a_left_padded_forward(actor):
    policy, rng = policy_of(actor), random.Random(0)
    prompts = [[rng.randrange(257) for _ in range(n)] for n in (1, 5, 17, 40)]
    torch.manual_seed(3)
    answers = rollout.generate(actor, BYTES, prompts, temperature=1.0, max_response=24)
    assert max(map(len, answers)) == 24 and all(answers)
    got = rollout.score(policy, rollout.samples_of(prompts, answers, BYTES)).logp
    width, length = max(map(len, prompts)), max(map(len, answers))
    ids = torch.tensor(
        [[0] * (width - len(p)) + p + a + [0] * (length - len(a)) for p, a in zip(prompts, answers)]
    )
    mask = torch.tensor([[0] * (width - len(p)) + [1] * (len(p) + length) for p in prompts])
    with torch.no_grad():
        logp = actor(
            input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)
        ).logits.log_softmax(-1)
    for n, answer in enumerate(answers):
        want = (
            logp[n, width - 1 : width - 1 + len(answer)]
            .gather(-1, torch.tensor(answer)[:, None])
            .squeeze(-1)
        )
        assert torch.allclose(got[n, : len(answer)], want, atol=1e-4)


def test_greedy_generation_is_the_training_forward_s_argmax(actor):
    rng = random.Random(1)
    prompts = [[rng.randrange(257) for _ in range(n)] for n in (3, 11, 30)]
    for prompt, answer in zip(
        prompts, rollout.generate(actor, BYTES, prompts, temperature=0, max_response=12)
    ):
        with torch.no_grad():
            logits = actor(input_ids=torch.tensor([prompt + answer])).logits[
                0, len(prompt) - 1 : -1
            ]
        best = logits.max(-1).values - logits.gather(-1, torch.tensor(answer)[:, None]).squeeze(-1)
        assert best.max() < 1e-4  # up to ties


def test_generation_survives_ids_that_the_tokenizer_lacks(actor):
    actor.resize_token_embeddings(2000)  # almost every sampled id is beyond the tokenizer's 257
    torch.manual_seed(0)
    answers = rollout.generate(actor, BYTES, [[1, 2], [3]], temperature=1.0, max_response=12)
    assert max(map(max, answers)) >= 257
    assert rollout.samples_of([[1, 2], [3]], answers, BYTES).masks.action.any()


def test_score_does_not_depend_on_the_micro_batches(actor):
    policy, batch = policy_of(actor, temperature=0.7), samples(12)
    with torch.no_grad():
        whole = forward(policy, batch)
    for tokens in (1, 150, 400, 10**6):
        got = rollout.score(policy, batch, tokens=tokens)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, whole))
        assert not any(x.requires_grad for x in got)


def test_micro_batches_partition_within_the_budget():
    rng = random.Random(0)
    for _ in range(200):
        lengths, tokens = (
            [rng.randrange(1, 60) for _ in range(rng.randrange(40))],
            rng.randrange(1, 400),
        )
        cuts = rollout.micro_batches(lengths, tokens)
        assert sorted(n for cut in cuts for n in cut) == list(range(len(lengths)))
        for cut in cuts:
            assert cut and (len(cut) == 1 or len(cut) * max(lengths[n] for n in cut) <= tokens)
        for cut, after in zip(cuts, cuts[1:]):  # and no cut comes early
            assert (len(cut) + 1) * lengths[after[0]] > tokens
    assert rollout.micro_batches([], 10) == []
    assert rollout.micro_batches([5, 5], 10) == [[0, 1]]


# ---- prompts ----------------------------------------------------------------------------------------------------------

PAST = [("a dark {room}", "open door"), ("a bright room", "go in")]


@pytest.mark.parametrize("brief", [False, True])
def test_plan_execute_prompt(brief):
    show = lambda **kwargs: hiper.plan_execute_prompt(
        "heat {an} apple", "You see a 'fridge'", brief=brief, **kwargs
    )
    text = show(subgoal="find it", history=PAST, admissible=["go to fridge 1", "look"])
    order = [
        "heat {an} apple",
        "a dark {room}",
        "open door",
        "a bright room",
        "go in",
        "You see a 'fridge'",
    ]
    places = [text.index(piece) for piece in order]
    assert places == sorted(places) and all(text.count(piece) == 1 for piece in order)
    assert "'go to fridge 1', 'look'" in text and text.count("find it") == 1 and "None." not in text
    bare = show()
    assert "Admissible actions" not in bare and "Earlier" not in bare and "find it" not in bare
    assert ("Subgoal: None." if brief else "Subgoal you carry: None\n") in bare
    if brief:
        assert bare == "Task: heat {an} apple.\nYou see a 'fridge'\nSubgoal: None.\n"
    else:
        assert (
            all(tag in text for tag in TAGS)
            and "<think>" not in text
            and "\nSubgoal you carry: find it\n" in text
        )


def test_flat_prompt():
    text = hiper.flat_prompt("heat {an} apple", "You see a fridge", PAST, ["look", "wait"])
    assert (
        "Task: heat {an} apple\nEarlier: a dark {room}\nYou did: open door\nEarlier: a bright room\nYou did: go in\n"
        in text
    )
    assert "Observation: You see a fridge\nAdmissible actions: 'look', 'wait'\n" in text
    assert (
        "<think>" in text
        and "<action>" in text
        and "subgoal" not in text
        and "<switch>" not in text
    )


def test_response_and_keep_block_round_trip():
    for switch, subgoal, action in [
        (True, "find a pan.", "look"),
        (False, "苹果 é", "go to 'x'"),
        (True, "a < b", "1"),
    ]:
        assert parse(response(switch, subgoal, action)) == Decision(
            switch, subgoal, action, True, ""
        )
    assert hiper.keep_block("a pan") == "<switch>KEEP</switch><subgoal>a pan</subgoal>"
    assert hiper.keep_block("") == "<switch>KEEP</switch><subgoal>None</subgoal>"
    assert (
        response(False, "a pan", "look")
        == said()
        == hiper.keep_block("a pan") + "<action>look</action>"
    )
    assert parse(response(True, "", "look")).subgoal == "None"
