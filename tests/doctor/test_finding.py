import json
from dataclasses import asdict

from consensus.doctor.finding import (
    Finding,
    fault,
    print_report,
    print_verdict,
    warning,
)


def lines_of(capsys, places, found):
    print_report(places, found)
    return [line.rstrip() for line in capsys.readouterr().out.splitlines()]


def test_a_report_prints_each_finding_once_with_its_ranks(capsys):
    fine = Finding("versions", "the same")
    slow = warning("sums", "slow\n  as a table", "buy another")
    lost = fault("devices", "gone", "plug it in")
    places = [f"node rank {rank}" for rank in range(4)]
    assert lines_of(capsys, places, [[fine, slow], [fine, lost], [fine], [fine, lost]]) == [
        "versions  fine     the same",
        "devices   FAULT    rank 1, 3: gone",
        "                   remedy: plug it in",
        "sums      warning  rank 0: slow",
        "                     as a table",
        "                   remedy: buy another",
    ]


def test_a_report_of_many_nodes_names_nodes(capsys):
    places = [f"node{rank // 2} rank {rank}" for rank in range(12)]
    lost, full = fault("devices", "gone", ""), fault("disk", "full", "")
    found = [[] for _ in places]
    for rank in (2, 3, 5):
        found[rank].append(lost)
    found[4].append(full)  # by the first rank of node2, for the node
    assert lines_of(capsys, places, found) == [
        "devices  FAULT    node1; node2 rank 5: gone",
        "disk     FAULT    node2: full",
    ]
    (line,) = lines_of(capsys, places, [*([lost] for _ in places[:-2]), [], []])
    assert line == "devices  FAULT    node0; node1; node2; node3; and 1 more: gone"
    (line,) = lines_of(capsys, places, [[lost] for _ in places])
    assert line == "devices  FAULT    gone"


def test_fine_findings_that_differ_in_numbers_are_printed_once(capsys):
    found = [[Finding("memory", f"{480 + rank}.5 GB left")] for rank in range(3)]
    assert lines_of(capsys, ["a", "b", "c"], found) == ["memory  fine     480.5 GB left"]
    bad = [[fault("memory", f"{rank} GB left", "")] for rank in range(2)]
    assert len(lines_of(capsys, ["a", "b"], bad)) == 2


def test_a_verdict_counts_each_finding_once(capsys):
    lost, slow = fault("a", "b", ""), warning("a", "c", "")
    print_verdict([lost, slow, lost, Finding("a", "d")])
    print_verdict([])
    assert capsys.readouterr().out == "1 fault, 1 warning\nno faults, no warnings\n"


def test_findings_are_sent_as_json():
    for finding in (Finding("a", "b"), fault("a", "b", "c"), warning("a", "b", "c")):
        assert Finding(**json.loads(json.dumps(asdict(finding)))) == finding
