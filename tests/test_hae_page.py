"""docs/hae.html computes what hae.py computes."""

import json
import re
from pathlib import Path

import pytest
import torch

from browser import dump_dom, run_node
from hae import gae, hae

PAGE = Path(__file__).parent.parent / "docs" / "hae.html"
NAMES = {
    "aLow": "adv_action",
    "aHigh": "adv_subgoal",
    "aSwitch": "adv_switch",
    "g": "ret_switch",
}


def arithmetic():
    [script] = re.findall(r'<script id="arithmetic">(.*?)</script>', PAGE.read_text(), re.DOTALL)
    return script


def in_javascript(inputs):
    code = f"{arithmetic()}\nconsole.log(JSON.stringify({json.dumps(inputs)}.map(hae)))"
    return json.loads(run_node(code))


def random_inputs(count):
    draw = torch.Generator().manual_seed(0)

    def floats(n):
        return torch.randn(n, generator=draw, dtype=torch.float64).tolist()

    inputs = []
    for n in range(count):
        turns = 1 + n % 12
        coefficients = torch.rand(3, generator=draw, dtype=torch.float64).tolist()
        inputs.append(
            {
                "r": floats(turns),
                "q": (torch.rand(turns, generator=draw) < 0.4).tolist(),
                **{name: floats(turns) for name in ("vHigh", "vLow", "vSwitch")},
                **dict(zip(("gamma", "lamLow", "lamHigh"), coefficients, strict=True)),
                **dict(zip(("endHigh", "endLow"), floats(2), strict=True)),
            }
        )
    return inputs


def in_python(given):
    def row(name):
        return torch.tensor([given[name]], dtype=torch.float64)

    switch = torch.tensor([given["q"]])
    mask = torch.ones_like(switch)
    ends = [torch.tensor([given[name]], dtype=torch.float64) for name in ("endHigh", "endLow")]
    result = hae(
        row("r"),
        switch,
        mask,
        row("vHigh"),
        row("vLow"),
        row("vSwitch"),
        gamma=given["gamma"],
        lam_low=given["lamLow"],
        lam_high=given["lamHigh"],
        end_high=ends[0],
        end_low=ends[1],
    )
    flat, _ = gae(
        row("r"), mask, row("vLow"), gamma=given["gamma"], lam=given["lamLow"], end_value=ends[1]
    )
    expected = {ours: getattr(result, theirs)[0].tolist() for ours, theirs in NAMES.items()}
    return {**expected, "flat": flat[0].tolist()}


def test_the_page_s_arithmetic_is_hae_s():
    inputs = random_inputs(60)
    for given, got in zip(inputs, in_javascript(inputs), strict=True):
        for name, expected in in_python(given).items():
            assert got[name] == pytest.approx(expected, abs=1e-6), name


def test_the_page_begins_with_the_worked_example():
    """The numbers of `python hae.py`, as docs/theory.md prints them."""
    got = json.loads(run_node(f"{arithmetic()}\nconsole.log(JSON.stringify(hae(EXAMPLE)))"))
    table = (PAGE.parent / "theory.md").read_text()
    rows = re.findall(r"^ +(\d) +\d +\S+ +\S+ +\S+ \| +(\S+) +(\S+) +(\S+) \| +(\S+)$", table, re.M)
    assert len(rows) == 10
    for turn, *printed in rows:
        for name, text in zip(("aLow", "aHigh", "aSwitch", "flat"), printed, strict=True):
            expected = 0.0 if text == "." else float(text)
            assert got[name][int(turn)] == pytest.approx(expected, abs=0.0051)


def test_the_page_draws_itself(tmp_path):
    dom = dump_dom(PAGE.as_uri(), tmp_path)
    assert dom.count('class="cell') >= 90
    assert "A_action_6 = δ_6 = −0.10" in dom
    assert "flat GAE: −0.10 + 1.00 · 0.50 − 0.30 + 1.00 · 1.00 · 0.30 = 0.40" in dom
