import sys

import pytest

from consensus.doctor import __main__ as doctor
from tests.testing.plugins import plugin_in


@pytest.mark.parametrize(
    ("word", "complaint"),
    [
        ("potential=cubik", "`potential` is cubik; allowed: "),
        ("lam=0.1", "unknown key `lam` (did you mean `algorithm.lam`?); "),
        ("algorithm.lr=1", "unknown key `algorithm.lr` (did you mean `algorithm.sigma`?); "),
        ("--cfg", "`--cfg` is no KEY=VALUE"),
        ("output.name=(a=b)/", "`output.name` is '(a=b)/'; allowed: "),
    ],
)
def test_a_mistake_is_one_line(monkeypatch, capsys, word, complaint):
    monkeypatch.setattr(sys, "argv", ["doctor", word])
    with pytest.raises(SystemExit, match="2"):
        doctor.main()
    err = capsys.readouterr().err
    assert err.startswith(f"consensus.doctor: {complaint}")
    assert err.count("\n") == 1
    assert ("did you mean `cubic`?" in err) == (word == "potential=cubik")


def test_the_doctor_finds_experiments_in_a_folder_outside(monkeypatch, tmp_path):
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\nalgorithm:\n  lam: 0.07\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    examined = []

    def examine(config, job):
        examined.append(config.algorithm.lam)
        return 0

    monkeypatch.setattr(doctor, "examine", examine)
    monkeypatch.setattr(doctor, "end", lambda code: None)
    monkeypatch.setattr(doctor.signal, "signal", lambda *_: None)
    for search in (f"--config-dir={tmp_path}", f"hydra.searchpath=['{tmp_path}']"):
        monkeypatch.setattr(sys, "argv", ["doctor", search, "experiment=mine"])
        doctor.main()
    assert examined == [0.07, 0.07]


def test_the_doctor_takes_the_names_of_a_plugin(monkeypatch, tmp_path):
    examined = []
    monkeypatch.setattr(doctor, "examine", lambda config, job: examined.append(config) or 0)
    monkeypatch.setattr(doctor, "end", lambda code: None)
    monkeypatch.setattr(doctor.signal, "signal", lambda *_: None)
    own = ["plugins=[mine.py]", "potential=quartic", "data=stripes"]
    monkeypatch.setattr(sys, "argv", ["doctor", *own])
    with plugin_in(tmp_path, monkeypatch):
        doctor.main()
    (config,) = examined
    assert (config.potential.name, config.data.options) == ("quartic", {"count": 60})
    assert config.plugins == [f"{tmp_path}/mine.py"]


@pytest.mark.parametrize(
    ("variables", "complaint"),
    [
        ({"NNODES": "two"}, "`NNODES` is two"),
        ({"NNODES": "2"}, "`RENDEZVOUS` is ;"),
        ({"NNODES": "2", "RENDEZVOUS": "here"}, "`RENDEZVOUS` is here"),
        ({"NNODES": "2", "RENDEZVOUS": "here:99999"}, "`RENDEZVOUS` is here:99999"),
    ],
)
def test_mistakes_in_the_variables_of_a_node(monkeypatch, capsys, variables, complaint):
    for name, value in (variables | {"CONSENSUS_DOCTOR": "nodes"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["doctor"])
    with pytest.raises(SystemExit, match="2"):
        doctor.main()
    assert complaint in capsys.readouterr().err
