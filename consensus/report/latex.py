"""Tables for LaTeX with the package booktabs."""

from collections.abc import Sequence

_SPECIAL = {
    **{c: f"\\{c}" for c in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
}


def booktabs(rows: Sequence[Sequence[str]]) -> str:
    """A tabular; the first row holds the headings, and the first column is aligned to the left."""
    first, *others = (" & ".join(map(escape, row)) + r" \\" for row in rows)
    lines = [
        rf"\begin{{tabular}}{{@{{}}l{'r' * (len(rows[0]) - 1)}@{{}}}}",
        r"\toprule",
        first,
        r"\midrule",
        *others,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines)


def escape(text: str) -> str:
    """Text that LaTeX prints as it stands; -3 has a minus, and a lone - is a dash."""
    shown = "".join(_SPECIAL.get(c, c) for c in " ".join(text.split()))
    if shown == "-":
        return "--"
    return f"$-${shown[1:]}" if shown.startswith("-") and shown[1:2].isdigit() else shown
