"""The long forms of tests/test_reliability.py: `python -m pytest tests/long -s`.

docs/reliability.md has what they gave. Longer still: tests/random_play.py and tests/soak.py.
"""

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from hiper import parse  # noqa: E402
from reliability_tools import (  # noqa: E402
    LOG,
    can_mount,
    fill_disks,
    flip_bits,
    kill_at_operations,
    make_tiny_run,
)
from sample_texts import oracle_parse, soup  # noqa: E402
from support import checkpoint  # noqa: E402
from support.tokens import response_text, token_bytes  # noqa: E402
from test_masks import answers, owners, painted  # noqa: E402


@pytest.fixture
def saved(tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "plot_curves", lambda *_: None)
    run = make_tiny_run(tiny_tokenizer)
    out = tmp_path / "run"
    out.mkdir()
    for iteration in (1, 2):
        checkpoint.save_checkpoint(out, run, iteration, LOG)
    yield run, out
    run.accelerator.free_memory()


def test_600_flipped_bits(saved):
    _, out = saved
    unnoticed = flip_bits(out, 600)
    print(f"\n600 flipped bits: {len(unnoticed)} unnoticed")
    assert not unnoticed


def test_killed_at_every_file_operation(saved):
    run, out = saved
    iterations, whole = kill_at_operations(out, run, range(1, 150))
    print(f"\nkilled at operations 1 to 149: found {dict(iterations)}, {whole} came to their end")
    assert whole, "there are more operations than were tried"
    assert set(iterations) <= {2, 3}


def test_40_sizes_of_disks(saved, tmp_path):
    if not can_mount(tmp_path):
        pytest.skip("may not mount a disk")
    run, _ = saved
    results = fill_disks(tmp_path, run, range(100, 8100, 200))
    print(f"\n{len(results)} disks: {results}")
    assert len(results) == 40
    assert set(results.values()) >= {0, 3}


def test_100_000_texts(tiny_tokenizer):
    """60,000 through the parser, beside an oracle that lists the tags; 40,000 as ids, split in
    many ways, through parser and masks, beside one that paints bytes."""
    rng = random.Random(0)
    valid = 0
    for _ in range(60_000):
        text = soup(rng)
        decision = parse(text)
        assert (decision.switch, decision.subgoal, decision.action, decision.valid) == oracle_parse(
            text
        ), text
        valid += decision.valid
    table = token_bytes(tiny_tokenizer)
    masked = 0
    for seed in range(4000):
        _, rows = answers(seed, tiny_tokenizer, 10)
        for row, owner in zip(rows, owners(rows, tiny_tokenizer), strict=True):
            assert owner == painted([table[i] for i in row]), (seed, row)
            decision = parse(response_text(row, tiny_tokenizer))
            assert not decision.valid or set(owner) >= {"switch", "subgoal", "action"}
            masked += 1
    print(f"\n60000 texts, {valid} of them valid, {masked} rows of ids: no disagreement")
