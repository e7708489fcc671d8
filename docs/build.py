"""Builds the site: python docs/build.py [--output FOLDER]; scripts/docs calls it.

Runs the Python snippets of the pages, builds the pages with warnings as errors, and follows every
internal link of the result. Exit code 1 after a failure. Needs no network.
"""

import argparse
import contextlib
import doctest
import io
import re
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

HERE = Path(__file__).parent
SNIPPET = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def run_snippets(page):
    """Run the Python of a page in order, in one namespace. Failures as text."""
    names, failures = {"__name__": "__page__"}, []
    text = page.read_text(encoding="utf-8")
    for match in SNIPPET.finditer(text):
        line, code, said = text.count("\n", 0, match.start()), match[1], io.StringIO()
        if ">>>" in code:
            test = doctest.DocTestParser().get_doctest(code, names, page.name, str(page), line)
            runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
            if runner.run(test, out=said.write, clear_globs=False).failed:
                failures.append(said.getvalue())
            names.update(test.globs)
            continue
        try:
            with contextlib.redirect_stdout(said):
                exec(compile("\n" * (line + 1) + code, str(page), "exec"), names)
        except Exception as error:  # reported as a failure, and the other pages still run
            failures.append(f"{page.name}, snippet at line {line + 1}: {error!r}")
    return failures


class Page(HTMLParser):
    """The links and the anchors of a page."""

    def __init__(self, path):
        super().__init__()
        self.links, self.anchors = set(), set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        """Collect `id`, `href` and `src`."""
        for key, value in attributes:
            if key == "id":
                self.anchors.add(value)
            elif key in ("href", "src") and value:
                self.links.add(value)


def broken_links(folder):
    """Links of the pages of a folder to files or anchors that are not there."""
    pages = {path.resolve(): Page(path) for path in folder.rglob("*.html")}
    broken = []
    for path, page in sorted(pages.items()):
        for link in sorted(page.links):
            place, anchor = urldefrag(link)
            if re.match(r"[a-z]+:|//", link) or (not place and anchor in ("", "!")):
                continue
            file = unquote(place.partition("?")[0])
            target = (path.parent / file).resolve() if place else path
            there = target.is_file() or (target / "index.html").is_file()
            if there and anchor and target in pages:
                there = unquote(anchor) in pages[target].anchors
            if not there:
                broken.append(f"{path.relative_to(folder.resolve())}: {link} is not there")
    return broken


def main():
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=HERE.parent / "build" / "docs")
    output = parser.parse_args().output.resolve()
    sys.path.insert(0, str(HERE.parent))
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # snippets write there
        failures = [text for page in sorted(HERE.glob("*.md")) for text in run_snippets(page)]
    from sphinx.cmd.build import build_main

    strict = ["--fail-on-warning", "--keep-going", "--nitpicky", "--quiet"]
    places = ["-d", str(output / ".doctrees"), str(HERE), str(output)]
    code = build_main([*strict, "-b", "html", *places])
    failures += broken_links(output) if code == 0 else [f"sphinx-build ended with {code}"]
    for text in failures:
        print(f"scripts/docs: {text}", file=sys.stderr)
    if not failures:
        print(output / "index.html")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
