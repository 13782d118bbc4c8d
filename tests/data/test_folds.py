"""Folds and rows kept apart: in proportion, whole groups, by the seed or the last ones; bad ones
are refused."""

import hashlib
import math
import warnings

import numpy as np
import pytest
import torch
from sklearn.model_selection import (
    GroupKFold,
    GroupShuffleSplit,
    KFold,
    LeaveOneGroupOut,
    PredefinedSplit,
    RepeatedStratifiedKFold,
    ShuffleSplit,
    StratifiedKFold,
    StratifiedShuffleSplit,
    TimeSeriesSplit,
)

from gputune.data.folds import hold_out, make_folds, parse_cv
from gputune.data.target import check_target
from refused import refused

N = 40
CLASSES = check_target(np.tile(["a", "b", "a", "a", "a", "a", "b", "a"], 5), n_rows=N)
NUMBERS = check_target(np.linspace(0, 1, N), n_rows=N)
GROUPS = np.repeat(np.arange(8), 5)


def folds(cv, target=CLASSES, groups=None, seed=0):
    return make_folds(cv, target, groups=groups, seed=seed)


def equal(a, b):
    return len(a) == len(b) and all(
        np.array_equal(x, y) for p, q in zip(a, b) for x, y in zip(p, q)
    )


@pytest.mark.parametrize("target", [CLASSES, NUMBERS])
@pytest.mark.parametrize("groups", [None, GROUPS])
@pytest.mark.parametrize("cv", [2, 5, np.int64(3)])
def test_an_int_partitions_the_rows(cv, target, groups):
    made = folds(cv, target, groups)
    assert len(made) == cv and np.array_equal(
        np.sort(np.concatenate([valid for _, valid in made])), np.arange(N)
    )
    for train, valid in made:
        assert train.dtype == valid.dtype == np.int64
        assert np.array_equal(np.sort(np.concatenate([train, valid])), np.arange(N))
        if groups is not None:
            assert not set(groups[train]) & set(groups[valid])


def test_an_int_is_shuffled_only_by_the_seed():
    assert equal(folds(5), folds(5))
    assert equal(folds(5, groups=GROUPS), folds(5, groups=GROUPS))
    for target in (CLASSES, NUMBERS):
        for groups in (None, GROUPS):
            assert not equal(folds(4, target, groups, seed=0), folds(4, target, groups, seed=1))
    assert not equal(folds(5, NUMBERS), list(KFold(5).split(np.zeros(N))))
    assert folds(5, seed=2**40)


def test_an_int_is_stratified_for_classes():
    for _, valid in folds(5):
        assert np.bincount(CLASSES.values[valid]).tolist() == [6, 2]


def test_splitters_are_taken_as_they_are():
    repeated = RepeatedStratifiedKFold(n_splits=2, n_repeats=2, random_state=0)
    for cv in (KFold(3), TimeSeriesSplit(4), StratifiedKFold(2), repeated):
        assert equal(folds(cv), list(cv.split(np.zeros((N, 1)), CLASSES.labels)))
    assert equal(
        folds(LeaveOneGroupOut(), groups=GROUPS),
        list(LeaveOneGroupOut().split(np.zeros(N), groups=GROUPS)),
    )
    names = [f"g{group}" for group in GROUPS]
    assert equal(folds(4, groups=names), folds(4, groups=np.array(names, dtype=object)))
    assert equal(folds(4, groups=torch.tensor(GROUPS)), folds(4, groups=GROUPS))


def test_iterables():
    expected = list(KFold(3).split(np.zeros(N)))
    assert equal(folds(iter(expected)), expected)
    assert equal(folds([(train.tolist(), valid.tolist()) for train, valid in expected]), expected)
    masks = [
        (np.isin(np.arange(N), train), np.isin(np.arange(N), valid)) for train, valid in expected
    ]
    assert equal(folds(masks), expected)
    first, last = slice(0, 20), slice(20, None)
    halves = [(np.arange(20), np.arange(20, N)), (np.arange(20, N), np.arange(20))]
    for cv in ([(first, last), (last, first)], ((first, last), (last, first))):
        assert equal(folds(cv), halves)
    assert equal(folds((first, last)), halves[:1])
    assert equal(
        folds(PredefinedSplit(np.arange(N) % 2)), list(PredefinedSplit(np.arange(N) % 2).split())
    )


