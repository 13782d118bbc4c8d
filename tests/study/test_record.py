"""The record of a search: what a file lacks, what must stay the same, and what a checkpoint's digest is of."""

import pytest

from gputune.errors import StudyCorruptError
from gputune.study.record import IDENTITY, PARTS, SearchRecord, has_form, lost_option
from made_studies import META

LATER = ("positive", "objective", "code", "target_transform", "metrics", "patience", "max_levels")


def test_a_record_gives_its_options_back():
    record = SearchRecord.from_json({**META, "of_a_later_version": 1})
    assert record.to_json() == META and record.scoring == "accuracy" and not record.lost
    assert record.absent == {*LATER, "face", "distributions", "arguments", "baseline"}


def test_what_a_damaged_file_lacks_is_said_and_is_empty_as_what_no_descent_has():
    record = SearchRecord.from_json({"model": "mlp"})
    assert record.to_json() == {"model": "mlp"}
    assert (record.method_name, record.descended, record.folds, record.seed) == ("", [], 0, None)
    assert record.lost == [name for name in IDENTITY if name not in LATER]
    with pytest.raises(StudyCorruptError, match=r"study 'a\.db' has lost the option 'seed' .*open\('a\.db'\)"):
        raise lost_option("a.db", "seed")
    with pytest.raises(StudyCorruptError, match="study has lost the option 'seed' of its search. Its trials"):
        raise lost_option(None, "seed")
    method = {"name": "hypergradient", "hyperparameters": ("lr", "momentum")}
    assert SearchRecord(method=method).descended == ["lr", "momentum"]
    assert SearchRecord(method=method, optimizer="exact").descended == ["C"]


def test_the_order_in_which_a_checkpoint_digests_a_search_stays():
    training = "spec optimizer schedule task target_transform fingerprint columns numbers class_weight sample_weight"
    training += " splits objective scoring positive max_epochs seed dtype"
    assert [name for name, part in PARTS.items() if part.training] == training.split()
    others = {"target", "space", "method", "epoch", "patience", "metrics", "code", "max_levels"}
    assert {*IDENTITY} - {*training.split()} == others


def test_whole_numbers_have_64_bits():
    assert all(has_form(value, [int]) for value in ([], [3, -(2**63)], (2**63 - 1,)))
    assert not any(has_form(value, [int]) for value in ([1, 2**63], [1, True], 1))
