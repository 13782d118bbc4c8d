"""The command ``gputune check``: whether a device computes what it should, and how fast it trains."""

from argparse import Namespace

from tqdm.auto import tqdm

from gputune.check.check import check as check_device
from gputune.check.check import checks_of, timed_of
from gputune.engine.backend import choose_device
from gputune.errors import CheckFailedError
from gputune.text import count


def check(arguments: Namespace) -> str:
    """Return the table, or JSON. Raises CheckFailedError, with the same, where a law does not hold."""
    device = choose_device(arguments.device)
    total = len(timed_of(device)) + len(checks_of(device))
    with tqdm(total=total, unit="check", disable=None, leave=False, dynamic_ncols=True) as bar:

        def tell(words: str) -> None:
            bar.set_postfix_str(words)
            bar.update()

        report = check_device(device, tell)
    text = report.json() if arguments.json else str(report)
    if not report.ok:
        failed = sum(not row.ok for row in report.rows)
        raise CheckFailedError(
            f"{count(failed, 'law')} of {len(report.rows)} failed on {report.device}: what trains that way there is "
            "not to be trusted. Please report the table, with the versions in its first line.",
            report=text,
        )
    return text
