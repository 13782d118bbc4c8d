"""The searches of an earlier commit; their studies and models must open, resume and predict.

``tests/study/commit_3592e8d5.zip`` holds the files of that commit. To make such an archive for the
commit that is checked out: ``python tests/older_commit.py ARCHIVE.zip``. Each search runs twice:
once to its end, and once until a SIGKILL in the middle of its third trial.
"""

import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

import gputune

NET = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, n_features, n_outputs, hidden=4):
        super().__init__()
        self.first = nn.Linear(n_features, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.last = nn.Linear(hidden, n_outputs)

    def forward(self, x):
        return self.last(torch.tanh(self.norm(self.first(x))))
"""

_SMALL = (
    "--trials 5 --epochs 6 --cv 3 --scoring neg_log_loss --workers 1 --memory 1KB --quiet".split()
)
_MODULE = [
    "--model",
    "net.py:Net",
    "--space",
    "lr=1e-3..1e-1:log",
    "module__hidden=4,8",
    "--dtype",
    "float64",
]

COMMANDS = {
    "mlp": [*_SMALL, "--space", "lr=1e-3..1e-1:log", "width=4,8", "optimizer=adamw,sgd"],
    "halving": [
        *_SMALL,
        "--method",
        "halving",
        "--min-epochs",
        "2",
        "--factor",
        "2",
        "--space",
        "width=4,8,16",
    ],
    "module": [*_SMALL, *_MODULE],
}
"""The options of each search of the command line on ``sklearn:iris``."""

IMPORTED = {
    "space": {"lr": [0.003, 0.01, 0.03, 0.1], "module__hidden": [4, 8]},
    "n_trials": 5,
    "max_epochs": 6,
    "cv": 3,
    "scoring": "neg_log_loss",
    "dtype": "float64",
    "workers": 1,
    "memory": 1024,
    "verbose": 0,
}
"""The arguments of the search of the class ``older_net:Net``, which is imported."""


def objective(params, report):
    """A custom training loop with a curve."""
    for epoch in range(1, 4):
        score = -((params["x"] - 1.0) ** 2) - 1.0 / epoch
        report(score)
    return score


LOOP = {
    "direction": "maximize",
    "space": {"x": [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]},
    "n_trials": 5,
    "workers": 1,
    "verbose": 0,
}
"""The arguments of the search of a custom training loop."""


def table(study):
    """Return everything that the trials of a study say except their times, as JSON holds it."""
    trials = [
        {
            "params": trial.params,
            "state": trial.state,
            "best_epoch": trial.best_epoch,
            "scores": [trial.score, *trial.fold_scores],
            "curve": curve.tolist(),
        }
        for trial, curve in zip(study.trials, study.curves, strict=True)
    ]
    return json.loads(json.dumps(trials))


def machine():
    """Return the facts that the bits of a training depend on: the processor, the compiler and the
    versions.
    """
    processor = ""
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = ("model name", "flags")
        processor = "\n".join(
            next((line for line in lines if line.startswith(name)), "") for name in names
        )
    compiler = shutil.which("cc")
    version = (
        subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
        if compiler
        else ""
    )
    facts = [platform.machine(), processor, version, torch.__version__, np.__version__]
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()


_RUN = """
import os, signal, sys
sys.path.insert(0, os.getcwd())
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from gputune.engine import checkpoint
from gputune.engine.checkpoint import CheckpointFolder
from gputune.study.store import Store
kill_at = {kill_at}
count = 0
def counted(owner, name):
    original = getattr(owner, name)
    def call(*arguments, **options):
        global count
        result = original(*arguments, **options)
        count += 1
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, call)
if kill_at:
    checkpoint._WRITING_SHARE = 0
    counted({owner}, {method!r})
{work}
"""


def _run(work, kill_at=0, owner="CheckpointFolder", method="write"):
    tests = str(Path(__file__).parent)
    script = _RUN.format(work=work, kill_at=kill_at, tests=tests, owner=owner, method=method)
    done = subprocess.run([sys.executable, "-P", "-c", script], check=False)
    assert done.returncode == (-signal.SIGKILL if kill_at else 0), done


def _run_twice(name, work, kill_at, **killed):
    """Run a search to its end in NAME/finished, and until it is killed in NAME/partly."""
    _run(work.replace("FOLDER", f"{name}/finished"))
    _run(work.replace("FOLDER", f"{name}/partly"), kill_at, **killed)


def make(archive):
    """Write the archive of the commit that is checked out."""
    archive = Path(archive).resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("net.py").write_text(NET)
        Path("older_net.py").write_text(NET)
        for name, options in COMMANDS.items():
            typed = [
                "tune",
                "sklearn:iris",
                *options,
                "--checkpoint-seconds",
                "1e-9",
                "--out",
                "FOLDER",
            ]
            kill_at = 6 if name == "halving" else 13
            _run_twice(
                name, f"from gputune.cli.main import main; assert main({typed!r}) == 0", kill_at
            )
        for name in ("imported", "loop"):
            Path(name).mkdir()
            for part in ("finished", "partly"):
                Path(name, part).mkdir()
        _run_twice(
            "imported",
            "import gputune, older_net, older_commit\n"
            "study = 'FOLDER/study.db'\n"
            "gputune.tune(older_net.Net, 'sklearn:iris', study=study, checkpoint_seconds=1e-9, "
            "**older_commit.IMPORTED)",
            kill_at=13,
        )
        _run_twice(
            "loop",
            "import gputune, older_commit\n"
            "study = 'FOLDER/study.db'\n"
            "gputune.search(older_commit.objective, study=study, **older_commit.LOOP)",
            kill_at=2,
            owner="Store",
            method="finish",
        )
        expected = {
            "machine": machine(),
            "folder": folder,
            "tables": {},
            "partly": {},
            "predictions": {},
        }
        for study in sorted(Path().glob("*/*/study.db")):
            opened = gputune.Study.open(study)
            expected["tables" if study.parent.name == "finished" else "partly"][study.parts[0]] = (
                table(opened)
            )
        for name in COMMANDS:
            model = gputune.load_model(f"{name}/finished/model", trust_code=True)
            expected["predictions"][name] = model.predict_proba(rows()).tolist()
        Path("expected.json").write_text(json.dumps(expected))
        for extra in (*Path().glob("*/*/*.lock"), *Path().glob("*/*/*.progress")):
            extra.unlink()
        shutil.rmtree("__pycache__", ignore_errors=True)
        for path in sorted(Path().rglob("*")):
            print(path, path.stat().st_size)
        shutil.make_archive(str(archive.with_suffix("")), "zip", ".")
        os.chdir("/")


def rows():
    """Return twelve rows of iris, in the units of the file."""
    from sklearn.datasets import load_iris

    return load_iris(as_frame=True).data[::13]


if __name__ == "__main__":
    make(sys.argv[1])
