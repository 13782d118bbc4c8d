"""Numbers that are written with a currency, a percent sign or commas between thousands, as spreadsheets do."""

import math
import re
from collections.abc import Iterable

import numpy as np

_AMOUNT = re.compile(
    r"([-+]?)([$€£¥]?) ?([-+]?)(0|[1-9][0-9]*|[1-9][0-9]{0,2}(?:,[0-9]{3})+)(\.[0-9]+)? ?([%$€£¥]?)"
)
_THOUSANDS = 4  # digits from which on a number has a comma, where its column has any


def read_amounts(texts: Iterable[str | None]) -> tuple[np.ndarray, str] | None:
    """Return texts as numbers (n,), NaN for None, and one of them as it is written; None where they are no amounts.

    All are amounts of one form: they have the same currency or a percent sign, and commas between thousands
    everywhere or nowhere. 89.5% is 89.5. Plain numbers are none, and neither are currencies with three decimals
    throughout, which are thousands in other countries.
    """
    numbers, signs, decimals, commas, example = [], set(), set(), set(), ""
    for text in texts:
        if text is None:
            numbers.append(math.nan)
            continue
        match = _AMOUNT.fullmatch(text.strip())
        if match is None or (match[1] and match[3]) or (match[2] and match[6]):
            return None
        minus, currency, other, whole, rest, unit = match.groups(default="")
        signs.add(currency + unit)
        decimals.add(len(rest))
        if len(whole) >= _THOUSANDS:
            commas.add("," in whole)
        if len(signs) > 1 or len(commas) > 1:
            return None
        if not example or ("," in text and "," not in example):
            example = text
        numbers.append(float(f"{minus}{other}{whole.replace(',', '')}{rest}"))
    sign = "".join(signs)
    if not example or (not sign and commas != {True}):
        return None
    if sign not in ("", "%") and decimals - {0} == {4}:
        return None
    return np.array(numbers, dtype=np.float64), example
