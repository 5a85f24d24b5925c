"""Only a whole checkpoint is gone on from, and one that can't be written costs no earlier one."""

import errno
import json
import os
import shutil
import sys
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint
import transformers.trainer
from accelerate import PartialState

from tests import tiny
from tests.launching import Hangs, accelerate_command, run
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
    write_as_deepspeed(folder)
    assert find_fault(folder) is None


def write_as_deepspeed(folder, *, stage=2, processes=1):
    """The files that DeepSpeed's `save_checkpoint` writes, by their names and what tells them apart."""
    states = folder / "global_step1"
    states.mkdir()
    (folder / "latest").write_text(states.name)
    weights, optimizer = {"w": torch.ones(4000)}, {"state": {0: {"exp_avg": torch.ones(4000)}}}
    for rank in range(processes if stage == 3 else 1):
        shard = f"zero_pp_rank_{rank}_" if stage == 3 else ""
        path = states / f"{shard}mp_rank_00_model_states.pt"
        torch.save({"module": weights, "optimizer": None if stage else optimizer, "lr_scheduler": None}, path)
    for rank in range(processes if stage else 0):
        path = states / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": optimizer}, path)
    return states


def write_sharded(folder, name):
    """As FSDP with SHARDED_STATE_DICT; the second of two processes has nothing to write, so its file is empty."""
    values = {"a": torch.ones(500), "b": torch.ones(500), "c": {"lr": 0.1}}
    writer = torch.distributed.checkpoint.FileSystemWriter(folder / name)
    torch.distributed.checkpoint.save(values, storage_writer=writer, no_dist=True)
    (folder / name / "__1_0.distcp").write_bytes(b"")


def sharing_engine(folder, finished, *, processes=1):
    """A checkpoint without weights and optimizer of its own, as an engine leaves it that saves them itself."""
    shutil.copytree(finished / "checkpoint-1", folder)
    for name in ("model.safetensors", "optimizer.pt"):
        (folder / name).unlink()
    if processes > 1:
        (folder / "rng_state.pth").rename(folder / "rng_state_0.pth")
        saved = torch.load(folder / "vpd_state.pt", weights_only=True)
        saved["geometry"]["processes"] = processes
        torch.save(saved, folder / "vpd_state.pt")
    return folder


@pytest.mark.parametrize("name", ["pytorch_model_fsdp.bin", "optimizer.bin"])
def test_a_full_state_dict_of_fsdp_that_was_cut_off_is_a_fault(tmp_path, finished, name):
    folder = sharing_engine(tmp_path / "checkpoint-1", finished)
    for file in ("pytorch_model_fsdp.bin", "optimizer.bin"):
        torch.save({"w": torch.ones(4000)}, folder / file)
    assert find_fault(folder) is None
    for share in (0.98, 0.5, 0.0):
        cut(folder / name, share)
        assert find_fault(folder) == f"{name} is cut off"


@pytest.mark.parametrize("name", ["pytorch_model_fsdp_0", "optimizer_0"])
def test_a_sharded_state_dict_of_fsdp_that_is_not_whole_is_a_fault(tmp_path, finished, name):
    whole = sharing_engine(tmp_path / "checkpoint-1", finished)
    for folder in ("pytorch_model_fsdp_0", "optimizer_0"):
        write_sharded(whole, folder)
    assert find_fault(whole) is None, "a part that is empty and not in the index is of a process without a part"
    damages = {
        f"{name}/.metadata is missing": lambda folder: [path.unlink() for path in folder.iterdir()],
        f"{name}/.metadata is cut off": lambda folder: cut(folder / ".metadata"),
        f"{name}/__0_0.distcp is missing": lambda folder: (folder / "__0_0.distcp").unlink(),
        f"{name}/__0_0.distcp is cut off": lambda folder: cut(folder / "__0_0.distcp"),
    }
    for i, (fault, damage) in enumerate(damages.items()):
        folder = shutil.copytree(whole, tmp_path / f"damaged{i}")
        damage(folder / name)
        assert find_fault(folder) == fault
    cut(whole / name / "__0_0.distcp", 0.0)
    assert find_fault(whole) == f"{name}/__0_0.distcp is cut off"


