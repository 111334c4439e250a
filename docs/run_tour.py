"""Run the code cells of docs/tour.ipynb from top to bottom and write their outputs into it.

    python docs/run_tour.py            80 seconds of one CPU core; Jupyter is not needed

Figures are also written to docs/figures/NAME.svg, for slides; the agent's episodes to docs/tour/.
Cells with the tag "varies" play or train the agent, so their outputs differ between machines. What
the other cells print is always the same (tests/test_tour.py).
"""

import base64
import contextlib
import io
import json
import os
import shutil
import sys
from pathlib import Path

import matplotlib
from matplotlib import pyplot

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "docs" / "tour.ipynb"
FIGURES = ROOT / "docs" / "figures"


def run_cells(notebook):
    """Yield (code cell, what it printed, its figures) of each code cell, in order."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    names = {"__name__": "tour"}
    with matplotlib.rc_context():
        pyplot.switch_backend("agg")
        for cell in notebook["cells"]:
            if cell["cell_type"] != "code":
                continue
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
            yield cell, printed.getvalue(), [pyplot.figure(n) for n in pyplot.get_fignums()]
            pyplot.close("all")


def to_outputs(printed, figures):
    """Outputs of a cell in the notebook's format (nbformat 4)."""
    outputs = []
    if printed:
        text = printed.splitlines(keepends=True)
        outputs.append({"output_type": "stream", "name": "stdout", "text": text})
    for figure in figures:
        png = io.BytesIO()
        figure.savefig(png, dpi=120, metadata={"Software": None})
        data = {"image/png": base64.b64encode(png.getvalue()).decode()}
        outputs.append({"output_type": "display_data", "data": data, "metadata": {}})
    return outputs


def save_svg(figure):
    """The figure with its text as text, the same bytes each time."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "tour"}):
        path = FIGURES / f"{figure.get_label()}.svg"
        figure.savefig(path, metadata={"Date": None, "Creator": None})


def main():
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in train.py
    notebook = json.loads(NOTEBOOK.read_text())
    shutil.rmtree(NOTEBOOK.parent / "tour", ignore_errors=True)  # of an earlier run
    with contextlib.chdir(NOTEBOOK.parent):
        for count, (cell, printed, figures) in enumerate(run_cells(notebook), 1):
            print(printed, end="", flush=True)
            cell["execution_count"] = count
            cell["outputs"] = to_outputs(printed, figures)
            for figure in figures:
                save_svg(figure)
    NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
