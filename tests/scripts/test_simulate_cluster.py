"""The simulation of a cluster: exact where it can be reckoned by hand, and fed with what was measured."""

import re

import pytest

pytest.importorskip("ray", reason='Ray is not installed: pip install "gputune[ray]"')


@pytest.fixture
def cluster(script):
    return script("simulate_cluster")


def measured(cluster, **costs):
    free = {"driver": 1e-9, "trip": 0.0, "start": 0.0, "data_bytes": 0, "result_bytes": 0}
    return cluster.Measured(chunks=(2.0,), **{**free, **costs})


def test_starts_and_round_trips_are_added_and_workers_that_cost_nothing_train_all_the_time(cluster):
    for workers in (1, 10, 1000):
        found = cluster.simulate(measured(cluster), workers, bandwidth=1e9)
        assert found == pytest.approx((2 * cluster.PER_WORKER, 1), rel=1e-5)
    seconds, share = cluster.simulate(measured(cluster, trip=0.5, start=3.0), 10, bandwidth=1e9)
    assert seconds == pytest.approx(3 + 2.5 * cluster.PER_WORKER, rel=1e-5)
    assert share == pytest.approx(2 * cluster.PER_WORKER / seconds)
    assert measured(cluster, trip=0.5).scheduling == pytest.approx(0.2)


def test_too_many_workers_wait_for_the_one_process(cluster):
    busy = measured(cluster, driver=0.02)
    assert busy.most_workers == pytest.approx(100)
    assert cluster.simulate(busy, 50, bandwidth=1e9)[1] > 0.9
    seconds, share = cluster.simulate(busy, 1000, bandwidth=1e9)
    assert seconds == pytest.approx(0.02 * 1000 * cluster.PER_WORKER, rel=0.01)  # its hands are never still
    assert share == pytest.approx(0.1, rel=0.01)


@pytest.mark.long
def test_a_search_is_measured_and_reported(cluster):
    with cluster.connected(2):
        found = cluster.measure(trials=7, epochs=1)
    assert len(found.chunks) >= 2 and min(found.chunks) > 0
    assert found.driver > 0 and found.trip > 0 and found.start > 0
    # 1797 rows of some 60 numbers that vary; a score for each of five folds.
    assert found.data_bytes > 1797 * 60 * 4 and found.result_bytes == 5 * 8
    text = cluster.report(found, bandwidth=125e6)
    rows = re.findall(r"^ +(\d+) +(\d+\.\d) +(\d+\.\d)% +(\d+\.\d)$", text, re.M)
    assert [int(row[0]) for row in rows] == list(cluster.SIZES)
    assert all(float(share) <= 100 for _, _, share, _ in rows)
