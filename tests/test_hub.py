"""Pushes by the real client, to a Hub on this machine: everything is there, loads back, and nothing else is."""

import json
import logging
import os
import time
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard, snapshot_download
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from tests import hub_server, tiny, tiny_vision
from vpd_trl import VPDConfig, VPDTrainer
from vpd_trl.cli import main


ADAPTER = {"teacher/adapter/adapter_config.json", "teacher/adapter/adapter_model.safetensors"}
STUDENT = {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
PROMPT = torch.tensor([[40, 41, 42, 43, 44]])
LORA = {"r": 4, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with hub_server.running(monkeypatch, tmp_path / "cache") as server:
        yield server


def pushing(folder, **changes):
    """A run of two steps, each of which ends in a checkpoint that is pushed."""
    values = dict(max_steps=2, save_strategy="steps", save_steps=1, push_to_hub=True, hub_always_push=True)
    return tiny.trainer(folder, **{**values, "e_step_frequency": 1, "learning_rate": 1e-2, **changes})


def wait_for(condition):
    """What a future's callbacks do comes after its result."""
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)


def logits(model):
    with torch.no_grad():
        return model.eval()(PROMPT).logits


def teachers_logits(trainer):
    with trainer.teacher.target_context():
        return logits(trainer.model)


def earlier_run(hub, repo="tester/out"):
    """A repository with what a run whose teacher had an adapter has left, and a file that someone has added."""
    old = dict.fromkeys((*ADAPTER, *(f"last-checkpoint/{name}" for name in ADAPTER), "notes.md"), b"old")
    hub.files[repo] = old


def test_a_run_with_a_lora_teacher_is_pushed_and_loads_back_by_the_cards_own_code(hub, tmp_path):
    trainer = pushing(tmp_path / "out", teacher="lora", hub_strategy="checkpoint")
    trainer.train()
    messages = [message for _, message, _, _ in hub.commits]
    assert messages == [
        "Training in progress, step 1",
        "Training in progress, step 1, checkpoint",
        "Training in progress, step 2",
        "Training in progress, step 2, checkpoint",
    ]
    for message, _, added, _ in ((c[1], *c[1:]) for c in hub.commits):
        last = "last-checkpoint/" if message.endswith("checkpoint") else ""
        assert {f"{last}README.md", f"{last}model.safetensors"} <= set(added)
        assert f"{last}teacher/adapter/adapter_model.safetensors" in added
    trainer.push_to_hub()
    files = hub.files["tester/out"]
    assert set(files) >= STUDENT | ADAPTER
    assert {f"last-checkpoint/{name}" for name in (*STUDENT, *ADAPTER, "vpd_state.pt")} <= set(files)
    assert not any(name.startswith("checkpoint-") for name in files)

    card = ModelCard(files["README.md"].decode())
    assert card.text.count("```python") == 1
    scope = {}
    exec(card.text.split("```python\n")[1].split("```")[0], scope)  # downloads from this Hub
    # PEFT puts the adapter into the student's network
    assert torch.equal(logits(scope["teacher"]), teachers_logits(trainer))
    with scope["teacher"].disable_adapter():
        assert torch.equal(logits(scope["teacher"]), logits(trainer.model))
    assert not torch.equal(logits(trainer.model), teachers_logits(trainer))
    assert scope["tokenizer"].eos_token == "<|im_end|>"

    place = snapshot_download("tester/out", local_dir=tmp_path / "loaded")
    student = AutoModelForCausalLM.from_pretrained(os.path.join(place, "last-checkpoint"))
    assert torch.equal(logits(student), logits(trainer.model))
    teacher = PeftModel.from_pretrained(student, os.path.join(place, "last-checkpoint/teacher/adapter"))
    assert torch.equal(logits(teacher), teachers_logits(trainer))


def test_a_student_that_is_an_adapter_is_alone_at_the_top_and_loads_back_with_its_teacher(hub, tmp_path, tokenizer):
    base = tmp_path / "base"
    tiny.model(tokenizer).save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    trainer = pushing(
        tmp_path / "out", mdl=model, teacher="lora", peft_config=LoraConfig(**LORA), hub_strategy="every_save"
    )
    trainer.train()
    trainer.push_to_hub()
    files = hub.files["tester/out"]
    assert "model.safetensors" not in files
    assert {name for name in files if "adapter" in name} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    } | ADAPTER
    card = ModelCard(files["README.md"].decode())
    assert card.data.library_name == "peft"
    assert "local model with a LORA adapter of rank 4" in card.text
    scope = {}
    exec(card.text.split("```python\n")[1].split("```")[0], scope)
    assert torch.allclose(logits(scope["teacher"]), teachers_logits(trainer), atol=1e-5)
    student = AutoPeftModelForCausalLM.from_pretrained("tester/out")
    assert torch.equal(logits(student), logits(trainer.model))
    assert not torch.allclose(logits(student), teachers_logits(trainer), atol=1e-5)


