"""Refuses a text target that has too many different values for classes."""

from gputune.data.target import MAX_CLASSES, Target
from gputune.ground.errors import InputError
from gputune.ground.text import count, is_number

# A text target is numbers with wrong values if fewer of its different values are not numbers.
_WRONG_SHARE = 0.1


def refuse_identifier(target: Target) -> None:
    """Raise InputError for a text target that looks like an identifier, or like numbers with a few
    wrong values.

    The target looks like an identifier if it has more than ``MAX_CLASSES`` different values and
    more than half as many values as rows.
    """
    assert target.classes is not None
    n_classes = len(target.classes)
    is_text = target.classes.dtype.kind == "U"
    if is_text and n_classes > MAX_CLASSES and 2 * n_classes > len(target):
        words = [text for text in target.classes.tolist() if not is_number(text)]
        if 0 < len(words) < _WRONG_SHARE * n_classes:
            raise InputError(
                None,
                f"The target {target.name!r} has numbers, but also {count(len(words), 'other value')} "
                f"such as {words[0]!r}",
                remedy="Correct these values, or leave out their rows.",
            )
        raise InputError(
            None,
            f"The target {target.name!r} looks like an identifier: it has {n_classes} different "
            f"values in {len(target)} rows",
            remedy="Choose a different target column, or leave out the rows of rare classes.",
        )
