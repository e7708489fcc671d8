"""Tables for LaTeX."""

import pytest

from consensus.report.latex import booktabs, escape
from consensus.report.page import table1_tex
from consensus.report.table1 import table1
from tests.testing.made_runs import FIRST, SECOND, config, run


@pytest.mark.parametrize(
    ("text", "tex"),
    [
        ("tan_sep", r"tan\_sep"),
        ("test error %", r"test error \%"),
        ("169.0 ± 1.6", r"169.0 $\pm$ 1.6"),
        ("-", "--"),
        ("-3.1", "$-$3.1"),
        ("a\\b{c}^~ #1 $&", r"a\textbackslash{}b\{c\}\textasciicircum{}\textasciitilde{} \#1 \$\&"),
        ("a\n b", "a b"),
    ],
)
def test_text_is_printed_as_it_stands(text, tex):
    assert escape(text) == tex


def test_a_tabular():
    assert booktabs([["run", "a_b"], ["x", "1"]]).splitlines() == [
        r"\begin{tabular}{@{}lr@{}}", r"\toprule", r"run & a\_b \\", r"\midrule", r"x & 1 \\",
        r"\bottomrule", r"\end{tabular}",
    ]  # fmt: skip


def test_the_tabulars_of_table1():
    runs = [run(config("tan_sep", seed=s), row) for s, row in enumerate((FIRST, SECOND))]
    text = table1_tex(table1(runs))
    # 9 and 7: mean 8, deviation sqrt 2
    assert r"tan\_sep & 1 & 8.0 $\pm$ 1.4 & 7.0 $\pm$ 1.4 & 0.40 $\pm$ 0.14" in text
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 2
    widths = {line.count(" & ") for line in text.splitlines() if line.endswith(r"\\")}
    assert widths == {7, 6}, "the last without a varying key"
