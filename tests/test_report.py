"""support/report.py and report.html: the curves of several runs, grouped by their settings."""

import json
import re
import sys
from pathlib import Path

import pytest

import eval as evaluation
from browser import dump_dom
from script_tools import assert_user_error
from support import plots
from support.metrics import rate_interval
from support.report import differing_settings, read_run, report_data, write_report

EXAMPLE = Path(__file__).parent.parent / "examples" / "household"
HOSTILE = "</script><img src=x onerror=\"document.title='ran'\">"


def write_run(folder, successes, kind="simple", split="unseen", **settings):
    """The log of a run with these training successes."""
    folder.mkdir()
    config = {"method": "hiper", "critic_warmup": 1, "seed": 0, "out": str(folder), **settings}
    lines = [
        {
            "iteration": n,
            "success": success,
            "success_by_type": {kind: success},
            "explained_variance": {"high": 0.5, "low": None},
            "kl_to_reference": 0.01 * n,
            "seconds": {"rollout": 30.0, "score": 10.0, "update": 20.0},
        }
        for n, success in enumerate(successes)
    ]
    result = {
        "split": split,
        "episodes": 10,
        "temperature": 0.4,
        "success": 0.5,
        "success_by_type": {kind: 0.5},
        "episodes_by_type": {kind: 10},
    }
    evals = [{**result, "iteration": n} for n in (0, len(successes))]
    (folder / "config.json").write_text(json.dumps(config))
    for name, rows in (("metrics", lines), ("evals", evals)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    return folder


def charts(data):
    return {chart["title"]: chart for section in data["sections"] for chart in section["charts"]}


@pytest.fixture
def folders(tmp_path):
    return [
        write_run(tmp_path / "a", [0.2, 0.4]),
        write_run(tmp_path / "b", [0.4, 0.6], seed=1),
        write_run(tmp_path / "c", [0.1], method="ppo"),
    ]


def test_runs_that_differ_in_their_seed_only_are_one_group(folders):
    runs = [read_run(folder) for folder in folders]
    assert differing_settings(runs) == {
        "method": ["hiper", "hiper", "ppo"],
        "seed": [0, 1, 0],
    }
    data = report_data(runs)
    assert [run["group"] for run in data["runs"]] == [0, 0, 1]
    assert data["groups"] == ["method hiper (2 runs)", f"{folders[2]} (method ppo)"]
    assert report_data(runs[:2])["groups"] == ["all runs (2 runs)"]
    assert report_data(runs[:1])["groups"] == [str(folders[0])]
    assert report_data(runs[:1])["differ"] == []


def test_a_setting_of_a_later_version_had_its_default(tmp_path):
    old, new = write_run(tmp_path / "a", [0.1]), write_run(tmp_path / "b", [0.1], checklist=0.0)
    assert differing_settings([read_run(old), read_run(new)]) == {}


def test_versions_are_no_settings(tmp_path):
    """config.json holds what a run was made with: runs of two commits are still one group."""
    one = write_run(tmp_path / "a", [0.1], versions={"commit": "1"})
    two = write_run(tmp_path / "b", [0.1], versions={"commit": "2"})
    assert differing_settings([read_run(one), read_run(two)]) == {}


def test_the_charts_are_the_logs(folders):
    data = report_data([read_run(folder) for folder in folders])
    found = charts(data)
    assert found["Success"]["lines"] == [[[0, 0.2], [1, 0.4]], [[0, 0.4], [1, 0.6]], [[0, 0.1]]]
    assert found["simple"]["lines"] == found["Success"]["lines"]
    assert found["V_high"]["lines"][0] == [[0, 0.5], [1, 0.5]]
    assert found["V_low"]["lines"][0] == [[0, None], [1, None]]
    assert found["V_switch"]["lines"][0] == [[0, None], [1, None]]  # not logged
    assert found["Update, seconds"]["lines"][2] == [[0, 20.0]]
    iteration, rate, low, high = found["Success"]["points"][0][1]
    assert (iteration, rate) == (2, 0.5)
    assert low == pytest.approx(0.2366, abs=1e-4)  # Wilson's
    assert high == pytest.approx(0.7634, abs=1e-4)
    assert found["simple"]["points"][0] == found["Success"]["points"][0]
    assert found["V_high"]["points"][0] == []
    assert [run["minutes"] for run in data["runs"]] == [2.0, 2.0, 1.0]


def test_the_page_is_drawn_and_nothing_in_it_runs(tmp_path):
    one = write_run(tmp_path / "a", [0.2, 0.4], kind=HOSTILE, split=HOSTILE, method=HOSTILE)
    two = write_run(tmp_path / "b<img src=x>", [0.4, 0.6], kind=HOSTILE, env=HOSTILE)
    path = write_report([one, two])
    assert path == one / "report.html"
    page = path.read_text(encoding="utf-8")
    assert page.count("<script") == page.count("</script>") == 2
    assert "<img" not in page
    assert not re.search("innerHTML|outerHTML|insertAdjacentHTML|document.write", page)
    dom = dump_dom(path.as_uri(), tmp_path)
    assert "<title>Run report</title>" in dom
    assert "<img" not in dom
    assert dom.count("&lt;img") >= 6  # group, run, method, split, setting and chart
    assert dom.count("<polyline") >= 10
    assert dom.count("<circle") == 8  # two evaluations of two runs, in total and of the family


def test_the_command(folders, tmp_path, capsys):
    words = ["--report", *map(str, folders), "--html", str(tmp_path / "page.html")]
    evaluation.main(words)
    assert "page.html" in capsys.readouterr().out
    assert str(folders[2]) in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "words, said", [("nowhere", "nowhere"), ("a empty", "empty"), ("a --lr 1", "--lr")]
)
def test_reports_are_refused_in_one_sentence(folders, tmp_path, capfd, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    words = ["--report", *words.split()]
    assert said in assert_user_error(evaluation.main, words, tmp_path, capfd)


# ---- pictures ----------------------------------------------------------------------------------


def test_the_pictures_show_what_the_page_shows(folders, monkeypatch):
    """One PNG per section beside the page; group curves are the mean of the group's runs."""
    data = report_data([read_run(folder) for folder in folders])
    page = folders[0] / "page.html"
    paths = plots.plot_report(data, page)
    assert [path.name for path in paths] == [
        f"page-{name}.png"
        for name in (
            *("success", "success-per-task-family", "plan"),
            *("critic-explained-variance", "policy", "time"),
        )
    ]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in paths)
    lines = charts(data)["Success"]["lines"]
    assert plots.group_curve(lines[:2]) == [(0, [0.2, 0.4]), (1, [0.4, 0.6])]
    assert plots.group_curve(lines) == [(0, [0.2, 0.4, 0.1])]  # the last run is shorter
    assert plots.group_curve([[[0, None], [1, 0.5]]]) == [(1, [0.5])]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plots.plot_report(data, page) == []


