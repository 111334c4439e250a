"""support/protocol.py and support/tokens.py: prompts, parser, decision masks, token table.

The oracles are slow and obvious (tests/sample_texts.py). With QWEN_TOKENIZER set to a folder with
Qwen2.5's vocab.json, merges.txt and tokenizer_config.json, its tokenizer is tested too.
"""

import random
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

import hiper
from hiper import Decision, decision_masks, format_plan, format_response, parse, subgoal_positions
from sample_texts import (
    KINDS,
    TAGS,
    VALID,
    block,
    bytes_tokenizer,
    encode,
    glued_tokenizer,
    merging_tokenizer,
    oracle_blocks,
    oracle_parse,
    qwen_tokenizer,
    said,
    scratch_tokenizer,
    soup,
)
from support.batch import append_keep_block, make_samples
from support.protocol import format_flat_response, switch_words
from support.tokens import response_text, token_bytes


def oracle_pieces(tokenizer):
    """{id: bytes} of a byte-level tokenizer by transformers' own table."""
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
    pieces = {}
    for token, i in tokenizer.get_vocab().items():
        pieces[i] = added[i].encode() if i in added else bytes(byte_of[c] for c in token)
    return pieces


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
    """Row n of Masks -> list of kind or None; checks that a token has at most one owner."""
    columns = torch.stack([mask[n] for mask in masks]).long()  # [3, L]
    assert int(columns.sum(0).max()) <= 1
    assert not columns[:, length:].any()  # padding has none
    return [
        next((kind for kind, on in zip(KINDS, column, strict=True) if on), None)
        for column in columns.T[:length].tolist()
    ]


# ---- parse -------------------------------------------------------------------------------------


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
    assert error in decision.error
    assert bool(decision.error) == bool(error)
    assert decision[:4] == oracle_parse(text.encode("utf-8", "replace").decode())


def test_parse_is_invalid_until_the_text_is_complete():
    for n in range(len(VALID)):
        decision = parse(VALID[:n])
        assert not decision.valid
        assert decision.error
        assert decision.action == ""
    assert parse(VALID).valid
    assert parse(VALID + "\n<").valid


def test_parse_random_soup():
    rng = random.Random(0)
    valid = 0
    for _ in range(4000):
        text = soup(rng)
        decision = parse(text)
        assert decision[:4] == oracle_parse(text), text
        assert decision.valid == (decision.error == "")
        if decision.valid:
            assert text.strip() != ""
            assert decision.subgoal
            assert decision.action
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
def test_parse_a_megabyte(text, valid):
    """In 0.1 s. A pattern that is quadratic in the text would take hours here."""
    decision = parse(text)
    assert decision.valid == valid
    assert len(decision.error) < 100  # "a few words", whatever the text


# ---- decision masks ----------------------------------------------------------------------------

MAKERS = {
    "scratch": scratch_tokenizer,
    "merging": merging_tokenizer,
    "glued": glued_tokenizer,
    "bytes": bytes_tokenizer,
    "qwen": qwen_tokenizer,
}


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
        added=list(tokenizer.added_tokens_decoder),
        encode=lambda text: encode(tokenizer, text),
    )


def any_split(tok, raw, rng, longest=24):
    """Bytes -> ids that stand for them, split anywhere the vocabulary allows.

    No tokenizer would write most of them.
    """
    ids = []
    start = 0
    while start < len(raw):
        ends = range(start + 1, min(start + longest, len(raw)) + 1)
        end = rng.choice([n for n in ends if raw[start:n] in tok.id_of])
        ids.append(tok.id_of[raw[start:end]])
        start = end
    return ids


def padded(rows, rng):
    """Rows of ids -> (ids, lengths), padded with arbitrary ids, two columns wider than need be."""
    width = max(map(len, rows)) + 2
    ids = [row + [rng.choice((0, 7, 10**9, -1)) for _ in range(width - len(row))] for row in rows]
    return torch.tensor(ids), torch.tensor([len(row) for row in rows])


