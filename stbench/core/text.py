"""Text from outside at the boundary: one function per output format, and the rule for names.

Names, options and messages come from run folders, journals, plug-ins, data sets and published values. Whoever
wrote those must not control a terminal, a web page, a TeX run or a spreadsheet. Formatting code works with
the raw text; each writer escapes it with the function of its format. JSON needs none: it is written with
`ensure_ascii`.
"""

from __future__ import annotations

import re
import sys
import textwrap

from stbench.core.errors import UserError

NAME_LENGTH = 48
"""Longest name: data set, backbone and recipe together are part of the name of a run folder."""
LONGEST_TEXT = 1000
"""Characters of one cell or line in the terminal, Markdown, LaTeX and plots."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

# --- Names ---


def check_name(name: object, what: str, *, parts: int = 1, length: int = NAME_LENGTH) -> str:
    """Return `name` if it can be part of a path and is readable in every output.

    A name has 1 to `length` of the letters A-Z and a-z, digits and . _ -, and starts with a letter or digit.
    With `parts=2` it may be two such names with a slash between them, such as the size "b/2". Raises
    UserError, which calls the name `what`.
    """
    found = name if isinstance(name, str) else ""
    pieces = found.split("/")
    if len(found) <= length and len(pieces) <= parts and all(map(_NAME.fullmatch, pieces)):
        return found
    raise UserError(
        f"{what} must be 1 to {length} letters, digits and . _ -, starting with a letter or digit; "
        f"found '{visible(str(name), 100)}'; rename it"
    )


# --- Terminal and log files ---

_INVISIBLE = re.compile(
    "[\u00ad\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0000-\U000e0fff]"
)
"""Characters that print nothing although Python calls most of them printable."""


def visible(text: str, limit: int = LONGEST_TEXT) -> str:
    r"""Return `text` for a terminal or a log: one line in which every character can be seen.

    Controls, line breaks, bidirectional and zero-width characters, lone surrogates, and characters of no or
    private use are written as escapes such as \x1b and \u202e; text after `limit` characters is left out. The
    result must be printed without markup.
    """
    cut = len(text) - limit
    if cut > 0:
        text = text[:limit]
    if not text.isprintable() or _INVISIBLE.search(text):
        text = "".join(
            letter if letter.isprintable() and not _INVISIBLE.match(letter) else _escape(letter)
            for letter in text
        )
    return f"{text} ... ({cut} more characters)" if cut > 0 else text


def _escape(letter: str) -> str:
    code = ord(letter)
    if letter in "\t\n\r":
        return {"\t": "\\t", "\n": "\\n", "\r": "\\r"}[letter]
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def print_line(text: str, *, error: bool = False) -> None:
    """Print one visible line on standard output, or on standard error."""
    stream = sys.stderr if error else sys.stdout
    line = visible(text)
    encoding = getattr(stream, "encoding", None) or "utf-8"
    print(line.encode(encoding, "backslashreplace").decode(encoding), file=stream)


# --- Markdown ---

_MARKDOWN = re.compile(
    r"[\\`*\[\]|~$&]"  # code, emphasis, links, cells, strikethrough, mathematics, entities
    r"|(?<![^\W_])_|_(?![^\W_])"  # an underscore within a word is literal
    r"|(?<=\])\("
    r"|(?<=\w):(?=//)|(?<=mailto):|(?<=xmpp):|(?<=www)\."  # addresses that become links by themselves
    , re.IGNORECASE
)  # fmt: skip
_MARKDOWN_BLOCK = re.compile(r"\A(?:([-+#>=:])|(\d+)([.)]))")
_TAG = re.compile(r"<(?![0-9= ]|\Z)")


def to_markdown(text: str, *, block: bool = False) -> str:
    """Return `text` for a Markdown cell or heading: shown as it is, without HTML, links or formatting.

    With `block`, for the beginning of a line: it starts no list, heading, quotation or table either.
    """
    text = _MARKDOWN.sub(r"\\\g<0>", visible(text))
    text = _TAG.sub("&lt;", text)
    return _MARKDOWN_BLOCK.sub(r"\g<2>\\\g<1>\g<3>", text) if block else text


# --- LaTeX ---

_LATEX = {letter: f"\\{letter}" for letter in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "±": r"$\pm$",
    "†": r"$\dagger$",
    "<": "$<$",
    ">": "$>$",
    # After the \\ of the line above, both would be its arguments.
    "[": "{[}",
    "*": "{*}",
}


def to_latex(text: str) -> str:
    """Return `text` for a cell of a LaTeX tabular: no letter of it is a command."""
    return "".join(_LATEX.get(letter, letter) for letter in visible(text))


def to_latex_comment(text: str) -> str:
    """Return `text` as a LaTeX comment, which cannot leave its line."""
    return f"% {visible(text)}"


# --- CSV ---

_FORMULA = tuple("=+-@＝＋－＠")  # noqa: RUF001


def to_csv(text: str) -> str:
    """Return `text` for a CSV cell: a spreadsheet reads it as text, not as a formula.

    Text that would start a formula is preceded by an apostrophe. Numbers are written without this function:
    a negative number is a number.
    """
    text = visible(text, limit=sys.maxsize)
    return f"'{text}" if text.lstrip().startswith(_FORMULA) else text


# --- Plots ---


def to_plot(text: str, limit: int = LONGEST_TEXT, *, width: int = LONGEST_TEXT) -> str:
    r"""Return `text` for a label of matplotlib, wrapped at `width`: dollar signs do not start mathematics."""
    lines = textwrap.wrap(visible(text, limit), width)
    text = "\n".join(lines).replace("$", r"\$")  # last, because a line may not end between \ and $
    return f" {text}" if text.startswith("_") else text  # a legend leaves out labels with an underscore