def test_names_are_no_formulas(tmp_path):
    """A `$` in a name begins a formula in matplotlib, and a broken one stops the picture."""
    kind = "$\\frac{ $x$ \x1b[31m"
    folder = write_run(tmp_path / "_$run$ \\frac{", [0.2], kind=kind, env=kind)
    data = report_data([read_run(folder)])
    assert len(plots.plot_report(data, tmp_path / "page.html")) == 6
    log = {name: read_run(folder)[name] for name in ("lines", "evals")}
    for line in log["lines"]:
        line.update(episode_length=3.0, switches_per_episode=1.0)
    plots.plot_curves(folder, log)
    assert (folder / "curve.png").read_bytes()[:4] == b"\x89PNG"


def test_the_curve_marks_the_warmup_and_names_what_it_draws(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "a", [0.2, 0.4], env="household")
    log = {name: read_run(folder)[name] for name in ("lines", "evals")}
    for line in log["lines"]:
        line.update(episode_length=3.0, switches_per_episode=1.0)
    shown = []
    with monkeypatch.context() as patched:
        patched.setattr("matplotlib.pyplot.close", shown.append)
        plots.plot_curves(folder, log)
    [figure] = shown
    sys.modules["matplotlib.pyplot"].close(figure)  # it stays readable
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert {"50.0", " turns 3.0", " switches 1.0"} <= set(texts)
    assert any("critic warm-up" in text for text in texts)
    assert figure.get_suptitle() == "hiper in household, seed 0"
    band = figure.axes[0].patches[0].get_extents().transformed(figure.axes[0].transData.inverted())
    assert (band.x0, band.x1) == pytest.approx((-0.5, 0.5))  # iteration 0
    names = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert names[0] == "training episodes, temperature 1"
    assert names[1] == "unseen: 10 tasks, temperature 0.4, with 95 % interval"


def test_a_family_s_interval_is_that_of_its_own_episodes(folders):
    run = read_run(folders[0])
    run["evals"][1]["episodes_by_type"] = {"simple": 4}
    found = charts(report_data([run]))
    assert found["simple"]["points"][0][1] == [2, 0.5, *rate_interval(0.5, 4)]
    assert found["Success"]["points"][0][1] == [2, 0.5, *rate_interval(0.5, 10)]


def test_every_curve_finds_its_numbers_in_the_log_of_a_run():
    for title, chart in charts(report_data([read_run(EXAMPLE)])).items():
        [line] = chart["lines"]
        assert line and all(value is not None for _, value in line), title


def test_numbers_of_processes_and_threads_are_no_settings(tmp_path):
    one = write_run(tmp_path / "a", [0.1], counts={"processes": 1, "threads": 2})
    two = write_run(tmp_path / "b", [0.1], counts={"processes": 1, "threads": 4})
    assert differing_settings([read_run(one), read_run(two)]) == {}


def test_the_warm_up_of_a_run_is_that_of_its_settings(folders):
    assert [run["warmup"] for run in report_data([read_run(folders[0])])["runs"]] == [1]


def test_an_evaluation_has_its_interval_and_its_protocol(folders):
    [run] = report_data([read_run(folders[0])])["runs"]
    low, high = rate_interval(0.5, 10)
    about = "unseen, 10 tasks, temperature 0.4"
    expected = {"iteration": 2, "success": 0.5, "about": about, "low": low, "high": high}
    assert run["evals"][1] == expected
