"""Markdown at a terminal: styled as it comes, no character lost; and its signs taken away."""

from __future__ import annotations

import itertools
import re

from hypothesis import example, given
from hypothesis import strategies as st

from ebbtide.cli.markdown import MarkdownStyle
from ebbtide.cli.summary_text import without_markdown

_MARKDOWN = (
    "# Title\nsome **bold** and `code **x**` * star\n```python\nx = '**'\n``\n```\n"
    "* item\n**open\nnext **\n~~~\n```\n~~~\n``` x"
)


def strip_codes(text):
    return re.sub(r"\x1b\[[0-9]*m", "", text)


@given(text=st.text(alphabet="a*`~# \n", max_size=60), cuts=st.lists(st.integers(0, 60)))
@example(text=_MARKDOWN, cuts=[])
@example(text=_MARKDOWN, cuts=list(range(200)))
def test_markdown_keeps_every_character(text, cuts):
    def styled(pieces):
        style = MarkdownStyle()
        return "".join([style.feed(piece) for piece in pieces]) + style.finish()

    bounds = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    whole = styled([text])
    assert styled(text[a:b] for a, b in itertools.pairwise(bounds)) == whole
    assert strip_codes(whole) == text
    for line in whole.split("\n"):
        # Nothing reaches into the next line, or the prompt.
        assert not re.search(r"\x1b\[[1-9][0-9]*m(?!.*\x1b\[0m)", line)


def test_markdown_looks_like_what_it_says():
    style = MarkdownStyle()
    shown = style.feed("a **b** `c**d` # e\n# f\n") + style.finish()
    assert shown == ("a \x1b[1m**b**\x1b[0m \x1b[36m`c**d`\x1b[0m # e\n\x1b[1m# f\x1b[0m\n")


def test_markdown_loses_its_signs():
    assert without_markdown("## A *very* **bold** `x_y` snake_case_word 2*3*4") == (
        "A very bold x_y snake_case_word 2*3*4"
    )
    assert without_markdown("* item") == "- item" and without_markdown("---") == ""
