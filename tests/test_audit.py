"""benchmarks/audit.py with the tiny model: all holds, and what is wrong is found."""

import pytest
import torch

import hiper
from benchmarks import audit, audit_lab

FAST = ("gradient checkpointing", "eager attention", "one turn a micro-batch")


@pytest.fixture
def given(tiny_actor, tiny_tokenizer):
    """The arguments of `audit_lab.iterate`."""
    accelerator = audit.make_accelerator("no")
    policy, reference = audit_lab.make_models(tiny_actor, accelerator)
    with torch.no_grad():
        for parameter in reference.parameters():  # far enough that a wrong KL is seen
            parameter += 0.1 * torch.randn_like(parameter)
    return policy, reference, tiny_tokenizer, audit_lab.make_config("tiny"), accelerator


def failed(given):
    """Names of the numbers that do not hold; and how many there are."""
    table = audit.check_numbers(audit_lab.iterate(*given), *given)
    return {row[0] for row in table if not row[-1]}, len(table)


def test_every_number_is_what_the_oracle_computes(given):
    names, count = failed(given)
    assert not names
    assert count > 25


def test_the_turns_have_all_kinds(given):
    made = audit_lab.iterate(*given)
    decisions = [turn.decision for episode in made["episodes"] for turn in episode.turns]
    assert {(d.switch, d.valid) for d in decisions} == {(True, True), (False, True), (False, False)}


def test_other_ways_give_the_same(given, tiny_actor, monkeypatch):
    monkeypatch.setattr(audit, "WAYS", {name: audit.WAYS[name] for name in FAST})
    policy, reference, *rest = given
    rows = list(
        audit.compare_ways(audit_lab.iterate(*given), tiny_actor, (policy, reference), *rest)
    )
    assert [name for name, _, holds in rows if holds] == list(FAST)


@pytest.mark.parametrize(
    "function, wrong, found",
    [
        ("kl_k3", lambda new, ref: (new - ref).exp() - (new - ref) - 1, "kl_to_reference"),
        ("switch_gain", lambda q, p, high, keep: q * (high - keep), "A_switch"),
        ("value_loss", lambda value, old, target, clip: (value - target) ** 2, "value_loss"),
        (
            "subgoal_positions",
            lambda ids, lengths, tokenizer: lengths * 0,
            "V_high, V_low, V_switch",
        ),
    ],
)
def test_what_is_wrong_is_found(given, monkeypatch, function, wrong, found):
    monkeypatch.setattr(hiper, function, wrong)
    assert any(name.startswith(found) for name in failed(given)[0])
