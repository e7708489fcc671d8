import sys

import pytest

from consensus.doctor import __main__ as doctor


@pytest.mark.parametrize(
    ("word", "complaint"),
    [
        ("potential=cubik", "`potential` is cubik; allowed: "),
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