def test_a_rare_class_is_one_warning_of_ours():
    target = check_target(np.repeat(["a", "b", "c"], [33, 3, 4]), n_rows=N, name="kind")
    for cv in (5, StratifiedKFold(5)):
        with pytest.warns(UserWarning) as caught:
            assert len(folds(cv, target)) == 5
        assert [str(warning.message) for warning in caught] == [
            "kind has classes with fewer rows than the 5 folds: 'b' (3), 'c' (4). "
            "Some folds have no validation row of these classes."
        ]
    with pytest.warns(
        UserWarning,
        match=r"1 of 5 folds \(the first is fold 4\) train without rows of a class \('b', 'c' in",
    ):
        folds(KFold(5), target)
    with warnings.catch_warnings(action="error"):
        folds(KFold(5, shuffle=True, random_state=0), target)


def test_validation_on_training_rows_is_a_warning():
    with pytest.warns(
        UserWarning,
        match=r"1 of 2 folds \(the first is fold 1\) validate on rows that they train on",
    ):
        folds([(range(20), range(20, 40)), (range(25), range(20, 40))])


KEPT = (np.arange(20), np.arange(20, N))


@pytest.mark.parametrize(
    ("cv", "name", "fold", "group"),
    [
        (KFold(3), r"cv=KFold\(...\)", 0, "2"),
        (StratifiedKFold(3), r"cv=StratifiedKFold\(...\)", 0, "2"),
        (ShuffleSplit(1, random_state=0), r"cv=ShuffleSplit\(...\)", 0, "[0-7] .and . more."),
        (PredefinedSplit(np.arange(N) % 2), r"cv=PredefinedSplit\(...\)", 0, "[0-7] .and . more."),
        ([KEPT, (np.arange(22), np.arange(22, N))], "cv", 1, "4"),
    ],
)
def test_a_group_on_both_sides_of_a_fold_is_refused(cv, name, fold, group):
    message = (
        f"{name} must not split a group, but in fold {fold} the group {group} has training and "
        "validation rows. Pass .*such as GroupKFold"
    )
    with refused(message):
        folds(cv, groups=GROUPS)


def test_what_keeps_groups_whole_is_taken():
    assert equal(folds([KEPT], groups=GROUPS), [KEPT])
    assert len(folds(GroupKFold(4), groups=GROUPS)) == 4
    mixed = [f"g{group}" if group % 2 else int(group) for group in GROUPS]
    with refused("the group 'g1' has training and"):
        folds([(range(8), range(8, N))], groups=np.array(mixed, dtype=object))
    # KFold's own words on groups: here they are kept by chance
    with warnings.catch_warnings(action="error"):
        folds(KFold(2), groups=GROUPS)