def masks_of(tok, rows, rng):
    return decision_masks(*padded(rows, rng), tok.tokenizer)


def byte_starts(pieces):
    """The byte at which each token begins."""
    return [len(b"".join(pieces[:j])) for j in range(len(pieces))]


def check_by_bytes(tok, rows, rng):
    """Masks of id rows against the oracle on bytes; and with what `parse` reads."""
    masks = masks_of(tok, rows, rng)
    for n, row in enumerate(rows):
        pieces = [tok.pieces[i] for i in row]
        raw = b"".join(pieces)
        # one character a byte; bytes from 128 on are not space
        spread = "".join(chr(b) if b < 128 else "\u0100" for b in raw)
        want = ["action"] * len(row)
        if parse(raw.decode("utf-8", "replace")).action:
            want = oracle_owner(spread, byte_starts(pieces))
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
        assert any(tok.pieces[i] == b"><" for i in tok.encode(VALID))
        assert any(tok.pieces[i] == b".</" for i in tok.encode(VALID))
    if tok.name == "bytes":
        assert len(tok.encode("苹é")) == 5


def test_masks_match_prefix_decoding(tok):
    rng = random.Random(1)
    rows = []
    for _ in range(150 if tok.name != "qwen" else 250):
        text = soup(rng)
        rows.append(rng.choice((tok.encode(text), any_split(tok, text.encode(), rng))))
    masks = masks_of(tok, rows, rng)
    for n, row in enumerate(rows):
        text = tok.tokenizer.decode(row)
        starts = [len(tok.tokenizer.decode(row[:j]).rstrip("\ufffd")) for j in range(len(row))]
        assert owners(masks, n, len(row)) == oracle_owner(text, starts), text


def any_rows(tok, rng):
    """Rows that stand for soup cut anywhere, with stray bytes and end tokens; and random ids."""
    strays = [*tok.added[:3], tok.id_of[b"\xff"], tok.id_of[b"\x85"]]
    rows = []
    for _ in range(400):
        raw = soup(rng).encode()
        if rng.random() < 0.2:  # it may end amid a character
            raw = raw[: rng.randrange(len(raw) + 1)]
        row = any_split(tok, raw, rng)
        if rng.random() < 0.3:
            row.insert(rng.randrange(len(row) + 1), rng.choice(strays))
        rows.append(row)
    return rows + [rng.choices(list(tok.pieces), k=rng.randrange(40)) for _ in range(50)]


def test_masks_match_bytes_on_any_split(tok):
    rng = random.Random(2)
    check_by_bytes(tok, any_rows(tok, rng), rng)


def test_masks_of_a_plain_answer_cover_it(tok):
    rng = random.Random(3)
    for switch, subgoal, action in [
        (True, "find a pan.", "go to drawer 1"),
        (False, "苹果)", "look"),
        (True, "👩‍🍳 é", "take 👩‍🍳"),
    ]:
        text = format_response(switch, subgoal, action)
        bodies = {
            "switch": "SWITCH" if switch else "KEEP",
            "subgoal": subgoal,
            "action": action,
        }
        for row in (tok.encode(text), any_split(tok, text.encode(), rng)):
            got = owners(masks_of(tok, [row], rng), 0, len(row))
            assert None not in got
            assert got == sorted(got, key=KINDS.index)  # one run each, in order
            for kind, body in bodies.items():  # and each run is its block, but for a merged edge
                mine = [tok.pieces[i] for i, k in zip(row, got, strict=True) if k == kind]
                assert body in b"".join(mine).decode() or tok.name == "glued"


