"""Text for terminals and notebooks: remove control characters, round numbers, align columns."""

import math
import re
import textwrap
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from html import escape

GAP = "  "
_DIRECTIONS = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Invisible characters that change the order in which a terminal shows text."""


def clean(value: object, *, keep: str = "") -> str:
    """Return the text of a value without characters that control a terminal.

    A line break or a tab becomes a blank. The function drops all other control characters, except
    the characters in ``keep``.
    """
    return "".join(
        char
        if char in keep
        else " "
        if char in "\n\r\t\u2028\u2029"
        else ""
        if unicodedata.category(char) == "Cc" or char in _DIRECTIONS
        else char
        for char in str(value)
    )


def short(value: object) -> str:
    """Return the value of a hyperparameter as short text for a table or message.

    A float has four digits, also in a tuple or dict. A function or class is shown by its name. A
    list, such as a value for each layer, has the short text of each element.
    """
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return f"[{', '.join(map(short, value))}]"
    if isinstance(value, tuple | dict):
        return with_short_numbers(clean(value))
    return clean(getattr(value, "__name__", value))


# A quoted text, or a number with a decimal point. The second number of a version is none.
_QUOTED_OR_NUMBER = re.compile(
    r"""(?<!\w)'[^']*'|(?<!\w)"[^"]*"|(?<![\w.])\d+\.\d+(?:e[-+]?\d+)?(?!\w|\.\w)"""
)


def with_short_numbers(text: str) -> str:
    """Round the numbers in a text, such as a search space, to at most four digits.

    Text in quotes stays unchanged.

    Example:
        >>> with_short_numbers("lr=[0.00012345678901234567, 0.1], name=['v1.23456']")
        "lr=[0.0001235, 0.1], name=['v1.23456']"
    """
    return _QUOTED_OR_NUMBER.sub(_shortened, text)


def _shortened(match: re.Match[str]) -> str:
    """Return the replacement for a matched number: the number with at most four digits.

    Quoted text and short numbers stay unchanged.
    """
    if match[0][0] in "'\"":
        return match[0]
    return min(match[0], f"{float(match[0]):.4g}", key=len)


_PREFIX = 3
"""The minimum number of letters with which the beginning of a word can stand for the word."""


def nearest(
    word: object, known: Iterable[object], *, others: Mapping[str, str] = ({}), cutoff: float = 0.65
) -> str | None:
    """Return the known word that a mistyped word probably means, or None.

    Upper and lower case do not matter. ``others`` maps the names that other libraries use, in lower
    case, to known words. A spell checker would not find these names.
    """
    by_case = {str(name).lower(): str(name) for name in known}
    text = str(word).lower()
    if (other := others.get(text)) in by_case.values():
        return other
    # Two swapped neighboring letters are more similar than a spell checker's ratio says.
    transposed = {text[:i] + text[i : i + 2][::-1] + text[i + 2 :] for i in range(len(text) - 1)}
    near = [name for name in by_case if name in transposed] or get_close_matches(
        text, by_case, 1, cutoff
    )
    if not near and len(text) >= _PREFIX:
        near = [n for n in by_case if n.startswith(text)] or [
            n for n in by_case if text in re.split("[_-]", n)
        ]
    return by_case[near[0]] if near else None


def did_you_mean(
    word: object,
    known: Iterable[object],
    *,
    others: Mapping[str, str] = ({}),
    prefix: str = "",
) -> str:
    """Return " Did you mean 'NAME'?" with the known word that is most similar to a mistyped word.

    The result is "" if no known word is similar. The text shows the word after ``prefix``.
    """
    near = nearest(word, known, others=others)
    return f" Did you mean {prefix + near!r}?" if near else ""


def is_formula(cell: object) -> bool:
    """Return True if a spreadsheet may compute a cell, because its text begins like a formula.

    A single sign and a number are not formulas.
    """
    return isinstance(cell, str) and len(cell) > 1 and cell[0] in "=+-@\t\r" and not is_number(cell)


