"""The address of a Ray cluster."""


def host_and_port(address: str) -> tuple[str, int] | None:
    """Return the host and port of a Ray address, or None if the address does not have the form
    HOST:PORT."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    return (host, int(port)) if host and port.isdecimal() and "/" not in host else None