def test_masks_leave_out_what_is_around(tok):
    head = tok.encode("Well. ")
    gap = tok.encode("\n\n")
    tail = tok.encode(" so") + tok.added[:1]
    bodies = zip(KINDS, ("KEEP", "a pan", "look"), strict=True)
    switch, subgoal, action = [tok.encode(block(kind, body)) for kind, body in bodies]
    parts = [
        (head, None),
        (switch, "switch"),
        (gap, None),
        (subgoal, "subgoal"),
        (gap, None),
        (action, "action"),
        (tail, None),
        (action, None),  # the second action block is nobody's
    ]
    row = [i for ids, _ in parts for i in ids]
    want = [kind for ids, kind in parts for _ in ids]
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
    row = tok.encode(text) + tok.added[:1]
    assert owners(masks_of(tok, [row], random.Random(0)), 0, len(row)) == ["action"] * len(row)
    assert not parse(response_text(row, tok.tokenizer)).valid


def test_padding_and_empty_rows_change_nothing(tok):
    rows = [tok.encode(VALID), [], tok.encode("junk"), tok.encode(said())]
    masks = masks_of(tok, rows, random.Random(0))
    other = masks_of(tok, rows, random.Random(1))
    for a, b in zip(masks, other, strict=True):
        assert torch.equal(a, b)
        assert a.dtype == torch.bool
        assert a.shape == (4, len(max(rows, key=len)) + 2)
    assert not any(mask[1].any() for mask in masks)
    for n, row in enumerate(rows):  # alone as in the batch
        alone = masks_of(tok, [row], random.Random(2))
        assert owners(alone, 0, len(row)) == owners(masks, n, len(row))
    end = tok.encode(VALID)  # what lies past a row's length is not read
    cut = decision_masks([end], [len(end) - 1], tok.tokenizer)
    assert owners(cut, 0, len(end) - 1) == ["action"] * (len(end) - 1)
    none = decision_masks(torch.zeros(0, 5).long(), torch.zeros(0).long(), tok.tokenizer)
    assert all(mask.shape == (0, 5) for mask in none)


@pytest.mark.parametrize("read", [decision_masks, subgoal_positions, switch_words])
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
def test_bad_shapes_are_refused(ids, lengths, read):
    with pytest.raises(ValueError, match=r"\[N, L\]"):
        read(torch.tensor(ids), torch.tensor(lengths), bytes_tokenizer())


# ---- where V_low is read -----------------------------------------------------------------------

SUBGOALS = ("find a pan", "find a pan.", "go to drawer 1)", "苹果 é", "a < b", "x>", "a\n", "")
SEPARATORS = ("", "\n", "\n\n", " ", "\r\n", "text")


def test_subgoal_positions_match_bytes_on_any_split(tok):
    """The last token that begins before the final `>` of the first well-formed subgoal block."""
    rng = random.Random(6)
    rows = [[], *any_rows(tok, rng)]
    got = subgoal_positions(*padded(rows, rng), tok.tokenizer)
    assert got.shape == (len(rows),)
    found = 0
    for n, row in enumerate(rows):
        pieces = [tok.pieces[i] for i in row]
        spread = "".join(map(chr, b"".join(pieces)))
        want = -1
        if "subgoal" in oracle_blocks(spread):
            bracket = oracle_blocks(spread)["subgoal"][3] - 1
            assert spread[bracket] == ">"
            want = max(j for j, start in enumerate(byte_starts(pieces)) if start < bracket)
            found += 1
        assert got[n] == want, spread
    assert 200 < found < 450


def test_switch_words_match_bytes_on_any_split(tok):
    """The tokens with a byte between the tags of the first well-formed switch block, if it holds
    KEEP or SWITCH."""
    rng = random.Random(8)
    rows = [[], *any_rows(tok, rng)]
    got = switch_words(*padded(rows, rng), tok.tokenizer)
    found = 0
    for n, row in enumerate(rows):
        pieces = [tok.pieces[i] for i in row]
        spread = "".join(map(chr, b"".join(pieces)))
        _, first, past, _ = oracle_blocks(spread).get("switch", (0, 0, 0, 0))
        word = spread[first:past].encode("latin-1").decode("utf-8", "replace").strip()
        if word not in ("KEEP", "SWITCH"):
            first = past = 0
        starts = byte_starts(pieces)
        ends = [start + len(piece) for start, piece in zip(starts, pieces, strict=True)]
        want = [first < end and s < past for s, end in zip(starts, ends, strict=True)]
        assert got[n].tolist() == want + [False] * (got.shape[1] - len(row)), spread
        found += any(want)
    assert found > 200


