"""The Pareto figure: what is drawn, in which files, and the same bytes each time."""

import re
import sys

import pytest
from matplotlib.figure import Figure

from chatsae.cli import main
from chatsae.errors import UserError
from chatsae.evals.curves import curves
from chatsae.evals.pareto import figure_paths, pareto_figure
from chatsae.evals.report import load_reports
from curve_samples import config, names, run, table


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("pareto")
    made = []
    for method, factor in (("fast", 1.0), ("bt-p", 30.0)):
        tables = {
            n: table(l0, factor * 9 / l0, delta_loss=8 / l0, noise=0.2)
            for n, l0 in zip(names(), (80.0, 40.0, 20.0), strict=True)
        }
        made.append(run(root / method, config(method), tables))
    return made


def drawn(found, path, monkeypatch) -> Figure:
    """The figure behind the file."""
    kept = []
    real = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (kept.append(self), real(self, *a, **k)))
    pareto_figure(found, path, title="demo")
    return kept[0]


def test_every_sae_is_a_point_of_its_methods_line(runs, tmp_path, monkeypatch):
    figure = drawn(curves(load_reports(runs)), tmp_path / "a.png", monkeypatch)
    mse, loss = figure.axes
    assert [axes.get_xscale() for axes in (mse, loss)] == ["log", "log"]
    assert [axes.get_yscale() for axes in (mse, loss)] == ["log", "linear"]  # errors span a factor of 120
    fast = mse.containers[0].lines[0]
    assert list(fast.get_xdata()) == pytest.approx([20, 40, 80])
    assert list(fast.get_ydata()) == pytest.approx([9 / 20, 9 / 40, 9 / 80])
    assert list(loss.containers[1].lines[0].get_ydata()) == pytest.approx([8 / 20, 8 / 40, 8 / 80])
    assert [text.get_text() for text in figure.legends[0].texts] == ["fast, standard", "bt-p, standard"]
    assert "nats per token" in loss.get_ylabel()
    assert "L0" in mse.get_xlabel()


def test_intervals_are_drawn_where_a_report_has_them(runs, tmp_path, monkeypatch):
    found = curves(load_reports(runs))
    point = found[0].points[0]
    assert isinstance(point.intervals, dict)
    point.intervals["mse"] = [0.4, 0.6]
    figure = drawn(found, tmp_path / "a.png", monkeypatch)
    low, high = figure.axes[0].containers[0].lines[2][0].get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((0.4, 0.6))


def test_the_same_numbers_give_the_same_bytes(runs, tmp_path):
    found = curves(load_reports(runs))
    files = [pareto_figure(found, tmp_path / name / "p") for name in ("a", "b")]
    assert [path.name for path in files[0]] == ["p.png", "p.svg"]
    assert [p.read_bytes() for p in files[0]] == [p.read_bytes() for p in files[1]]
    assert not re.search(r"<dc:date>|https://matplotlib", files[0][1].read_text())


def test_the_command_writes_one_or_both_files(runs, tmp_path, capsys):
    paths = [str(r.path) for r in runs]
    assert main(["compare", *paths, "--figure", str(tmp_path / "new" / "p.svg")]) == 0
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["p.svg"]
    assert "p.svg" in capsys.readouterr().err
    assert figure_paths(tmp_path / "p") == [tmp_path / "p.png", tmp_path / "p.svg"]
    assert main(["compare", *paths, "--figure", str(tmp_path / "p.pdf")]) == 2
    assert "only .png and .svg are written" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["compare", *paths, "--figure", str(tmp_path / "file" / "p.png")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_without_matplotlib_the_command_says_what_to_install(runs, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["compare", str(runs[0].path), "--figure", "p.png"]) == 2
    assert "pip install 'chatsae[figures]'" in capsys.readouterr().err
    assert main(["compare", str(runs[0].path)]) == 0


def test_nothing_to_draw_is_a_mistake(tmp_path):
    with pytest.raises(UserError, match="nothing to draw"):
        pareto_figure([], tmp_path / "p.png")