def test_a_part_that_was_cut_off_after_a_whole_tensor_is_not_taken_for_a_zip_file(tmp_path, finished):
    folder = sharing_engine(tmp_path / "checkpoint-1", finished)
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):
        write_sharded(folder, name)
    cut(folder / "optimizer_0" / "__0_0.distcp", 0.9)
    assert zipfile.is_zipfile(folder / "optimizer_0" / "__0_0.distcp"), "the end of the tensor before is near enough"
    assert find_fault(folder) == "optimizer_0/__0_0.distcp is cut off"


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_states_of_deepspeed_that_are_not_whole_are_a_fault(tmp_path, finished, stage):
    whole = sharing_engine(tmp_path / "checkpoint-1", finished)
    (whole / "scheduler.pt").unlink()
    names = sorted(path.name for path in write_as_deepspeed(whole, stage=stage).iterdir())
    assert find_fault(whole) is None
    for i, name in enumerate(names):
        kind = "model" if "model_states" in name else "optimizer"
        for share in (0.5, 0.0):
            folder = shutil.copytree(whole, tmp_path / f"cut{i}_{share}")
            cut(folder / "global_step1" / name, share)
            assert find_fault(folder) == f"global_step1/{name} is cut off"
        (folder / "global_step1" / name).unlink()
        assert find_fault(folder) == f"global_step1 has no {kind} states"
    shutil.rmtree(whole / "global_step1")
    (whole / "global_step1").mkdir()
    assert find_fault(whole) == "global_step1 has no model states"
    (whole / "latest").write_text("")
    assert find_fault(whole) == "latest is cut off"
    (whole / "latest").unlink()
    assert "latest, which names the folder" in find_fault(whole)


def test_what_this_process_saved_for_itself_of_sharded_states_is_looked_for(tmp_path, finished):
    whole = sharing_engine(tmp_path / "checkpoint-1", finished, processes=2)
    write_as_deepspeed(whole, stage=3, processes=2)
    assert find_fault(whole) is None
    for kind in ("zero_pp_rank_{}_mp_rank_00_model_states.pt", "bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt"):
        folder = shutil.copytree(whole, tmp_path / kind[:4])
        (folder / "global_step1" / kind.format(1)).unlink()
        assert find_fault(folder) is None, "process 1 looks for it"
        write = folder / "global_step1" / kind.format(1)
        (folder / "global_step1" / kind.format(0)).rename(write)
        assert find_fault(folder) == f"global_step1/{kind.format(0)} is missing"

    folder = sharing_engine(tmp_path / "fsdp", finished, processes=2)
    torch.save({}, folder / "pytorch_model_fsdp_0_rank1.bin")
    torch.save({}, folder / "optimizer_0_rank1.bin")
    assert find_fault(folder) == "optimizer_0_rank0.bin is missing"


