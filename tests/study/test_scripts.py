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
from gputune.tuning import record

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
    record.script_of = lambda module_class: None
    gputune.tune(Net, X, y, study="older", **options)
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
best("older", "older", trust_code=True)
sys.path.insert(0, os.getcwd())
import script
best("imported", "net")
best("imported, older", "older")
best("imported function", "make")
del sys.modules["script"]
source = open("script.py").read()
os.rename("script.py", "moved.py")
best("moved", "net", trust_code=True)
open("script.py", "w").write(source.replace("super()", "super( )"))
best("changed", "net", trust_code=True)
os.replace("moved.py", "script.py")
best("trusted", "net", trust_code=True)
best("function", "make", trust_code=True)

class Net(nn.Module):
    def forward(self, x):
        return x

for name in [name for name in sys.modules if name.startswith("gputune_file_")]:
    del sys.modules[name]
best("other class", "net")
best("other class, trusted", "net", trust_code=True)
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
            env=environment(XDG_STATE_HOME=str(folder / "state")),
            capture_output=True,
            text=True,
            check=False,
        )
        assert not done.returncode, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("case", "module", "runs"),
    [
        ("trusted", "gputune", 3),  # after the import and the changed script
        ("function", "gputune", 3),
        ("imported", "script", 1),
        ("imported, older", "script", 1),
        ("imported function", "script", 1),
        ("other class, trusted", "gputune", 4),
    ],
)
def test_the_class_is_imported_or_its_script_runs_with_permission(answers, case, module, runs):
    assert answers[case] == [module, runs]


@pytest.mark.parametrize(
    ("case", "error", "message", "runs"),
    [
        (
            "not trusted",
            "UntrustedCodeError",
            "'Net' is in the script '{}script.py'. Loading it runs that script again, except the "
            'code under `if __name__ == "__main__":`. If you trust it, pass trust_code=True.',
            0,
        ),
        (
            "older",
            "InputError",
            "'Net' was defined in a script, in a notebook or at a prompt, and this program has no "
            "class of that name with the same source. The study or model does not say in which "
            "file it was. Import the class into this program, define it here, or continue in the "
            "program that has it.",
            0,
        ),
        (
            "moved",
            "InputError",
            "'Net' was defined in the script '{}script.py', which does not exist any more. Restore "
            "the script, or import the class with its old source into this program.",
            1,
        ),
        (
            "changed",
            "InputError",
            "'Net' of '{}script.py' has changed since the search began. Restore its source.",
            2,
        ),
        (
            "other class",
            "InputError",
            "'__main__:Net' has changed since the search began. Restore its source.",
            3,
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
