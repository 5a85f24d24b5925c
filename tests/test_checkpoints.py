"""Only a whole checkpoint is gone on from, and one that can't be written costs no earlier one."""

import errno
import json
import os
import shutil

import pytest
import torch
import transformers.trainer

from tests import tiny
from vpd_trl import checkpoints
from vpd_trl.checkpoints import find_fault, last_whole


def build(folder, *, max_steps=4, **changes):
    values = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant", **changes}
    return tiny.trainer(folder, max_steps=max_steps, **values)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two steps that saved its rollouts too, since it ended in the middle of a batch."""
    folder = tmp_path_factory.mktemp("finished")
    build(folder, max_steps=3, steps_per_generation=4, teacher="ema").train()
    return folder


def cut(path, share=0.5):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


FILES = [
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "vpd_rollouts_0.pt",
]


@pytest.mark.parametrize("name", [*FILES, "vpd_state.pt"])
def test_a_file_that_was_cut_off_is_a_fault_and_the_checkpoint_before_is_the_last(tmp_path, finished, name):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    assert last_whole(tmp_path).name == "checkpoint-3"
    assert find_fault(tmp_path / "checkpoint-3") is None
    for share in (0.98, 0.5, 0.0):
        cut(tmp_path / "checkpoint-3" / name, share)
        assert find_fault(tmp_path / "checkpoint-3") == f"{name} is cut off"
    assert last_whole(tmp_path).name == "checkpoint-2"


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_missing_is_a_fault(tmp_path, finished, name):
    shutil.copytree(finished / "checkpoint-3", tmp_path, dirs_exist_ok=True)
    (tmp_path / name).unlink()
    said = {"model.safetensors": "it has no weights", "trainer_state.json": "which is written last, is missing"}
    assert said.get(name, f"{name} is missing") in find_fault(tmp_path)


@pytest.mark.parametrize("changes", [{}, {"method": "grpo", "feedback_fn": None}], ids=str)
def test_the_state_of_every_method_says_how_many_processes_wrote_it(tmp_path, changes):
    trainer = build(tmp_path, max_steps=1, **changes)
    trainer.train()
    path = tmp_path / "checkpoint-1" / "vpd_state.pt"
    saved = torch.load(path, weights_only=True)
    assert saved["geometry"]["processes"] == 1
    # As two processes leave it
    saved["geometry"]["processes"] = 2
    torch.save(saved, path)
    assert find_fault(path.parent) == "rng_state_0.pth is missing"
    (path.parent / "rng_state.pth").rename(path.parent / "rng_state_0.pth")
    assert find_fault(path.parent) is None


def test_a_scheduler_of_deepspeeds_own_is_looked_for_in_no_file(tmp_path, finished):
    folder = tmp_path / "checkpoint-1"
    shutil.copytree(finished / "checkpoint-1", folder)
    (folder / "scheduler.pt").unlink()
    assert find_fault(folder) == "scheduler.pt is missing"
    (folder / "global_step1").mkdir()
    assert find_fault(folder) is None


def test_a_missing_shard_of_the_weights_is_a_fault(tmp_path, finished):
    shutil.copytree(finished / "checkpoint-3", tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00002.safetensors")
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": names[0], "b": names[1]}}))
    assert find_fault(tmp_path) == f"{names[1]} is missing"


def test_folders_that_are_no_checkpoints_are_no_candidates(tmp_path, finished):
    for name in ("checkpoint-best", "checkpoint-9x", "other"):
        shutil.copytree(finished / "checkpoint-1", tmp_path / name)
    (tmp_path / "checkpoint-12").write_text("a file")
    assert last_whole(tmp_path) is None
    assert last_whole(tmp_path / "none") is None
    for number in (2, 10):
        shutil.copytree(finished / "checkpoint-1", tmp_path / f"checkpoint-{number}")
    assert last_whole(tmp_path).name == "checkpoint-10", "numbers are compared, not names"


def test_resuming_passes_over_a_checkpoint_that_is_not_whole_and_says_so(tmp_path, caplog):
    whole = build(tmp_path / "whole")
    whole.train()
    build(tmp_path / "parts", max_steps=3).train()
    cut(tmp_path / "parts" / "checkpoint-3" / "optimizer.pt")
    with caplog.at_level("WARNING"):
        parts = build(tmp_path / "parts")
        parts.train(resume_from_checkpoint=True)
    assert "checkpoint-3 is passed over, as it is not whole: optimizer.pt is cut off" in caplog.text
    assert parts.state.global_step == 4
    assert tiny.same(tiny.weights(whole), tiny.weights(parts))


def test_a_named_checkpoint_that_is_not_whole_is_refused(tmp_path, finished):
    shutil.copytree(finished / "checkpoint-1", tmp_path / "checkpoint-1")
    cut(tmp_path / "checkpoint-1" / "model.safetensors")
    trainer = build(tmp_path)
    before = tiny.weights(trainer)
    with pytest.raises(ValueError, match=r"checkpoint-1 is no checkpoint to go on from: model.safetensors is cut off"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    with pytest.raises(ValueError, match="has no checkpoint that is whole"):
        trainer.train(resume_from_checkpoint=True)
    assert tiny.same(before, tiny.weights(trainer))


@pytest.mark.parametrize("changes", [{}, {"method": "grpo", "feedback_fn": None}, {"teacher": "ema"}], ids=str)
def test_a_run_that_is_finished_is_not_trained_further(tmp_path, changes):
    first = build(tmp_path, **changes)
    first.train()
    again = build(tmp_path, **changes)
    result = again.train(resume_from_checkpoint=True)
    assert result.global_step == again.state.global_step == 4
    assert tiny.same(tiny.weights(first), tiny.weights(again))
    if changes.get("teacher") == "ema":
        assert tiny.same(first.teacher.average.weights, again.teacher.average.weights)
    longer = build(tmp_path, max_steps=5, **changes)
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 5


def test_a_finished_run_that_is_taken_up_again_knows_which_step_its_weights_are_of(tmp_path):
    changes = dict(load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True)
    changes |= dict(eval_strategy="steps", eval_steps=1, eval_dataset=tiny.dataset(4))
    first = build(tmp_path, **changes)
    first.train()
    again = build(tmp_path, **changes)
    again.train(resume_from_checkpoint=True)
    assert again.weights_step == first.weights_step == first.state.best_global_step


def full_disk(monkeypatch, name, *, from_step):
    """Writing files of this name fails from a step on, after half of the file, as on a full disk."""
    save = torch.save

    def fails(value, path, *args, **kwargs):
        path = str(path)
        save(value, path, *args, **kwargs)
        if name in path and int(path.split("checkpoint-")[1].split(os.sep)[0]) >= from_step:
            with open(path, "r+b") as file:
                file.truncate(os.path.getsize(path) // 2)
            raise OSError(errno.ENOSPC, "No space left on device", path)

    monkeypatch.setattr(torch, "save", fails)


@pytest.mark.parametrize("name", ["vpd_state.pt", "optimizer.pt", "rng_state"])
def test_a_full_disk_is_a_clear_error_and_leaves_the_checkpoint_before(tmp_path, monkeypatch, name):
    whole = build(tmp_path / "whole")
    whole.train()
    with monkeypatch.context() as patch:
        full_disk(patch, name, from_step=3)
        trainer = build(tmp_path / "parts", save_total_limit=1)
        with pytest.raises(
            OSError, match=r"checkpoint-3 could not be written, with .* GB left .*No space left"
        ) as error:
            trainer.train()
    assert str(error.value).endswith(f"Go on from {tmp_path / 'parts' / 'checkpoint-2'}.")
    assert sorted(path.name for path in (tmp_path / "parts").glob("checkpoint-*")) == ["checkpoint-2"]
    resumed = build(tmp_path / "parts")
    resumed.train(resume_from_checkpoint=True)
    assert tiny.same(tiny.weights(whole), tiny.weights(resumed))


def test_the_first_checkpoint_that_fails_says_that_there_is_none(tmp_path, monkeypatch):
    full_disk(monkeypatch, "scheduler.pt", from_step=1)
    with pytest.raises(OSError, match="No earlier checkpoint is there to go on from"):
        build(tmp_path).train()


def test_a_copy_under_another_name_does_not_hide_why_a_checkpoint_failed(tmp_path, monkeypatch, finished):
    shutil.copytree(finished / "checkpoint-1", tmp_path / "checkpoint-best")
    full_disk(monkeypatch, "scheduler.pt", from_step=1)
    with pytest.raises(OSError, match="No earlier checkpoint is there to go on from"):
        build(tmp_path).train()


@pytest.mark.parametrize("suspicion", [None, "something is missing"])
def test_a_push_that_fails_leaves_the_checkpoint_that_was_written(tmp_path, monkeypatch, suspicion):
    def refuse(self, folder):
        raise ConnectionError("the Hub is out of office")

    trainer = build(tmp_path)
    trainer.args.push_to_hub = True
    monkeypatch.setattr(type(trainer), "_push_from_checkpoint", refuse)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "find_fault", lambda folder: suspicion)
        with pytest.raises(ConnectionError, match="out of office"):
            trainer.train()
    assert find_fault(tmp_path / "checkpoint-1") is None


def test_a_checkpoint_of_an_earlier_run_is_not_taken_for_one_that_was_being_overwritten(tmp_path, monkeypatch):
    build(tmp_path, max_steps=1).train()
    assert last_whole(tmp_path).name == "checkpoint-1"

    class Killed(BaseException):
        """What nothing catches, as nothing catches SIGKILL."""

    def killed(*args, **kwargs):
        raise Killed

    monkeypatch.setattr(transformers.trainer.Trainer, "_save_optimizer_and_scheduler", killed)
    with pytest.raises(Killed):
        build(tmp_path, max_steps=1, seed=2).train()
    assert (tmp_path / "checkpoint-1" / "optimizer.pt").exists()
    assert last_whole(tmp_path) is None


def test_an_output_folder_that_cannot_be_written_to_is_refused_before_any_work(tmp_path):
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    with pytest.raises(OSError, match="output_dir can't be written to"):
        tiny.trainer(in_the_way / "run")


def test_a_read_only_output_folder_is_refused_before_any_work(tmp_path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    monkeypatch.setattr(checkpoints.Path, "write_text", refuse)
    with pytest.raises(OSError, match=r"can't be written to \(Read-only file system\); choose another folder"):
        tiny.trainer(tmp_path)