@pytest.mark.parametrize("separator", ("", "\n"))
def test_a_switch_word_is_the_word_alone(separator):
    """Whatever BPE makes of the tags around it."""
    tokenizer = merging_tokenizer()
    for switch, word in ((True, b"SWITCH"), (False, b"KEEP")):
        text = format_plan("find a pan", switch).replace("><", f">{separator}<")
        ids = tokenizer(text)["input_ids"]
        [mask] = switch_words(torch.tensor([ids]), torch.tensor([len(ids)]), tokenizer)
        table = token_bytes(tokenizer)
        written = b"".join(table[i] for i, here in zip(ids, mask, strict=True) if here)
        assert written.strip(b"></") == word


@pytest.mark.parametrize("separator", SEPARATORS)
def test_a_response_and_a_kept_block_are_read_at_the_same_place(tok, separator):
    """The ids up to the place where V_low is read are the same, whatever BPE does behind it."""
    for subgoal in SUBGOALS:
        response = tok.encode(f"{format_plan(subgoal, False)}{separator}<action>look</action>")
        kept = append_keep_block([[1]], [subgoal], tok.tokenizer)
        sampled = make_samples([[1]], [response], tok.tokenizer)
        there, here = int(sampled.subgoal_pos), int(kept.subgoal_pos)
        if tok.name == "glued":  # </subgoal> may be in one token with what follows
            assert there >= 0
            continue
        assert there == here >= 0
        assert response[: there + 1] == kept.responses[0][: here + 1]
        if tok.name == "scratch":  # the tag itself
            assert tok.pieces[response[there]] == b"</subgoal>"
        else:  # all but the tag's last character
            read = b"".join(tok.pieces[i] for i in response[: there + 1])
            assert read.decode() == format_plan(subgoal, False)[:-1]


def test_qwen_merges_the_last_character_of_the_subgoal_block():
    """Why V_low is not read at that character: in a kept block it is another token."""
    tokenizer = qwen_tokenizer()
    for separator, merged in (("", b"><"), ("\n", b">\n")):
        response = encode(tokenizer, f"{format_plan('a pan', False)}{separator}<action>")
        kept = append_keep_block([[1]], ["a pan"], tokenizer)
        place = int(kept.subgoal_pos) + 1
        assert token_bytes(tokenizer)[response[place]] == merged
        assert token_bytes(tokenizer)[kept.responses[0][place]] == b">"


@pytest.mark.parametrize("separator", ["", "\n"])
@pytest.mark.parametrize("name", ["qwen", "scratch"])
def test_v_low_of_a_response_equals_that_of_its_kept_block(name, separator):
    tokenizer = MAKERS[name]()
    torch.manual_seed(0)
    actor = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            initializer_range=0.3,
            tie_word_embeddings=True,
        )
    ).eval()
    policy = hiper.ActorCritic(actor)
    torch.nn.init.normal_(policy.value_heads.weight, std=0.05)
    prompts = [[5, 6, 7], [8], [9, 10]]
    subgoals = ["find a pan.", "go to drawer 1", "heat it)"]
    texts = [f"{format_plan(o, False)}{separator}<action>look</action>" for o in subgoals]
    values = []
    for samples in (
        make_samples(prompts, encode(tokenizer, texts), tokenizer),
        append_keep_block(prompts, subgoals, tokenizer),
    ):
        with torch.no_grad():
            output = policy(*samples.model_inputs([0, 1, 2], "cpu"), logprobs=False)
        values.append(output.v_low)
    assert torch.allclose(*values, atol=1e-6, rtol=0)
    assert values[0].unique().numel() == 3
    assert values[0].abs().min() > 1e-3


