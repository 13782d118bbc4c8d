"""Searches of population based training give the tables that are kept in population.json.

In ``tests/``, ``python -m replay.test_population`` records the tables anew, where a change of
numbers is meant.
"""

import json
from pathlib import Path

import pytest
from scipy.stats import loguniform, uniform

import gputune
from problems import needs_compiled_code
from replay.searches import RATES, Net, study_table, tune, with_model
from replay.test_replay import assert_same, plain

TABLES = Path(__file__).with_name("population.json")
SPACE = {
    "lr": loguniform(1e-3, 1.0),
    "weight_decay": loguniform(1e-5, 1e-1),
    "dropout": uniform(0.05, 0.3),
    "batch_size": [7, 16],
    "width": [12],
}


def population(model="mlp", *, space=SPACE, interval=1, **options):
    method = gputune.PopulationBased(interval=interval)
    return tune(model, space=space, method=method, n_trials=6, **options)


def table(study):
    return study_table(study) | {"details": [trial.detail for trial in study.trials]}


def of_mlp(backend):
    study = population(backend=backend)
    return table(study) | {"predictions": with_model(study)["predictions"]}


SEARCHES = {
    "mlp compiled": lambda: of_mlp("compiled"),
    "mlp eager": lambda: of_mlp("eager"),
    "two intervals": lambda: table(population(interval=[1, 2], optimizer="sgd")),
    "module": lambda: table(population(Net, space=RATES | {"weight_decay": SPACE["weight_decay"]})),
}


@pytest.mark.usefixtures("recorded_on_cpu")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[needs_compiled_code] * (name == "mlp compiled"))
        for name in SEARCHES
    ],
)
def test_a_search_gives_the_table_that_is_kept(name):
    assert_same(plain(SEARCHES[name]()), json.loads(TABLES.read_text())[name], name)


def test_backends_agree():
    tables = json.loads(TABLES.read_text())
    assert list(tables) == list(SEARCHES)
    assert_same(tables["mlp eager"], tables["mlp compiled"], "mlp eager")
    assert any("copies" in detail for detail in tables["mlp compiled"]["details"])


def record():
    """Write the tables of all searches."""
    from gputune.modules.recorder import RECORDERS
    from stand_in import StandIn

    RECORDERS["cpu"] = StandIn
    lines = []
    for name, search in SEARCHES.items():
        lines.append(f"{json.dumps(name)}: {json.dumps(plain(search()))}")
    TABLES.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    record()
