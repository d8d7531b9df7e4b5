"""Faulty items are named, all of them; patients are split, never their images."""

import functools
import operator
import threading

import pytest

from dpkernels.training.reading import for_each, split_patients


def test_split_is_of_patients_disjoint_complete_and_fixed_by_the_seed():
    names = [f"p{i}" for i in range(20)]
    split = split_patients(names, 0.2, 0.1, seed=3)
    assert [len(split[part]) for part in ("train", "validation", "test")] == [14, 2, 4]
    assert sorted(functools.reduce(operator.iadd, split.values(), [])) == sorted(names)
    assert split == split_patients(names, 0.2, 0.1, seed=3)
    assert split != split_patients(names, 0.2, 0.1, seed=4)
    with pytest.raises(ValueError, match="none is left to train on"):
        split_patients(["a"], 0.2, 0.1, seed=0)


def test_a_validation_share_of_zero_leaves_nobody_out():
    split = split_patients([f"p{i}" for i in range(5)], 0.2, 0.0, seed=0)
    assert [len(split[part]) for part in ("train", "validation", "test")] == [4, 0, 1]
    assert all(names == sorted(names) for names in split.values())


def refuse(*faulty: int):
    def read(item: int) -> None:
        if item in faulty:
            raise ValueError(f"scan {item}: damaged")

    return read


def test_every_item_is_read_once():
    read, lock = [], threading.Lock()

    def action(item: int) -> None:
        with lock:
            read.append(item)

    for_each(range(50), action, "scans")
    assert sorted(read) == list(range(50))


def test_one_fault_is_said_as_it_is_and_several_are_listed_in_order():
    with pytest.raises(ValueError, match="^scan 3: damaged$"):
        for_each(range(9), refuse(3), "scans")
    with pytest.raises(ValueError, match=r"^2 scans are faulty:\n- scan 3: d.*\n- scan 5: dam"):
        for_each(range(9), refuse(5, 3), "scans")


def test_of_many_faults_ten_are_listed_and_the_others_counted():
    with pytest.raises(ValueError, match="^13 scans are faulty") as caught:
        for_each(range(20), refuse(*range(13)), "scans")
    lines = str(caught.value).splitlines()
    assert len(lines) == 12
    assert lines[-1] == "- ... and 3 more"


def test_what_is_no_fault_of_the_data_is_not_swallowed():
    def fail(item: int) -> None:
        raise OSError("the network drive is gone")

    with pytest.raises(OSError, match="network drive"):
        for_each(range(3), fail, "scans")
