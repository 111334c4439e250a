"""The long forms of tests/test_reliability.py: `python -m pytest tests/long -s`.

docs/reliability.md has what they gave.
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from reliability_tools import (  # noqa: E402
    LOG,
    can_mount,
    fill_disks,
    flip_bits,
    kill_at_operations,
    make_tiny_run,
)
from support import checkpoint  # noqa: E402


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
