"""The folder of a report."""

import pytest

from consensus.report.page import write_report
from tests.testing.made_runs import FIRST, config, run


@pytest.mark.usefixtures("blank_figures")
def test_no_sensitivity_unless_lam_or_eta_varies(write_run, tmp_path):
    runs = [run(config(seed=s), FIRST) for s in (0, 1)]
    runs += [run(config(algorithm__name="msgd", lam=9.0), FIRST)]
    write_report(runs, tmp_path / "f", ["x"])
    assert not (tmp_path / "f" / "sensitivity.png").exists()
    assert "sensitivity" not in (tmp_path / "f" / "report.md").read_text(encoding="utf-8")
    runs += [run(config(potential__eta=2.0), FIRST)]
    write_report(runs, tmp_path / "f", ["x"])
    assert (tmp_path / "f" / "sensitivity.png").exists()
