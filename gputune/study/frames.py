"""The trials of a study as a DataFrame of pandas or polars."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # pandas and polars are imported only for a table.
    import pandas
    import polars

Columns = Mapping[str, Sequence[object]]


def pandas_frame(columns: Columns) -> "pandas.DataFrame":
    """Return columns of equal length as a pandas DataFrame. None becomes a missing value.

    Raises:
        ImportError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError(
            "to_pandas() needs pandas: pip install pandas, or use to_polars()."
        ) from error
    series = {}
    for name, values in columns.items():
        # pandas would turn integers with a gap into floats.
        has_gap = _kinds(values) == {int} and None in values
        series[name] = pandas.Series(values, dtype="Int64" if has_gap else None)
    return pandas.DataFrame(series)


def polars_frame(columns: Columns) -> "polars.DataFrame":
    """Return columns of equal length as a polars DataFrame. Values of mixed types become text."""
    import polars

    series = []
    for name, values in columns.items():
        kinds = _kinds(values)
        if not (kinds <= {int, float} or kinds in ({bool}, {str})):
            values = [None if value is None else str(value) for value in values]
        series.append(polars.Series(name, values, strict=False))
    return polars.DataFrame(series)


def _kinds(values: Sequence[object]) -> set[type]:
    return {type(value) for value in values if value is not None}