@pytest.mark.parametrize("teacher", ["shared", "lora"])
@pytest.mark.parametrize("adapter", [None, LORA], ids=["weights", "adapter"])
def test_a_vision_language_student_loads_back_by_the_cards_own_code(hub, tmp_path, adapter, teacher):
    model, processor = tiny_vision.llava()
    model.save_pretrained(tmp_path / "base")
    trainer = pushing(
        tmp_path / "out",
        mdl=AutoModelForImageTextToText.from_pretrained(tmp_path / "base"),
        tok=processor,
        data=tiny_vision.dataset(),
        max_steps=1,
        hub_always_push=False,
        save_strategy="no",
        teacher=teacher,
        peft_config=adapter and LoraConfig(**adapter),
    )
    trainer.train()
    trainer.push_to_hub()
    card = ModelCard(hub.files["tester/out"]["README.md"].decode())
    assert card.data.pipeline_tag == "image-text-to-text"
    assert str(tmp_path) not in card.content
    code = card.text.split("```python\n")[1].split("```")[0]
    scope = {}
    exec(code.split("\n\n# The teacher")[0], scope)
    assert type(scope["processor"]) is type(processor)
    base = scope["student"].get_base_model() if adapter else scope["student"]
    assert type(base) is type(model)
    assert torch.equal(logits(scope["student"]), logits(trainer.model))
    exec(code, scope)
    assert ("teacher" in scope) == (teacher == "lora")
    if teacher == "lora":
        assert torch.allclose(logits(scope["teacher"]), teachers_logits(trainer), atol=1e-5)
        assert not torch.allclose(logits(trainer.model), teachers_logits(trainer), atol=1e-5)


@pytest.mark.parametrize("strategy", ["checkpoint", "every_save", "end"])
def test_without_the_teachers_adapter_that_of_an_earlier_run_goes_from_the_hub(hub, tmp_path, strategy):
    earlier_run(hub)
    for name in ADAPTER:
        os.makedirs(tmp_path / "out/teacher/adapter", exist_ok=True)
        (tmp_path / "out" / name).write_text("old")
    trainer = pushing(tmp_path / "out", max_steps=1, teacher="lora", save_teacher_adapter=False, hub_strategy=strategy)
    trainer.train()
    if strategy == "end":
        assert hub.files["tester/out"].keys() >= ADAPTER, "it belongs to the student that is there still"
        trainer.push_to_hub()
    files = hub.files["tester/out"]
    assert not any(name.startswith("teacher") for name in files)
    # What was not pushed over stays
    assert any(name.startswith("last-checkpoint/teacher") for name in files) == (strategy != "checkpoint")
    assert files["notes.md"] == b"old"
    assert "model.safetensors" in files
    assert not (tmp_path / "out" / "teacher" / "adapter").exists()
    assert "PeftModel" not in files["README.md"].decode()


@pytest.mark.parametrize("changes", [{"method": "grpo"}, {"teacher": "ema"}], ids=["grpo", "ema"])
def test_what_an_earlier_runs_teacher_left_is_not_pushed_by_a_run_whose_teacher_has_nothing(hub, tmp_path, changes):
    earlier_run(hub)
    os.makedirs(tmp_path / "out/teacher/adapter")
    (tmp_path / "out/teacher/adapter/adapter_config.json").write_text("old")
    trainer = pushing(tmp_path / "out", **changes)
    trainer.push_to_hub()
    assert not any(name.startswith("teacher") for name in hub.files["tester/out"])
    assert not any(name.startswith("teacher") for _, _, added, _ in hub.commits for name in added)
    assert not (tmp_path / "out/teacher/adapter").exists()