@pytest.mark.parametrize(
    "text",
    [
        "",
        "junk",
        "<subgoal>a pan",
        "a pan</subgoal>",
        "<subgoal>a<action>b</subgoal>",
        block("switch", "KEEP") + block("action", "look"),
    ],
)
def test_without_a_subgoal_block_the_place_is_before_the_response(tok, text):
    row = tok.encode(text)
    rows = [row, tok.encode(VALID)]
    assert subgoal_positions(*padded(rows, random.Random(0)), tok.tokenizer)[0] == -1


def test_an_unreadable_action_leaves_the_place(tok):
    """The masks call the whole response action; the subgoal was written all the same."""
    row = tok.encode(format_plan("a pan", True))
    whole = tok.encode(format_plan("a pan", True) + "<action> </action>")
    for ids in (row, whole):
        place = int(subgoal_positions([ids], [len(ids)], tok.tokenizer))
        assert 0 <= place < len(row)
    assert int(subgoal_positions([row], [len(row) - 1], tok.tokenizer)) == -1  # not yet closed


# ---- token table -------------------------------------------------------------------------------


def test_token_bytes_join_to_the_decoded_text(tok):
    table = token_bytes(tok.tokenizer)
    rng = random.Random(4)
    assert table.size == len(tok.tokenizer) == len(table.pieces) - 1
    assert dict(enumerate(table.pieces[:-1])) == tok.pieces
    assert table.pieces[-1] == b""
    assert table.lengths.tolist() == [len(piece) for piece in table.pieces]
    assert token_bytes(tok.tokenizer) is table  # made once
    for _ in range(100):
        row = any_split(tok, soup(rng).encode(), rng) + rng.choices(tok.added, k=2)
        assert response_text(row, tok.tokenizer) == tok.tokenizer.decode(row)
        row = rng.choices(range(len(tok.tokenizer)), k=8)  # any bytes at all
        assert response_text(row, tok.tokenizer) == tok.tokenizer.decode(row)
        assert table.join(row) == b"".join(tok.pieces[i] for i in row)


def test_ids_beyond_the_tokenizer_stand_for_nothing(tok):
    """A model's vocabulary is padded: Qwen2.5 can sample 151665 and up."""
    row = tok.encode(VALID)
    size = len(tok.tokenizer)
    strange = [size, *row, size + 270]
    assert response_text(strange, tok.tokenizer) == VALID
    got = owners(decision_masks([strange], [len(strange)], tok.tokenizer), 0, len(strange))
    want = owners(decision_masks([row], [len(row)], tok.tokenizer), 0, len(row))
    assert got[1:-1] == want
    assert got[-1] is None
    place = int(subgoal_positions([strange], [len(strange)], tok.tokenizer))
    assert place == int(subgoal_positions([row], [len(row)], tok.tokenizer)) + 1


@pytest.mark.parametrize("text", ["", "junk"])
def test_a_last_id_beyond_the_tokenizer_is_trained_where_all_is_action(tok, text):
    row = [*tok.encode(text), len(tok.tokenizer) + 3]
    masks = decision_masks([row], [len(row)], tok.tokenizer)
    assert owners(masks, 0, len(row)) == ["action"] * len(row)


def test_token_bytes_follow_an_added_token():
    tokenizer = Qwen2Tokenizer(bytes_tokenizer().get_vocab(), [])  # one of its own, to change
    assert token_bytes(tokenizer).size == 257
    tokenizer.add_tokens(["<action>"])
    assert token_bytes(tokenizer).size == 258
    assert token_bytes(tokenizer)[257] == b"<action>"


