from consensus.doctor import software
from consensus.doctor.finding import (
    Finding,
    Level,
)


def test_versions_that_differ():
    first = {"python": "3.11.7", "torch": "2.15.0", "numpy": "2.0", "consensus": "aa"}
    assert list(software.compare_versions([first, first], 1)) == [
        Finding("versions", "the same everywhere")
    ]
    other = {"python": "3.11.7", "torch": "2.14.0", "numpy": "2.1", "consensus": "bb"}
    assert list(software.compare_versions([first, other], 0)) == []
    found = list(software.compare_versions([first, other], 1))
    assert [(finding.level, finding.text) for finding in found] == [
        (Level.FAULT, "the code of consensus is not that of the first (bb, aa)"),
        (Level.WARNING, "numpy is 2.1 here and 2.0 on the first"),
        (Level.FAULT, "torch is 2.14.0 here and 2.15.0 on the first"),
    ]
