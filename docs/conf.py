"""Sphinx configuration of the site; scripts/docs builds it."""

import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from reference import write_pages  # noqa: E402

import consensus  # noqa: E402

project = "Consensus training"
author = "the consensus authors"
copyright = author
version = release = consensus.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_generated", "_build"]
myst_heading_anchors = 3
highlight_language = "text"
smartquotes_action = "D"  # dashes; in formulas, ' is a derivative
default_role = "code"

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True}
# Names outside the package have no page here, and nothing is downloaded. The last ones are shown as
# source text.
nitpick_ignore_regex = [
    ("py:.*", r"(?!consensus\.).*"),
    ("py:.*", r"consensus\.(registry\.[FT]|records\.Row|core\.profiles\.Profile)"),
    ("py:.*", r"consensus\.run\.config\.Config"),
]

html_theme = "furo"
html_title = "Consensus training"
html_copy_source = False
html_static_path = ["static"]
html_css_files = ["site.css"]
html_theme_options = {"navigation_with_keys": True}

_MARKUP = re.compile(r"(?<!\S)\*\w+\*(?!\w)|[|*]|(?<=\w)_(?![\w`])")


def _plain(line):
    """A line of a docstring in which |, * and a final _ are no markup; *word* is."""
    parts = line.split("`")
    for i in range(0, len(parts), 2):
        parts[i] = _MARKUP.sub(lambda m: m[0] if len(m[0]) > 1 else f"\\{m[0]}", parts[i])
    return "`".join(parts)


def as_markup(app, what, name, thing, options, lines):
    """Docstrings are plain text: indented blocks after an empty line are code."""
    found, code = [], False
    for i, line in enumerate(lines):
        indented = line.startswith("    ")
        if indented and not code and i > 1 and not lines[i - 1].strip():
            above = next((text for text in reversed(lines[:i]) if text.strip()), "")
            if not above.startswith("    "):
                code = True
                found += ["::", ""]
        elif line.strip() and not indented:
            code = False
        found.append(line if code else _plain(line))
    lines[:] = found


def setup(app):
    """Write the generated pages, and read docstrings before napoleon does."""
    write_pages(HERE / "_generated")
    app.connect("autodoc-process-docstring", as_markup, priority=100)
