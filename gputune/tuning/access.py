"""The rows and permissions to train a study's trials again, and the search that they belong to."""

from dataclasses import dataclass, replace

from gputune.data.source import Source, read_again
from gputune.data.table import Table
from gputune.data.target_transform import is_known
from gputune.ground.errors import InputError, per_interface
from gputune.modules.construction import Builder
from gputune.study.record import RECORD_FIELDS, lost_option
from gputune.study.study import Study
from gputune.tuning.choices import ModelChoice, recorded_model
from gputune.tuning.options import RowOptions
from gputune.tuning.record import SearchCall, machine_options_here, read_rows, recorded_options


@dataclass(frozen=True)
class Access:
    """The rows and permissions that the user passes to a method which trains a study's trials
    again.

    The rows are X and y, or the study's own rows if X is None. With ``check=True``, rows that
    differ from the rows of the search raise InputError.
    """

    study: Study
    X: object = None
    y: object = None
    check: bool = True
    trust_code: bool = False
    called: str = "best_model"
    module: Builder | None = None

    def __str__(self) -> str:
        return f"{self.called}({'' if self.X is None else 'X, y'})"


def read_search(access: Access) -> SearchCall:
    """Read the model, the rows and the options of a study's search from memory or from its file."""
    study = access.study
    record = access.study.record
    if study.data is not None:
        call: SearchCall = study.data
        if access.X is None:
            return call
        if call.options.training.sample_weight is not None:
            raise InputError(
                None,
                f"{access} cannot weight other rows, because the study used sample_weight",
                remedy="Leave X and y out.",
            )
        return replace(call, source=_source_of(access, call.choice, call.options.rows))
    _check_refittable(access)
    for name in record.lost:
        if RECORD_FIELDS[name].training or name == "method":
            raise lost_option(study.file, name)
    # The record stores class weights as text. Its arguments store the value itself.
    value = record.arguments.kept.get("class_weight")
    class_weight = {None: None, "'balanced'": "balanced"}.get(record.class_weight, value)
    missing = ""
    if record.sample_weight is not None:
        missing = "sample_weight, which this study used,"
    elif not is_known(record.target_transform):
        missing = "target_transform, which is your own object,"
    elif record.class_weight is not None and class_weight is None:
        missing = f"class_weight={record.class_weight}"
    if missing:
        raise InputError(
            None,
            f"{access.called}() cannot read {missing} from the study file",
            remedy="Call this method on the study that tune() returned, in the same process.",
        )
    options = recorded_options(record, **machine_options_here(record), class_weight=class_weight)
    choice = recorded_model(
        dict(record.spec),
        record.optimizer,
        script=record.arguments.script,
        module=access.module,
        trust_code=access.trust_code,
    )
    return SearchCall(choice, _source_of(access, choice, options.rows), options)


def _check_refittable(access: Access) -> None:
    """Raise InputError if a study holds scikit-learn estimators or a custom training loop, which
    gputune cannot train again."""
    record = access.study.record
    if record.face == "sklearn":
        kind = f"{record.method}, which searched scikit-learn estimators"
        remedy = "Its best_estimator_ is the model."
    elif record.face == "loop":
        kind = "search(), because its training loop is your own"
        remedy = "Call your objective with study.best_params."
    else:
        return
    raise InputError(None, f"{access.called}() cannot refit a study of {kind}", remedy=remedy)


def _source_of(access: Access, choice: ModelChoice, rows: RowOptions) -> Source:
    """Return the rows that the user passed, or read the study's own rows again.

    Raises InputError if the study's rows are not available.
    """
    if access.X is not None:
        source = read_rows(choice, rows, access.X, access.y)
        # The search did not read the groups as a feature either.
        groups = access.study.record.group_column
        if groups is not None and isinstance(source.X, Table) and groups in source.X.names:
            values = source.X.column(groups)
            source = replace(source, X=source.X.drop(groups), groups=values)
        return source
    origin = access.study.record.source
    if origin is None:
        raise InputError(
            None,
            f"{access} needs X and y, because the search had its data in memory, and the study "
            "file does not hold them",
        )
    try:
        return read_again(origin, module=choice.takes_arrays)
    except FileNotFoundError as error:
        raise InputError(
            None,
            f"{per_interface(str(access), access.called)} cannot read {origin['path']!r} again, "
            "because the file is gone",
            remedy=per_interface("Pass X and y.", "Put the file back."),
        ) from error