def is_number(text: str) -> bool:
    """Return True if Python can read a text as a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def count(number: int, noun: str) -> str:
    """Return a count with its noun, such as "1 row", "2 rows" or "2 categories"."""
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{number} {noun if number == 1 else plural}"


def size_words(number: int) -> str:
    """Return a number of bytes as text, such as "1.5 GiB", in KiB, MiB or GiB."""
    power, name = (3, "GiB") if number >= 2**30 else (2, "MiB") if number >= 2**20 else (1, "KiB")
    return f"{number / 2 ** (10 * power):.1f} {name}"


@dataclass(frozen=True)
class Measure:
    """The name, sign and digits with which gputune shows a score. For example, scikit-learn's
    ``neg_log_loss`` of -0.31 is shown as a log_loss of 0.31.

    Attributes:
        name: the name that is shown.
        lower_is_better: whether the score is a loss, which is shown with the opposite sign.
        decimals: number of decimals.
        positive: the positive class of the score. None if the score has no positive class.
    """

    name: str
    lower_is_better: bool
    decimals: int
    positive: object = None

    @property
    def title(self) -> str:
        """The name of the score as a heading, with its positive class and "(lower is better)" for a
        loss."""
        return f"{self.name}{of_class(self.positive)}{' (lower is better)' * self.lower_is_better}"

    def text(self, score: float) -> str:
        """Return the text of a score, such as "0.3100".

        The score has scikit-learn's sign. NaN becomes "-".
        """
        return self.size(-score if self.lower_is_better else score)

    def size(self, value: float) -> str:
        """Return the text of a value in the score's unit, such as a standard error.

        The text has the same number of decimals as a score.
        """
        if not math.isfinite(value):
            return "-"
        # adding 0.0 turns -0.0 into 0.0
        return f"{value:.3e}" if abs(value) >= 1e7 else f"{value + 0.0:.{self.decimals}f}"

    def with_error(self, score: float, error: float) -> str:
        """Return a score with its standard error as text, such as "0.31 ± 0.02".

        The error is left out if it is not finite.
        """
        return (
            f"{self.text(score)} ± {self.size(error)}" if math.isfinite(error) else self.text(score)
        )


def of_class(positive: object) -> str:
    """Return " of class NAME" for the positive class of a score, or "" without a positive class."""
    return "" if positive is None else f" of class {clean(repr(positive))}"


def measure_of(scoring: str, best: float, positive: object = None, label: str = "") -> Measure:
    """Return the object that shows the scores of a scorer.

    Args:
        scoring: name of the scorer.
        best: the best score, which determines the number of decimals: four digits of it are shown.
        positive: the positive class of the score. None if the score has no positive class.
        label: name to show instead of ``scoring``.
    """
    size = abs(best)
    usual = not math.isfinite(size) or size == 0 or 0.01 <= size < 10
    decimals = 4 if usual else min(max(3 - math.floor(math.log10(size)), 0), 12)
    name = scoring.rpartition(":")[2]  # a callable's name is "module:function"
    shown = (label or name).removeprefix("neg_")
    return Measure(clean(shown), name.startswith("neg_"), decimals, positive)


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: Sequence[str] = (),
    indent: str = "",
) -> str:
    """Return a text table with aligned columns.

    Columns in ``left`` are aligned left, the others right.
    """
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[j]) for line in lines) for j in range(len(header))]
    aligns = ["<" if name in left else ">" for name in header]
    return "\n".join(
        (indent + GAP.join(f"{cell:{a}{w}}" for cell, a, w in zip(line, aligns, widths))).rstrip()
        for line in lines
    )


def paragraph(text: str, width: int, *, first: str = "", then: str = "") -> str:
    """Wrap a text into lines of at most ``width`` characters.

    ``first`` precedes the first line, and ``then`` the other lines.
    """
    wrapper = textwrap.TextWrapper(
        max(width, 40), first, then, break_long_words=False, break_on_hyphens=False
    )
    return wrapper.fill(text)


_BLOCKS = "▁▂▃▄▅▆▇█"


def blocks(values: Sequence[float], *, width: int) -> str:
    """Draw a curve of values as at most ``width`` block characters, for a terminal.

    A blank stands for NaN and infinity.
    """
    step = max(1, math.ceil(len(values) / width))
    shown = list(map(float, values[::step]))
    finite = [value for value in shown if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((v - low) * scale)] if math.isfinite(v) else " " for v in shown)


def card(title: str, rows: Iterable[tuple[str, str]]) -> str:
    """Return an HTML table for a notebook, with a title and one row for each name and text.

    The function escapes all text.
    """
    left = ' style="text-align:left"'
    cells = (
        f"<th{left}>{escape(clean(name))}</th><td{left}>{escape(clean(text))}</td>"
        for name, text in rows
    )
    lines = "".join(f"<tr>{cell}</tr>" for cell in cells)
    return f"<div><strong>{escape(clean(title))}</strong><table>{lines}</table></div>"