def test_a_splitter_sees_the_rows_and_the_target():
    class ByTime:
        def split(self, X, y=None, groups=None):
            assert len(X) == len(y) == N and set(y) == {"a", "b"}
            order = np.argsort(X[:, 1])
            yield order.reshape(2, N // 2)  # two of anything are a pair

    time = np.random.default_rng(0).permutation(N)
    made = make_folds(ByTime(), CLASSES, X=np.stack([np.zeros(N), time], 1), seed=0)
    assert time[made[0][0]].max() < time[made[0][1]].min()


@pytest.mark.parametrize(
    ("cv", "groups", "message"),
    [
        *[(cv, None, f"cv must be at least 2 folds, got {cv}") for cv in (1, 0)],
        (41, None, "cv must not be larger than the number of rows, 40, got 41"),
        (9, GROUPS, "cv must not be larger than the number of groups, 8, got 9. Use cv=8"),
        (35, None, r"cannot split these 40 rows: .*n_splits=35"),
        *[
            (
                cv,
                None,
                f"cv must be a number of folds, a scikit-learn splitter, 'time:5' .*got {cv!r}",
            )
            for cv in (True, 2.5, "5", None)
        ],
        ([], None, "at least one fold"),
        ([1, 2], None, "pairs of .train, valid. rows, got int for fold 0"),
        (
            [np.arange(30), np.arange(30, 40)],
            None,
            r"got ndarray for fold 0. For a single split, pass cv=\(train, valid\)\.$",
        ),
        (([], [1]), None, "cv gives no training rows for fold 0"),
        ((np.zeros((3, 2)), [1]), None, "pairs of .train, valid. rows, got ndarray for fold 0"),
        ([([0], [1], [2])], None, "pairs of .train, valid. rows, got tuple for fold 0"),
        ([([], [1])], None, "cv gives no training rows for fold 0"),
        ([([0], [1]), ([0], [])], None, "cv gives no validation rows for fold 1"),
        ([([0], [40])], None, r"The validation rows of fold 0 must lie in 0..39, got 40"),
        ([([-1, 3], [5])], None, r"The training rows of fold 0 must lie in 0..39, got -1"),
        ([([0.5], [1])], None, "must be positions or a mask, got float64"),
        ([([[0]], [1])], None, r"positions or a mask, got int64 of shape \(1, 1\)"),
        (
            [([True, False], [1])],
            None,
            "training mask of fold 0 must have one value for each of the 40 rows",
        ),
        ([(np.zeros(N, dtype=bool), [1])], None, "with 0 selected"),
        (GroupKFold(3), None, "splits by groups, so groups is needed"),
        (LeaveOneGroupOut(), None, "splits by groups, so groups is needed"),
        (GroupKFold(9), GROUPS, "cannot split these 40 rows: .*n_splits=9"),
        (KFold(41), None, "cannot split these 40 rows: .*n_splits=41"),
        (2, [1, 2, 3], r"groups must have one value per row, shape \(40,\), got shape \(3,\)"),
        (2, ["a", None, np.nan, *"b" * 37], r"groups has 2 missing values \(the first in row 1\)"),
        (
            2,
            ["a"] * 40,
            "groups must have at least two different values, got only 'a'.* another col",
        ),
        (2, [1.0] * 40, r"groups must have at least two different values, got only 1\. Leave out"),
        (2, [np.nan, *range(39)], r"groups has 1 missing value \(the first in row 0\)"),
    ],
)
def test_bad_folds(cv, groups, message):
    with refused(message):
        folds(cv, groups=groups)


MASK = np.arange(N) < 30


@pytest.mark.parametrize(
    "split",
    [
        (np.arange(30), np.arange(30, 40)),
        (list(range(30)), range(30, 40)),
        (torch.arange(30), torch.arange(30, 40)),
        (MASK, ~MASK),
        (slice(30), slice(30, None)),
    ],
)
def test_a_tuple_of_training_and_validation_rows_is_one_fold(split):
    assert equal(folds(split), folds([split]))
    assert len(folds(split)) == 1


def test_a_tuple_of_two_pairs_is_two_folds():
    pairs = (([0, 1], [2]), ([2, 3], [4]))
    assert equal(folds(pairs, NUMBERS), folds(list(pairs), NUMBERS))
    assert len(folds(pairs, NUMBERS)) == 2


def test_the_command_line():
    assert parse_cv("5") == 5
    splitter = parse_cv("time:4")
    assert isinstance(splitter, TimeSeriesSplit) and splitter.get_n_splits() == 4
    for text in ("", "1", "x", "2.5", "-3", "time:1", "time:", "time", "group:5", "5:"):
        with refused(
            "cv must be the number of folds, such as 5, or a time series split, such as time:5, "
            f"with at least 2 folds, got {text!r}"
        ):
            parse_cv(text)


def held_out(target=CLASSES, *, test_size=0.2, groups=None, cv=5, seed=0):
    rest, test = hold_out(target, test_size=test_size, groups=groups, cv=cv, seed=seed)
    gap = cv.gap if isinstance(cv, TimeSeriesSplit) else 0
    assert rest.dtype == test.dtype == np.int64
    assert len(rest) + len(test) == len(np.union1d(rest, test)) == N - gap
    assert (np.diff(rest) > 0).all() and (np.diff(test) > 0).all()
    return rest, test


def test_classes_are_kept_in_proportion_and_numbers_drawn_by_the_seed():
    assert np.bincount(CLASSES.values[held_out()[1]]).tolist() == [6, 2]
    _, test = held_out(NUMBERS)
    assert len(test) == 8 and np.array_equal(test, held_out(NUMBERS)[1])
    assert not np.array_equal(test, held_out(NUMBERS, seed=1)[1])
    assert not np.array_equal(held_out()[1], held_out(seed=1)[1])
    assert len(held_out(NUMBERS, test_size=0.21)[1]) == 9


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize(
    ("target", "splitter", "groups"),
    [
        (CLASSES, StratifiedShuffleSplit, None),
        (NUMBERS, ShuffleSplit, None),
        (NUMBERS, GroupShuffleSplit, GROUPS),
    ],
)
def test_they_are_found_again_by_what_is_documented(target, splitter, groups, seed):
    digest = hashlib.blake2b(f"{seed}/hold out".encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "little") // 2 % 2**32
    size = math.ceil(0.2 * N) if groups is None else 0.2
    found = next(
        splitter(1, test_size=size, random_state=number).split(np.zeros(N), target.labels, groups)
    )
    assert number == 2483452753 or seed
    for rows, there in zip(held_out(target, groups=groups, seed=seed), found):
        assert np.array_equal(rows, np.sort(there))


@pytest.mark.parametrize("target", [CLASSES, NUMBERS])
def test_groups_stay_whole(target):
    rest, test = held_out(target, groups=[f"g{group}" for group in GROUPS])
    assert len(test) == 10
    assert not set(GROUPS[rest]) & set(GROUPS[test])


def test_a_time_series_keeps_its_last_rows():
    assert equal([held_out(NUMBERS, cv=TimeSeriesSplit(3))], [(np.arange(32), np.arange(32, 40))])
    assert np.array_equal(held_out(cv=TimeSeriesSplit(3, gap=4))[0], np.arange(28))


def test_the_only_row_of_a_class_is_not_kept_apart_and_size_zero_keeps_none():
    y = check_target(np.repeat(["a", "b", "c"], [29, 10, 1]), n_rows=N)
    assert all(39 in held_out(y, seed=seed)[0] for seed in range(5))
    assert equal([held_out(test_size=0)], [(np.arange(N), [])])


BAD_SIZES = [1, 1.0, 1.5, -0.1, np.nan, "0.2", True, None]


@pytest.mark.parametrize(
    ("target", "options", "words"),
    [
        *[
            (NUMBERS, {"test_size": size}, "test_size must be a share of the rows, at least 0 and")
            for size in BAD_SIZES
        ],
        (NUMBERS, {"test_size": 0.99}, r"test_size=0\.99 leaves none of the 40 rows"),
        (
            NUMBERS,
            {"test_size": 0.99, "cv": TimeSeriesSplit(2)},
            r"test_size=0\.99 leaves none of the 40 rows",
        ),
        (
            NUMBERS,
            {"test_size": 0.95, "groups": GROUPS},
            r"test_size=0\.95 leaves none of the 8 groups",
        ),
        (
            NUMBERS,
            {"test_size": 0.8, "groups": GROUPS},
            r"test_size=0\.8 leaves only one of the 8 groups for the search, but its folds need "
            r"two\. Use a smaller share, or test_size=0, which holds out no rows\.",
        ),
        (
            NUMBERS,
            {"test_size": 0.2, "groups": GROUPS % 2},
            r"test_size=0\.2 leaves only one of the 2 groups .* two\. Use test_size=0, which holds",
        ),
        (
            CLASSES,
            {"test_size": 0.01},
            "would hold out 1 of 40 rows, so the 2 classes cannot",
        ),
        (CLASSES, {"test_size": 0.99}, "would hold out 40 of 40 rows"),
        (NUMBERS, {"test_size": 0.2, "groups": [1, 2]}, "groups must have one value per row"),
        (
            NUMBERS,
            {"test_size": 0.2, "groups": GROUPS, "cv": TimeSeriesSplit(2)},
            "cannot be used with a time ser",
        ),
    ],
)
def test_rows_that_cannot_be_kept_apart(target, options, words):
    with refused(words):
        hold_out(target, **options, seed=0)


def test_a_time_split_with_too_many_folds_names_the_largest_number():
    target = check_target(np.arange(48) + 0.5, n_rows=48)
    with refused(
        r"^cv='time:60' cannot split these 48 rows: it needs at least 61 rows. Use at most "
    ):
        make_folds(parse_cv("time:60"), target, seed=0)
    assert len(make_folds(parse_cv("time:47"), target, seed=0)) == 47
