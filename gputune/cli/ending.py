"""A finished search and its results, for the text that a command prints at its end."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gputune.api.study import Study
from gputune.cli.held_out import HeldOut
from gputune.data.arrays import ArrayLayout
from gputune.data.columns import Layout
from gputune.data.source import Source
from gputune.study.model import TunedModel
from gputune.study.study import Trial


@dataclass(frozen=True)
class Ending:
    """A finished search and its results, for the text that a command prints at its end."""

    file: str  # the input, as it was typed
    study: Study
    rest: Source | None  # the rows of the search; None for a custom training loop
    study_file: Path
    layout: Layout | ArrayLayout | None = None  # what the model reads; None without a model
    held_out: HeldOut | None = None  # score on held-out rows; None if no rows are held out
    default_held_out: HeldOut | None = None  # of the default's model, if it was trained too
    model_folder: Path | None = None  # None if no model was saved
    seconds: float = 0.0  # of the whole run
    ensemble: str = ""  # the sentences about an ensemble
    model: TunedModel | None = None  # the model that was saved
    model_sentences: Sequence[str] = ()  # on its calibration and intervals
    comparison: str = ""  # a remark on the comparison with the default's model
    trial: Trial | None = None  # the trial of ``gputune train``; None after a search
    ended: str = ""  # why the search ended before its last trial
    typed: Sequence[str] = ()  # the arguments after ``gputune``
