"""Checkpoints are whole or not there: failed saves, damaged files, what is kept, saves in the background."""

import shutil
import threading

import pytest
import torch

from distprune.training.checkpoint import CheckpointError, Checkpoints, Writing
from tests.training.damage import damages


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "checkpoints", keep=2, group=None)


def save(checkpoints, step, marks=None, **state):
    checkpoints.save(step, {"w": torch.full((6,), float(step))}, {"step": step, **state}, marks or {})


def weights(checkpoints, found):
    into = {"w": torch.zeros(6)}
    checkpoints.load(found, into)
    return into["w"].tolist()


def names(checkpoints):
    return sorted(path.name for path in checkpoints._folder.iterdir())


def test_a_failed_save_leaves_earlier_checkpoints_whole(checkpoints, monkeypatch):
    save(checkpoints, 1)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("torch.distributed.checkpoint.hf_storage.HuggingFaceStorageWriter.write_data", full)
        with pytest.raises(CheckpointError, match=r"step 2.*No space left"):
            save(checkpoints, 2)
    assert names(checkpoints) == ["latest", "step-00000001"]
    assert weights(checkpoints, checkpoints.newest()) == [1.0] * 6


def test_the_newest_and_the_marked_are_kept_and_later_ones_that_were_passed_over_are_not(checkpoints):
    for step in (1, 2, 3, 9):
        save(checkpoints, step, {"best": 1})
    (checkpoints._folder / "step-00000009" / "state.json").write_text("")
    assert checkpoints.newest().step == 3
    assert checkpoints.newest(before=3).step == 1
    for step in (4, 5):
        save(checkpoints, step, {"best": 1})
    assert names(checkpoints) == ["best", "latest", "step-00000001", "step-00000004", "step-00000005"]
    assert (checkpoints._folder / "latest").read_text() == "step-00000005\n"
    assert (checkpoints._folder / "best").read_text() == "step-00000001\n"


def test_what_an_older_checkpoint_was_saved_with_stays_as_long_as_it_does(checkpoints):
    for step, accepted in ((1, 1), (2, 1), (3, 3), (4, 3)):
        save(checkpoints, step, {"accepted": accepted})
    assert names(checkpoints) == ["accepted", "latest", *(f"step-{step:08d}" for step in (1, 2, 3, 4))]
    assert checkpoints.newest().state["marks"] == {"accepted": 3}
    (checkpoints._folder / "step-00000004" / "state.json").write_text("")  # damaged later, and not read since
    save(checkpoints, 5, {"accepted": 3})
    assert names(checkpoints) == ["accepted", "latest", *(f"step-{step:08d}" for step in (3, 4, 5))]


def test_a_step_saved_again_replaces_what_was_saved_before(checkpoints):
    save(checkpoints, 1)
    checkpoints.save(2, {"w": torch.zeros(6)}, {"step": 2}, {})
    save(checkpoints, 2)
    assert names(checkpoints) == ["latest", "step-00000001", "step-00000002"]
    assert weights(checkpoints, checkpoints.newest()) == [2.0] * 6


def test_what_a_killed_save_left_is_no_checkpoint_and_goes_with_the_next(checkpoints):
    save(checkpoints, 1)
    for name in (".step-00000002.partial", ".step-00000001.replaced"):
        shutil.copytree(checkpoints._folder / "step-00000001", checkpoints._folder / name)
    assert checkpoints.newest().step == 1
    save(checkpoints, 3)
    assert names(checkpoints) == ["latest", "step-00000001", "step-00000003"]


def test_a_checkpoint_with_any_damage_is_never_taken(checkpoints, caplog):
    save(checkpoints, 1)
    save(checkpoints, 2, config={"some": ["text", 1.5]})
    newest = checkpoints._folder / "step-00000002"
    tried = 0
    for what in damages(newest):
        found = checkpoints.newest()
        assert found is not None, what
        assert found.step == 1, what
        assert "step-00000002 is damaged and is passed over" in caplog.text, what
        caplog.clear()
        tried += 1
    assert tried > 30
    assert checkpoints.newest().step == 2
    shutil.rmtree(checkpoints._folder / "step-00000001")
    (newest / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"none of the checkpoints in .* can be read; remove that folder"):
        checkpoints.newest()


def test_a_folder_renamed_to_another_step_is_not_taken(checkpoints):
    assert checkpoints.newest() is None
    save(checkpoints, 1)
    (checkpoints._folder / "step-00000001").rename(checkpoints._folder / "step-00000007")
    with pytest.raises(CheckpointError):
        checkpoints.newest()


def test_a_damaged_checkpoint_does_not_push_out_a_whole_one(checkpoints):
    save(checkpoints, 20)
    save(checkpoints, 30)
    (checkpoints._folder / "step-00000030" / "state.json").write_text("")
    assert checkpoints.newest().step == 20
    save(checkpoints, 35)
    assert names(checkpoints) == ["latest", "step-00000020", "step-00000035"]


def test_a_file_system_that_does_not_answer_is_not_damage(checkpoints, monkeypatch):
    save(checkpoints, 1)
    save(checkpoints, 2)

    def stale(_):
        raise OSError(116, "Stale file handle")

    with monkeypatch.context() as patched:
        patched.setattr("distprune.training.checkpoint._sha256", stale)
        with pytest.raises(CheckpointError, match="Stale file handle"):
            checkpoints.newest()
    assert checkpoints.newest().step == 2


def test_a_replacement_that_was_interrupted_is_undone(checkpoints):
    save(checkpoints, 1)
    (checkpoints._folder / "step-00000001").rename(checkpoints._folder / ".step-00000001.replaced")
    assert checkpoints.newest().step == 1
    assert names(checkpoints) == ["latest", "step-00000001"]


def test_a_save_in_the_background_tells_how_it_went():
    go = threading.Event()
    done = []
    writing = Writing(lambda: done.append(go.wait(10)), torch.device("cpu"))
    assert done == []
    go.set()
    writing.result()
    assert done == [True]

    def fail():
        raise CheckpointError("full")

    with pytest.raises(CheckpointError, match="full"):
        Writing(fail, torch.device("cpu")).result()