def test_token_bytes_of_other_kinds():
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0, "go": 1, "to": 5}, "<unk>")),
        unk_token="<unk>",
    )
    assert token_bytes(words)[2] == b""  # ids 2-4 are a gap
    assert token_bytes(words)[0] == b"<unk>"
    assert response_text([1, 5, 1], words) == " " + words.decode([1, 5, 1])
    vocabulary = {"<0xC3>": 0, "<0xA9>": 1, "\u2581go": 2, "s": 3, "<0xa9>": 4}
    core = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    pieces = PreTrainedTokenizerFast(tokenizer_object=core)
    assert response_text([2, 3, 0, 1, 2], pieces) == pieces.decode([2, 3, 0, 1, 2]) == " gosé go"
    assert token_bytes(pieces)[4] == b"<0xa9>"


def test_qwen_is_the_published_one():
    tokenizer = qwen_tokenizer()
    pieces = encode(tokenizer, ["<switch>", "<subgoal>", "<action>", "KEEP", "SWITCH"])
    assert pieces == [
        [27, 17338, 29],
        [27, 1966, 33939, 29],
        [27, 1311, 29],
        [51801],
        [16844, 24994],
    ]
    assert len(tokenizer) == 151665
    assert token_bytes(tokenizer)[151645] == b"<|im_end|>"
    ids = [151644, 27, 151657]
    assert response_text(ids, tokenizer) == tokenizer.decode(ids) == "<|im_start|><<tool_call>"


# ---- prompts -----------------------------------------------------------------------------------

PAST = [("a dark {room}", "open door"), ("a bright room", "go in")]


@pytest.mark.parametrize("short", [False, True])
def test_plan_execute_prompt(short):
    def show(**kwargs):
        return hiper.plan_execute_prompt(
            "heat {an} apple", "You see a 'fridge'", short=short, **kwargs
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
    assert places == sorted(places)
    assert all(text.count(piece) == 1 for piece in order)
    assert "'go to fridge 1', 'look'" in text
    assert text.count("find it") == 1
    assert "None." not in text
    bare = show()
    assert "Admissible actions" not in bare
    assert "Earlier" not in bare
    assert "find it" not in bare
    if short:
        assert "Subgoal: None." in bare
        assert bare == "Task: heat {an} apple.\nYou see a 'fridge'\nSubgoal: None.\n"
    else:
        assert "Subgoal you carry: None\n" in bare
        assert all(tag in text for tag in TAGS)
        assert "<think>" not in text
        assert "\nSubgoal you carry: find it\n" in text


def test_flat_prompt():
    text = hiper.flat_prompt("heat {an} apple", "You see a fridge", PAST, ["look", "wait"])
    assert (
        "Task: heat {an} apple\nEarlier: a dark {room}\nYou did: open door\n"
        "Earlier: a bright room\nYou did: go in\n"
    ) in text
    assert "Observation: You see a fridge\nAdmissible actions: 'look', 'wait'\n" in text
    assert "<think>" in text
    assert "<action>" in text
    assert "subgoal" not in text
    assert "<switch>" not in text


def test_what_is_formatted_is_read_back():
    for switch, subgoal, action in [
        (True, "find a pan.", "look"),
        (False, "苹果 é", "go to 'x'"),
        (True, "a < b", "1"),
    ]:
        text = format_response(switch, subgoal, action)
        assert parse(text) == Decision(switch, subgoal, action, True, "")
    assert format_plan("a pan", switch=False) == ("<switch>KEEP</switch><subgoal>a pan</subgoal>")
    assert format_plan("a pan", switch=True) == ("<switch>SWITCH</switch><subgoal>a pan</subgoal>")
    assert format_plan("", switch=False) == "<switch>KEEP</switch><subgoal>None</subgoal>"
    want = format_plan("a pan", switch=False) + "<action>look</action>"
    assert format_response(False, "a pan", "look") == said() == want
    assert parse(format_response(True, "", "look")).subgoal == "None"
    flat = hiper.parse_flat(format_flat_response("so", "look"))
    assert flat == Decision(False, "", "look", True, "")
