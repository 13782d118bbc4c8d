"""What every model asks of the numbers that it is built with."""


def check_size(name: str, value: int, low: int) -> None:
    """Raise ValueError where a size is below its lowest value."""
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {name}={value}.")
