"""A study of a class of a script trains its best model in other programs too."""

import json
import subprocess
import sys

import pytest

from moments import environment

SCRIPT = """
import sys
import numpy as np
from torch import nn
import gputune

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return self.layer(x)

def make():
    return Net()

X = np.random.default_rng(0).normal(size=(40, 3)).astype("float32")
y = (X[:, 0] > 0).astype(int)
sys.runs = [*getattr(sys, "runs", ()), __name__]

if __name__ == "__main__":
    options = {"n_trials": 1, "max_epochs": 1, "cv": 2, "verbose": 0, "workers": 1}
    gputune.tune(Net, X, y, study="net", **options)
    gputune.tune(make, X, y, study="make", **options)
"""

OTHER = """
import importlib, json, os, sys
import numpy as np
from torch import nn
import gputune

X = np.random.default_rng(0).normal(size=(40, 3)).astype("float32")
y = (X[:, 0] > 0).astype(int)
sys.runs = []
answers = {}

def best(case, study, **options):
    try:
        found = type(gputune.Study.open(study).best_model(X, y, **options).module).__module__
        answers[case] = [found.partition("_file_")[0]]
    except gputune.InputError as error:
        answers[case] = [type(error).__name__, str(error)]
    answers[case].append(len(sys.runs))

best("not trusted", "net")
sys.path.insert(0, os.getcwd())
import script
best("imported", "net")
best("imported function", "make")
best("imported function, trusted", "make", trust_code=True)
del sys.modules["script"]
best("trusted", "net", trust_code=True)
best("function", "make", trust_code=True)

class Net(nn.Module):
    def forward(self, x):
        return x

best("other class", "net")
os.rename("script.py", "moved.py")
best("moved", "net", trust_code=True)
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scripts")
    (folder / "script.py").write_text(SCRIPT)
    (folder / "other.py").write_text(OTHER)
    for file in ("script.py", "other.py"):
        done = subprocess.run(
            [sys.executable, "-P", file],
            cwd=folder,
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert not done.returncode, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("case", "module", "runs"),
    [
        ("imported", "script", 1),
        ("imported function, trusted", "script", 1),
        ("trusted", "gputune", 2),
        ("function", "gputune", 2),
    ],
)
def test_the_class_is_imported_or_its_script_runs_with_permission(answers, case, module, runs):
    assert answers[case] == [module, runs]


UNTRUSTED = (
    "is in '{}script.py', and loading it runs that code. Import the class into this program, pass "
    "it to load_model(folder, module=Net), or pass trust_code=True if you trust the code."
)


@pytest.mark.parametrize(
    ("case", "error", "message", "runs"),
    [
        ("not trusted", "UntrustedCodeError", UNTRUSTED, 0),
        ("imported function", "UntrustedCodeError", UNTRUSTED, 1),
        ("other class", "UntrustedCodeError", UNTRUSTED, 2),
        (
            "moved",
            "InputError",
            "model names the file '{}script.py', which does not exist. Check the path.",
            2,
        ),
    ],
)
def test_the_message_says_what_to_do(answers, case, error, message, runs):
    kind, text, n_runs = answers[case]
    begin, _, end = message.partition("{}")
    assert kind == error
    assert n_runs == runs
    assert begin in text
    assert text.endswith(end)
