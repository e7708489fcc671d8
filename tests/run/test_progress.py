"""The screen of a run: log lines, the live line and the final table."""

import io
import math
import re

import pytest
from rich.console import Console

from consensus.run.progress import Screen, evaluation_table
from consensus.run.sinks import MINIBATCH_LOSS

LOSS = {MINIBATCH_LOSS: 0.5}
ROW = {
    "iteration": 500,
    "epoch": 6.9589,
    "objective": 123.456789,
    "train_loss": 100.4567,
    "train_error": 1.236,
    "test_loss": 50.12345,
    "test_error": 2.5,
    "coupling": 0.012345,
    "samples_per_s": 1234.56,
    "cuts_u": 0,
    "cuts_z": 0,
}


def screen(*, enabled=True, terminal=False, width=200):
    """A screen of 100 iterations, and what it has written."""
    written = io.StringIO()
    console = Console(
        file=written,
        force_terminal=terminal,
        width=width,
        soft_wrap=True,
        highlight=False,
        quiet=not enabled,
    )
    return Screen(100, enabled, console), written


def test_plain_lines_without_a_terminal():
    shown, written = screen()
    with shown:
        shown.say("[bold] is not markup, it is a folder")
        shown.scalars(LOSS, 50)  # live only
        shown.evaluation(ROW)
    assert written.getvalue() == (
        "[bold] is not markup, it is a folder\n"
        "iteration    500  epoch   6.96  train loss 100.46 error 1.24 %  "
        "test loss 50.123 error 2.50 %  coupling 0.0123  1235 samples/s\n"
    )


def test_a_long_line_is_one_line():
    written = io.StringIO()
    shown = Screen(100, True, Console(file=written, width=40, soft_wrap=True))
    shown.evaluation(ROW)
    assert written.getvalue().count("\n") == 1


@pytest.mark.parametrize("width", [60, 80, 100, 120, 140])
def test_a_line_wraps_between_its_numbers_in_a_terminal(width):
    shown, written = screen(terminal=True, width=width)
    found = {"envelope_gradient": 2.0, "accuracy": 0.1, "consensus_residual": 15.0, "seconds": 1.0}
    found |= {"worker_residual": [1.0], "translation_gap": [3.0], "converged": True}
    shown.evaluation(ROW | {"stationarity": found})
    lines = written.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert not any(line.endswith(" ") for line in lines)
    text = " ".join(" ".join(lines).split())
    log, plain = screen()
    log.evaluation(ROW | {"stationarity": found})
    assert text == " ".join(plain.getvalue().split()), "the words of the log file"
    parts = [part for line in lines for part in line.strip().split("  ")]
    whole = [part for part in plain.getvalue().replace("\n", "  ").split("  ") if part]
    assert [part for part in parts if part] == whole, "no column is broken"


def test_a_sentence_wraps_between_its_words_in_a_terminal():
    shown, written = screen(terminal=True, width=30)
    path = "/a/path/that/is/longer/than/the/terminal"
    shown.say(f"[bold] words that need more than one line: results in {path}")
    lines = written.getvalue().splitlines()
    assert lines == ["[bold] words that need more", "than one line: results in", path]


def test_an_overflow_does_not_stop_the_line():
    shown, written = screen()
    shown.evaluation({**ROW, "train_loss": math.inf, "coupling": math.nan})
    assert "train loss inf error" in written.getvalue()
    assert "coupling nan " in written.getvalue()


def test_a_live_line_in_a_terminal():
    shown, written = screen(terminal=True)
    with shown:
        shown.scalars({MINIBATCH_LOSS: 0.123456}, 37)
        shown.evaluation(ROW)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.getvalue())
    assert text != written.getvalue(), "it moves the cursor"
    assert "37/100" in text
    assert re.search(r" elapsed \d:\d\d:\d\d left [-\d:]+ minibatch loss 0.1235", text)
    assert "iteration    500  epoch   6.96" in text
    assert written.getvalue().count("\x1b[?25l") == written.getvalue().count("\x1b[?25h") == 1


def test_the_cursor_comes_back_after_a_failure():
    shown, written = screen(terminal=True)
    with pytest.raises(KeyboardInterrupt), shown:
        raise KeyboardInterrupt
    assert written.getvalue().rindex("\x1b[?25h") > written.getvalue().rindex("\x1b[?25l")


@pytest.mark.parametrize("terminal", [False, True])
def test_other_ranks_print_nothing(terminal):
    shown, written = screen(enabled=False, terminal=terminal)
    with shown:
        shown.say("hello")
        shown.scalars(LOSS, 1)
        shown.evaluation(ROW)
        shown.table([ROW], title="t")
    assert written.getvalue() == ""


def test_other_ranks_print_nothing_on_their_standard_output(capsys):
    with Screen(100, enabled=False) as shown:
        shown.say("hello")
        shown.table([ROW], title="t")
    assert capsys.readouterr() == ("", "")


def cells(table, column):
    return list(table.columns[column].cells)


@pytest.mark.parametrize(
    ("count", "chosen"),
    [
        (1, [1]),
        (12, list(range(1, 13))),
        (13, [1, 3, 5, 7, 9, 11, 13]),
        (24, list(range(2, 25, 2))),
        (60, list(range(5, 61, 5))),
        (100, [1, 10, 19, 28, 37, 46, 55, 64, 73, 82, 91, 100]),
    ],
)
def test_the_table_shows_few_rows_and_the_last(count, chosen):
    rows = [{**ROW, "iteration": t} for t in range(1, count + 1)]
    table = evaluation_table(rows, title="u")
    assert cells(table, 0) == [str(t) for t in chosen]


@pytest.mark.parametrize("most", [1, 2, 5, 12])
@pytest.mark.parametrize("count", range(1, 60, 7))
def test_never_more_rows_than_asked(count, most):
    rows = [{**ROW, "iteration": t} for t in range(1, count + 1)]
    shown = cells(evaluation_table(rows, title="u", most=most), 0)
    assert 1 <= len(shown) <= most
    assert shown[-1] == str(count)


def test_the_table_has_the_columns_of_a_row():
    table = evaluation_table([ROW], title="u at the evaluations")
    shown = {str(c.header): list(c.cells) for c in table.columns}
    assert shown == {
        "iteration": ["500"],
        "epoch": ["6.96"],
        "objective": ["123.46"],
        "train loss": ["100.46"],
        "train error": ["1.24"],
        "test loss": ["50.123"],
        "test error": ["2.50"],
    }
    assert table.title == "u at the evaluations"


def test_the_table_reaches_the_screen():
    shown, written = screen()
    shown.table([ROW], title="u at the evaluations")
    assert "u at the evaluations" in written.getvalue()
    assert "123.46" in written.getvalue()