def test_a_file_of_torchs_earlier_format_and_one_of_another_program_are_no_fault(tmp_path, finished):
    shutil.copytree(finished / "checkpoint-3", tmp_path, dirs_exist_ok=True)
    values = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    torch.save(values, tmp_path / "optimizer.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "merges.bin").write_bytes(b"of a tokenizer")
    assert find_fault(tmp_path) is None
    cut(tmp_path / "optimizer.pt", 0.0)
    assert find_fault(tmp_path) == "optimizer.pt is cut off"


def test_a_state_that_cannot_be_read_is_a_fault_and_no_error(tmp_path, finished):
    shutil.copytree(finished / "checkpoint-3", tmp_path, dirs_exist_ok=True)
    with zipfile.ZipFile(tmp_path / "vpd_state.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"nonsense")
    assert "it can't be read" in find_fault(tmp_path)


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


def test_a_named_checkpoint_that_is_whole_for_this_process_alone_is_refused(tmp_path, monkeypatch, finished):
    trainer = build(tmp_path)
    monkeypatch.setattr(checkpoints, "meet", lambda accelerator, place, value: [value, "rng_state_1.pth is missing"])
    with pytest.raises(ValueError, match=r"no checkpoint to go on from: rng_state_1.pth is missing"):
        trainer.train(resume_from_checkpoint=str(finished / "checkpoint-1"))


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


# ---- Two processes


def part_of_two(folder):
    """What a process is told when its run can't write a part of the checkpoint of step 2, and when it resumes."""
    state = PartialState(cpu=True)
    told = {}

    def train(name, resume_from_checkpoint=None):
        changes = {"max_steps": 2, "per_device_train_batch_size": 4, "save_total_limit": 1}
        try:
            build(f"{folder}/{name}", **changes).train(resume_from_checkpoint=resume_from_checkpoint)
            told[name] = None
        except Exception as error:
            told[name] = f"{type(error).__name__}: {error}"
            raise
        finally:
            Path(folder, f"told{state.process_index}.json").write_text(json.dumps(told))

    for name in ("random", "trainer"):
        with pytest.MonkeyPatch.context() as patch, suppress(Exception):
            if name == "random" and state.process_index == 1:
                full_disk(patch, "rng_state_1", from_step=2)
            if name == "trainer" and state.process_index == 0:
                no_trainer_state(patch, from_step=2)
            train(name)
    whole, damaged = f"{folder}/random/checkpoint-1", f"{folder}/damaged/checkpoint-1"
    if state.process_index == 0:
        shutil.copytree(whole, damaged)
        Path(damaged, "rng_state_1.pth").unlink()
    state.wait_for_everyone()
    with suppress(Exception):
        train("from_damaged", damaged)
    train("from_whole", whole)
    with pytest.MonkeyPatch.context() as patch:
        if state.process_index == 0:
            full_disk(patch, "vpd_state", from_step=2)
        train("early")


def no_trainer_state(monkeypatch, *, from_step):
    to_json = transformers.TrainerState.save_to_json

    def fails(self, path):
        to_json(self, path)
        if self.global_step >= from_step:
            cut(Path(path))
            raise OSError(errno.ENOSPC, "No space left on device", path)

    monkeypatch.setattr(transformers.TrainerState, "save_to_json", fails)


@pytest.mark.slow
def test_two_processes_stop_together_when_one_cannot_write_and_the_checkpoint_before_stays(tmp_path):
    launcher = [
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    root = str(Path(__file__).parent.parent)
    try:
        command = accelerate_command(__file__, [tmp_path], *launcher)
        status, output = run(command, seconds=240, ACCELERATE_USE_CPU="true", PYTHONPATH=root)
    except Hangs as hang:
        pytest.fail(str(hang))
    assert status != 0
    told = [json.loads((tmp_path / f"told{rank}.json").read_text()) for rank in (0, 1)]
    for name, failing in {"random": 1, "trainer": 0, "early": 0}.items():
        its = told[failing][name]
        assert f"checkpoint-2 could not be written by process {failing}" in its, output[-6000:]
        assert its.endswith(f"Go on from {tmp_path / name / 'checkpoint-1'}.")
        # Else the other is elsewhere and is ended; it may leave a folder that is not whole
        if name != "early":
            assert told[1 - failing][name].startswith(f"StoppedTogether: Process {failing} failed, so all stop. {its}")
            assert [path.name for path in (tmp_path / name).glob("checkpoint-*")] == ["checkpoint-1"]
        # No more than one is kept, and the one that was being written is not whole
        assert last_whole(tmp_path / name).name == "checkpoint-1"
    for process in told:
        assert "no checkpoint to go on from: rng_state_1.pth is missing" in process["from_damaged"]
        assert process["from_whole"] is None


if __name__ == "__main__":
    part_of_two(*sys.argv[1:])