def test_a_push_in_the_background_is_pushed_whole_while_training_goes_on(hub, tmp_path):
    trainer = pushing(tmp_path / "out", teacher="lora", hub_always_push=False, hub_strategy="every_save")
    hub.gate.clear()
    while_pushing = []
    adapter = tmp_path / "out/teacher/adapter/adapter_model.safetensors"
    push = trainer._push_from_checkpoint

    def watched(checkpoint):
        push(checkpoint)
        while_pushing.append((adapter.stat().st_mtime_ns, adapter.read_bytes()))
        if len(while_pushing) == 2:
            hub.gate.set()

    trainer._push_from_checkpoint = watched
    trainer.train()
    assert [message for _, message, _, _ in hub.commits] == ["Training in progress, step 1"]
    assert while_pushing[0] == while_pushing[1], "the file that is being read was written"
    assert hub.files["tester/out"]["teacher/adapter/adapter_model.safetensors"] == while_pushing[0][1]
    assert (
        hub.files["tester/out"]["model.safetensors"] == (tmp_path / "out/checkpoint-1/model.safetensors").read_bytes()
    )


def test_checkpoints_that_cannot_be_pushed_are_told_of_and_lose_nothing(hub, tmp_path, caplog):
    trainer = pushing(tmp_path / "out", max_steps=1, hub_strategy="checkpoint")
    earlier_run(hub)
    hub.failing = ("/preupload/", 403)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    wait_for(lambda: caplog.text.count("push to") == 2)
    told = [record.getMessage() for record in caplog.records if "push to" in record.getMessage()]
    assert len(told) == 2, "the student and the checkpoint"
    assert "The push to tester/out failed (HfHubHTTPError: " in told[0]
    assert "403 Forbidden" in told[0]
    folder = str(tmp_path / "out/checkpoint-1")
    assert f"Nothing is lost: what was to be pushed is in {folder}." in told[0]
    assert trainer.state.global_step == 1
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "out/checkpoint-1")
    assert torch.equal(logits(student), logits(trainer.model))
    assert hub.files["tester/out"].keys() >= ADAPTER, "it belongs to the student that is there still"
    hub.failing = None
    trainer.push_to_hub()
    assert set(hub.files["tester/out"]) >= STUDENT


@pytest.mark.parametrize("blocking", [True, False], ids=["waited for", "in the background"])
def test_a_last_push_that_fails_says_where_the_model_is(hub, tmp_path, caplog, blocking):
    trainer = pushing(tmp_path / "out", teacher="lora", push_to_hub=False)
    hub.failing = ("/preupload/", 403)
    with caplog.at_level(logging.WARNING):
        if blocking:
            with pytest.raises(Exception, match="403"):
                trainer.push_to_hub()
        else:
            assert trainer.push_to_hub(blocking=False).exception() is not None
            wait_for(lambda: "push to" in caplog.text)
    (told,) = [record.getMessage() for record in caplog.records if "push to" in record.getMessage()]
    assert f"is in {tmp_path / 'out'}. trainer.push_to_hub() tries again" in told
    assert f"hf upload tester/out {tmp_path / 'out'}" in told
    on_disk = {
        os.path.relpath(os.path.join(a, f), tmp_path / "out") for a, _, fs in os.walk(tmp_path / "out") for f in fs
    }
    assert on_disk >= STUDENT | ADAPTER
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(trainer.model))
    hub.failing = None
    trainer.push_to_hub()
    assert set(hub.files["tester/out"]) >= STUDENT | ADAPTER


def test_a_push_that_fails_because_the_model_cannot_be_saved_does_not_say_that_it_is_on_disk(
    hub, tmp_path, monkeypatch, caplog
):
    trainer = pushing(tmp_path / "out")

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(trainer, "_save", full)
    with caplog.at_level(logging.WARNING), pytest.raises(OSError, match="No space left"):
        trainer.push_to_hub()
    assert "Nothing is lost" not in caplog.text


def test_a_repository_that_cannot_be_made_ends_the_run_before_it_begins(hub, tmp_path):
    hub.failing = ("/api/repos/create", 401)
    with pytest.raises(Exception, match="401 Unauthorized"):
        pushing(tmp_path / "out")


def test_an_old_adapter_that_cannot_be_removed_is_told_of(hub, tmp_path, caplog):
    earlier_run(hub)
    trainer = pushing(tmp_path / "out")
    answer = hub.answer

    def refusing(method, path, body):
        return (403, {}, b"{}") if b"deletedFolder" in body else answer(method, path, body)

    hub.answer = refusing
    with caplog.at_level(logging.WARNING):
        trainer.push_to_hub()
    assert "teacher/adapter in tester/out may be an adapter of an earlier run's teacher" in caplog.text
    assert "model.safetensors" in hub.files["tester/out"]


def test_a_push_takes_the_token_and_the_revision_that_it_is_given(hub, tmp_path, monkeypatch):
    earlier_run(hub)
    trainer = pushing(tmp_path / "out", hub_model_id="tester/out")
    deletions = []
    monkeypatch.setattr(HfApi, "delete_folder", lambda self, folder, **kwargs: deletions.append((folder, kwargs)))
    trainer.push_to_hub("done", True, "hf_other", "draft")
    trainer.push_to_hub(dataset_name="openai/gsm8k")
    assert [(folder, k["token"], k["revision"]) for folder, k in deletions] == [
        ("teacher/adapter", "hf_other", "draft"),
        ("teacher/adapter", None, None),
    ]
    assert "POST /api/models/tester/out/commit/draft" in hub.requests
    assert ModelCard(hub.files["tester/out"]["README.md"].decode()).data.datasets == "openai/gsm8k"


def test_the_token_is_used_and_not_published(hub, tmp_path):
    trainer = pushing(tmp_path / "out", hub_token="hf_secret", max_steps=1, hub_strategy="checkpoint")
    trainer.train()
    trainer.push_to_hub()
    assert set(hub.tokens) == {"hf_secret"}
    assert {"training_args.bin", "last-checkpoint/training_args.bin"} <= set(hub.files["tester/out"])
    assert not [name for name, content in hub.files["tester/out"].items() if b"hf_secret" in content]
    assert torch.load(tmp_path / "out" / "training_args.bin", weights_only=False).hub_token is None


def test_every_folder_that_a_model_is_saved_to_has_its_card(tmp_path):
    trainer = tiny.trainer(
        tmp_path / "out", max_steps=2, save_strategy="steps", save_steps=1, peft_config=LoraConfig(**LORA)
    )
    trainer.train()
    trainer.save_model(tmp_path / "elsewhere")
    (tmp_path / "out/README.md").unlink()
    trainer.save_model()
    for place, step in (("out/checkpoint-1", 1), ("out/checkpoint-2", 2), ("elsewhere", 2), ("out", 2)):
        card = ModelCard.load(tmp_path / place / "README.md")
        assert f"after step {step} of 2" in card.text, place
        assert "More Information Needed" not in card.text, "PEFT's form that nobody has filled in"
        assert card.data.base_model is None


def test_the_command_pushes_once_with_the_results_and_a_push_that_fails_leaves_them(hub, tmp_path, tokenizer, capsys):
    tiny.model(tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    recipe = {"task": f"{Path(__file__).parent / 'cli_task.py'}:Sums", "output_dir": str(tmp_path / "out")}
    recipe |= {"model_name_or_path": str(tmp_path / "base"), "evaluate": True, "eval_samples": 2, "eval_limit": 2}
    recipe |= {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 4, "max_steps": 1}
    recipe |= {"bf16": False, "use_cpu": True, "report_to": "none", "save_strategy": "no", "push_to_hub": True}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    hub.failing = ("/preupload/", 403)
    assert main(["train", "--config", str(tmp_path / "recipe.yaml")]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("vpd-trl: error: HfHubHTTPError: ")
    assert "403 Forbidden" in error
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert any("eval_avg@2" in row for row in history)
    assert "eval_avg@2" in (tmp_path / "out" / "README.md").read_text()
    hub.failing = None
    assert main(["train", "--config", str(tmp_path / "recipe.yaml")]) == 0
    assert [message for _, message, _, _ in hub.commits] == ["End of training"]
    pushed = ModelCard(hub.files["tester/out"]["README.md"].decode())
    assert "eval_avg@2" in pushed.text
    assert pushed.data.datasets is None
    assert str(tmp_path) not in pushed.content


def test_the_readmes_example_pushes_checkpoints_and_the_model(hub, tmp_path, tokenizer, monkeypatch):
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    code = readme.split("## On the Hub")[1].split("```python\n")[1].split("```")[0]
    tiny.model(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    code = code.replace('"Qwen/Qwen3-0.6B"', '"model"')
    small = "max_steps=1, save_steps=1, max_completion_length=4, num_generations=4, per_device_train_batch_size=4, "
    small += "bf16=False, use_cpu=True, gradient_checkpointing=False, report_to='none', disable_tqdm=True"
    code = code.replace('VPDConfig("qwen3-vpd", ', f'VPDConfig("qwen3-vpd", {small}, ')
    scope = {"VPDConfig": VPDConfig, "VPDTrainer": VPDTrainer, "dataset": tiny.dataset(8)}
    exec(code, scope | {"reward": tiny.parity_reward, "feedback": tiny.answer_feedback})
    assert [message for _, message, _, _ in hub.commits] == ["Training in progress, step 1", "End of training"]
    assert ModelCard(hub.files["tester/qwen3-vpd"]["README.md"].decode()).data.datasets == "openai/gsm8k"
