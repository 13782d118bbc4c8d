"""The options of a search on the devices and processes, the study file and the output.

The checks import slow modules only when they run, because ``gputune --help`` reads this file and
must not wait for torch.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from gputune.engine.backends.table import backend_words
from gputune.ground.types import BackendWord, Precision
from gputune.tuning import checks
from gputune.tuning.rules import COMPUTE, OUTPUT, OptionGroup, option_field

if TYPE_CHECKING:
    import torch

    from gputune.executors.cluster import Cluster
    from gputune.tuning.callbacks import Callback

_compute = partial(option_field, group=COMPUTE)
_output = partial(option_field, group=OUTPUT)


@dataclass(frozen=True, kw_only=True)
class MachineOptions(OptionGroup):
    """The options on the devices and processes, the study file and the output."""

    device: str = _compute(
        "auto",
        "--device <NAME>",
        "Device to train on",
        "auto uses a GPU for long training, and cuda uses all GPUs of the machine.",
        "auto",
        values=("auto", "cpu", "cuda", "cuda:INDEX"),
        stored=True,
        resume="A different device; results are then equal up to rounding",
    )
    backend: BackendWord = _compute(
        "auto",
        "--backend <NAME>",
        "How the members are trained",
        "kernel: a kernel on a GPU. compiled: compiled code on a CPU. recorded: record one step "
        "and replay it. eager: operations on stacked tensors. loop: train one member after "
        "another. stacked: stack the members of your module, recorded or eager, and raise an "
        "error if they cannot be stacked.",
        "auto",
        values=backend_words(),
        check=checks.backend,
        stored=True,
        resume=True,
    )
    dtype: str = _compute(
        "float32",
        "--dtype <NAME>",
        "Number format of the training",
        default="float32",
        values=("float32", "float64"),
        check=checks.one_of("float32", "float64"),
        stored=True,
    )
    tf32: bool = _compute(
        False,
        "--tf32",
        "Multiply matrices faster on a GPU, with fewer bits",
        stored=True,
    )
    precision: Precision = _compute(
        "full",
        "--precision <NAME>",
        "Precision of a module in training",
        "bf16 computes matrix products and convolutions in bfloat16.",
        "full",
        choices=("full", "bf16"),
        check=checks.one_of("full", "bf16"),
        stored=True,
    )
    memory: int | str | None = _compute(
        None,
        "--memory <SIZE>",
        "Device memory that trials may use while they train together, such as 8GB",
        default="chosen for the device",
        check=checks.memory,
        stored=True,
        resume="Device memory that new trials may use while they train together",
    )
    workers: "int | Literal['auto'] | Cluster" = _compute(
        "auto",
        "--workers <INT>",
        "Number of processes on a CPU",
        default="auto",
        takes="workers",
        values=("auto", "an integer from 1"),
        check=checks.workers,
        stored=True,
        resume=True,
    )
    study: Path | None = option_field(None, check=checks.path)
    checkpoint_seconds: float = _output(
        60,
        "--checkpoint-seconds <SECONDS>",
        "Interval between checkpoints",
        "The checkpoints are in the folder study.db.state. If the process is killed, at most this "
        "much training plus one epoch is repeated.",
        "60",
        takes="number",
        check=checks.seconds,
        stored=True,
        resume=True,
    )
    keep_predictions: bool = _output(
        True,
        "--no-predictions",
        "Do not store the predictions of validation rows",
        "Without stored predictions, ensembles and calibration train trials again.",
        "store them",
        check=checks.one_of(True, False),
        stored=True,
        resume=True,
    )
    callbacks: "tuple[Callback, ...]" = option_field((), check=checks.callbacks)
    verbose: int = option_field(1, check=checks.verbosity)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cluster is not None:
            self.cluster.check(self.device)
        device = self.device_here()
        if self.tf32 is not False:
            from gputune.engine.backend import check_tf32

            check_tf32(self.tf32, self.dtype, self.workers, device)

    @property
    def cluster(self) -> "Cluster | None":
        """The cluster that trains the trials (``workers="ray"``), or None."""
        from gputune.executors.cluster import Cluster

        return self.workers if isinstance(self.workers, Cluster) else None

    def device_here(self) -> "torch.device":
        """Return the device that this process uses.

        In a search on a cluster, the option ``device`` names the device of the cluster's tasks.
        This process then uses any available device.
        """
        from gputune.engine.backend import choose_device

        return choose_device(self.device if self.cluster is None else "auto")
