"""Fixtures of the report: run directories and the command."""

import json
import sys

import pytest
import yaml
from matplotlib.figure import Figure

from consensus.report import __main__ as report


@pytest.fixture
def write_run(tmp_path):
    """`write_run("a/b", config, rows)`: a run directory below tmp_path/sweep."""

    def write(name, nested, rows, finished=True, workers=4, **summary):
        run_dir = tmp_path / "sweep" / name
        run_dir.mkdir(parents=True)
        if nested is not None:
            (run_dir / "config.yaml").write_text(yaml.safe_dump(nested), encoding="utf-8")
        text = "".join(json.dumps(r) + "\n" for r in rows)
        (run_dir / "metrics.jsonl").write_text(text, encoding="utf-8")
        if finished:
            summary |= {"environment": {"workers": workers}}
            (run_dir / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
        return run_dir

    return write


@pytest.fixture
def command(monkeypatch, capsys):
    """`command(path, ...)`: exit code, standard output and standard error of consensus.report."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["consensus.report", *map(str, arguments)])
        code = 0
        try:
            report.main()
        except SystemExit as leaving:
            code = leaving.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def blank_figures(monkeypatch):
    """Figures are built, but the files stay empty: that takes a tenth of the time."""
    monkeypatch.setattr(Figure, "savefig", lambda _, path, **__: path.write_bytes(b""))


@pytest.fixture
def drawn(monkeypatch):
    """The figures, in place of their files."""
    figures = []

    def keep(figure, *_, **__):
        if figure not in figures:  # each is written as PNG and as PDF
            figures.append(figure)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures
