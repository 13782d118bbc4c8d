"""Messages that name arguments, and the names that each interface gives to these arguments.

A message is written once for all interfaces. To name an argument, a message contains a reference:
``option("cv", 5)`` marks the argument ``cv`` with the value 5. Each interface shows references in
its own form: Python shows ``cv=5``, the command line shows ``--cv 5``.
"""

import re
from dataclasses import dataclass
from enum import Enum


class _Missing(Enum):
    MISSING = 0


MISSING = _Missing.MISSING
"""Marks an argument that was not passed, because None can be a passed value."""

_BEGIN = "⟦"
_END = "⟧"
_OR = "‖"
_MARK = re.compile(f"{_BEGIN}([^{_BEGIN}{_END}]*){_END}")
_REFERENCE = re.compile(
    r"(?:(?P<call>\w+)\()?(?P<name>\w+)(?P<keys>(?:\[[^\]]*\])*)(?:=(?P<value>.*?))?(?(call)\))",
    re.DOTALL,
)
_INTERFACES = ("python", "command", "sklearn")
_LONGEST_VALUE = 200  # characters of a value in a message


@dataclass(frozen=True)
class Reference:
    """A reference to an argument in a message, such as ``cv=5``.

    Args:
        name: Name of the argument in Python, such as "cv".
        keys: Keys and positions in the argument, as Python code: ("'lr'",) for ``space['lr']``.
        value: Value as Python code, "..." for any value, None to show no value.
        call: Function or class that takes the argument; "" for a search.
    """

    name: str
    keys: tuple[str, ...] = ()
    value: str | None = None
    call: str = ""

    @classmethod
    def parse(cls, text: str) -> "Reference | None":
        """Return the reference for a text such as "cv=5", or None if the text is no reference."""
        match = _REFERENCE.fullmatch(text)
        if match is None:
            return None
        keys = tuple(re.findall(r"\[([^\]]*)\]", match["keys"]))
        return cls(match["name"], keys, match["value"], match["call"] or "")

    def __str__(self) -> str:
        keys = "".join(f"[{key}]" for key in self.keys)
        value = "" if self.value is None else f"={self.value}"
        argument = f"{self.name}{keys}{value}"
        return f"{self.call}({argument})" if self.call else argument


class Interface:
    """The names of arguments as messages show them to users of the Python functions. Other
    interfaces override these names.

    Attributes:
        name: "python", "command" or "sklearn".
    """

    name = "python"

    def argument(self, reference: Reference) -> str:
        """Return the name of an argument as users of this interface write it."""
        return str(reference)

    def render(self, message: str) -> str:
        """Replace the marked names in a message by the names that users of this interface know.

        Args:
            message: Text with the marks of ``option`` and ``per_interface``. Marks can be nested.
        """
        rendered = _MARK.sub(self._replacement, message)
        # Inner marks are replaced first. A user's text may hold brackets that mark nothing.
        while rendered != message:
            message = rendered
            rendered = _MARK.sub(self._replacement, message)
        return rendered

    def _replacement(self, mark: re.Match[str]) -> str:
        variants = mark[1].split(_OR)
        if len(variants) == len(_INTERFACES):
            return variants[_INTERFACES.index(self.name)]
        reference = Reference.parse(mark[1])
        return mark[0] if reference is None else self.argument(reference)


PYTHON = Interface()


class Verbatim(str):
    """A text that a message shows without quotation marks, such as "3 columns"."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def option(reference: str, value: object = MISSING) -> str:
    """Return a marked name of an argument for use in a message, which each interface shows in its
    own form.

    Args:
        reference: The argument as Python writes it: "cv", "space['lr']", "Halving(factor=...)".
        value: A value to show after the argument.

    Example:
        >>> message = f"Pass {option('cv', 5)}."
        >>> PYTHON.render(message)
        'Pass cv=5.'
    """
    shown = "" if value is MISSING else f"={value!r}"
    return f"{_BEGIN}{reference}{shown}{_END}"


def per_interface(python: str, command: str, sklearn: str | None = None) -> str:
    """Return a part of a message that has a different text for each interface.

    Args:
        python: The text for functions of Python.
        command: The text for the command line.
        sklearn: The text for scikit-learn estimators; None for the text of ``python``.
    """
    variants = (python, command, python if sklearn is None else sklearn)
    return f"{_BEGIN}{_OR.join(variants)}{_END}"


def shown_value(value: object) -> str:
    """Return the text of a value for a message, on one line and with at most 200 characters."""
    text = repr(value)
    if not isinstance(value, Verbatim):
        text = " ".join(text.split())
    if len(text) > _LONGEST_VALUE:
        text = f"{text[: _LONGEST_VALUE - 3]}..."
    return text
