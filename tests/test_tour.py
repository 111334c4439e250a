"""docs/tour.ipynb is valid, runs from top to bottom, and prints what stands in it."""

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "docs"))
import run_tour  # noqa: E402

TOUR = json.loads((ROOT / "docs" / "tour.ipynb").read_text())
CELLS = TOUR["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
TEXT = "\n\n".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown")


def printed_in(cell):
    """The text and the number of pictures that the notebook holds for a cell."""
    streams = [output for output in cell["outputs"] if output["output_type"] == "stream"]
    text = "".join(line for output in streams for line in output["text"])
    return text, len(cell["outputs"]) - len(streams)


def test_the_notebook_runs_and_prints_what_it_says(tmp_path, monkeypatch):
    """All cells in order. Those that play or train the agent may print other numbers."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    ran = 0
    for cell, text, figures in run_tour.run_cells(TOUR):
        expected, pictures = printed_in(cell)
        assert len(figures) == pictures, cell["id"]
        if "varies" in cell["metadata"].get("tags", ()):
            assert bool(text) == bool(expected), cell["id"]
        else:
            assert text == expected, cell["id"]
        ran += 1
    assert ran == len(CODE)
    assert (tmp_path / "tour" / "episodes.html").stat().st_size > 100_000


def test_every_output_is_there_and_small():
    """Outputs are committed, without a time, a path of a machine, or a large picture."""
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    for cell in CODE:
        text, pictures = printed_in(cell)
        assert not re.search(r"/(tmp|home|root|usr)/|seconds|Traceback|Warning", text), cell["id"]
        assert text or pictures or "print(" not in "".join(cell["source"]), cell["id"]
    assert (ROOT / "docs" / "tour.ipynb").stat().st_size < 250_000


def test_a_cell_that_fails_is_not_passed_over():
    cells = [{"cell_type": "code", "id": "wrong", "metadata": {}, "source": ["assert 1 == 2"]}]
    with pytest.raises(AssertionError):
        list(run_tour.run_cells({"cells": cells}))


def test_each_section_asks_a_question_and_folds_its_answer():
    sections = re.split(r"^## (?=\d)", TEXT, flags=re.MULTILINE)[1:]
    assert len(sections) == 8
    for n, section in enumerate(sections, 1):
        assert section.startswith(f"{n}. ")
        assert f"**Question {n}.**" in section
        assert section.count("<details><summary>Answer</summary>\n\n") == 1
        assert section.count("</details>") == 1


def test_every_link_and_figure_is_there():
    for name in re.findall(r"\]\(([^)#:]+)\)", TEXT):
        assert (ROOT / "docs" / name).exists(), name
    named = re.findall(r'subplots\(num="(\w+)"\)', json.dumps(CODE).replace('\\"', '"'))
    assert {f"{name}.svg" for name in named} == {path.name for path in run_tour.FIGURES.iterdir()}


def test_it_is_a_notebook_of_format_4():
    assert (TOUR["nbformat"], TOUR["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in CELLS]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch("[a-zA-Z0-9_-]{1,64}", name) for name in ids)
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    nbformat.validate(nbformat.from_dict(TOUR))
