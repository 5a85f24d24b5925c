"""The model card is true, valid, and survives any name."""

import functools
import re
from dataclasses import fields
from itertools import pairwise

import pytest
import torch
import yaml
from datasets import Dataset, DatasetInfo
from huggingface_hub import ModelCard, ModelCardData
from peft import AutoPeftModelForCausalLM, LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig
from trl.trainer import base_trainer

from tests import tiny, tiny_vision
from vpd_trl import VPDConfig, card, card_results
from vpd_trl.evaluation import Evaluation, Sampling
from vpd_trl.feedback import SiblingFeedback
from vpd_trl.markdown import cell, code, one_line, plain, table
from vpd_trl.methods import METHODS


markdown_it = pytest.importorskip("markdown_it", reason="comes with rich")


class Judge:
    def __call__(self, answer, **kwargs):
        return [f"The answer is {a}." for a in answer]


def tables(text):
    """The tables of a card as a reader sees them: lists of rows of cells' texts."""
    tokens = markdown_it.MarkdownIt("commonmark").enable("table").parse(text)
    found = []
    for token, inner in pairwise(tokens):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type in ("th_open", "td_open"):
            found[-1][-1].append("".join(c.content for c in inner.children if c.type != "html_inline"))
    return found


def rows(text):
    """The first table: what and how."""
    return {name: " ".join(rest) for name, *rest in tables(text)[0][1:]}


def read(trainer):
    """The card, after it has been through the client's own checks."""
    loaded = ModelCard.load(f"{trainer.args.output_dir}/README.md")
    assert isinstance(loaded.data, ModelCardData)
    assert yaml.safe_load(re.split(r"^---$", loaded.content, flags=re.M)[1]) == loaded.data.to_dict()
    return loaded


def made(trainer, *args, **kwargs):
    trainer.create_model_card(*args, **kwargs)
    return read(trainer)


def test_a_card_says_what_was_trained_how_and_to_what_result(tmp_path, tokenizer):
    model = tiny.model(tokenizer)
    model.config._name_or_path = "Qwen/Qwen3-0.6B"
    rows_ = [{"prompt": f"{i}+1=", "answer": str(i)} for i in range(2)]
    trainer = tiny.trainer(
        tmp_path / "sums",
        mdl=model,
        tok=tokenizer,
        feedback_fn=[SiblingFeedback(), tiny.answer_feedback],
        evaluation=Evaluation(rows_, tiny.parity_reward, k=2, sampling=Sampling(max_new_tokens=2)),
        eval_strategy="steps",
        eval_steps=1,
        max_steps=2,
    )
    trainer.train()
    written = made(trainer, dataset_name="openai/gsm8k")
    assert written.data.to_dict() == {
        "base_model": "Qwen/Qwen3-0.6B",
        "datasets": "openai/gsm8k",
        "library_name": "transformers",
        "model_name": "sums",
        "pipeline_tag": "text-generation",
        "tags": ["generated_from_trainer", "trl", "vpd"],
    }
    text = written.text
    assert "# sums\n\n[Qwen/Qwen3-0.6B](https://huggingface.co/Qwen/Qwen3-0.6B), trained with VPD, " in text
    assert "[paper](https://huggingface.co/papers/2605.15113)" in text
    assert rows(text) == {
        "Method": "vpd; an E-step on one of 2 rollout batches; M-step by jsd over the full vocabulary",
        "Student": "Qwen/Qwen3-0.6B, all weights trained",
        "Teacher": "the student's own weights (teacher='shared')",
        "Its target": "its distribution q sharpened, q^(1/0.5) (teacher_temperature)",
        "Feedback from": "SiblingFeedback, answer_feedback",
        "Rewards from": "parity_reward; a rollout with at least 1 is a success",
        "Data": "openai/gsm8k",
        "Weights": "after step 2 of 2",
    }
    _, results, settings = tables(text)
    assert [row[0] for row in results] == ["metric", "reward", "eval_avg@2", "eval_pass@1", "eval_pass@2"]
    logged = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    top = max(range(2), key=lambda i: logged[i])
    assert results[1] == ["reward", f"{logged[0]:.4g} (1)", f"{logged[1]:.4g} (2)", f"{logged[top]:.4g} ({top + 1})"]
    assert ["max_steps", "2", "-1"] in settings
    assert ["e_step_frequency", "2", "5"] in settings
    assert not {"output_dir", "method", "save_strategy", "steps_per_generation", "advantage_mix_decay"} & {
        name for name, _, _ in settings
    }
    assert "- TRL: 1.16" in text
    assert "```bibtex\n@article{vpd2026," in text


@pytest.mark.parametrize("method", sorted(card.METHODS))
def test_each_method_has_its_own_name_tags_and_paper(tmp_path, method):
    feedback = None if method == "grpo" else tiny.answer_feedback
    trainer = tiny.trainer(tmp_path, method=method, feedback_fn=feedback)
    written = made(trainer)
    identity = card.METHODS[method]
    assert set(written.data.tags) == {"generated_from_trainer", *identity.tags}
    assert set(trainer.model.model_tags) == set(identity.tags)
    assert f"papers/{identity.paper['id']}" in written.text
    assert f"Cite {identity.name} as:\n\n```bibtex\n@article{{" in written.text
    assert f"trained with {identity.name}, " in written.text
    assert ("Teacher" in rows(written.text)) == (method != "grpo")
    assert ("Its target" in rows(written.text)) == trainer.parts.distills
    assert card.METHODS.keys() == METHODS.keys()


def test_every_papers_authors_are_cited(tmp_path):
    for method, identity in card.METHODS.items():
        citation = identity.paper["citation"]
        assert re.search(r"^ +author += \{[^=]+ and [^=]+\},$", citation, flags=re.M), method
        assert citation.count("{") == citation.count("}")
        assert identity.paper["id"] in citation
    text = made(tiny.trainer(tmp_path)).text
    assert "author = {Yang Li and Erik Nijkamp and Semih Yavuz and Shafiq Joty},\n" in text
    assert r"author = {Jonas H{\"u}botter and Frederike L{\"u}beck and " in card.SDPO_PAPER["citation"]


QUANTIZED = {
    "nf4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": torch.bfloat16,
        "bnb_4bit_use_double_quant": True,
    },
    "int8": {"load_in_8bit": True, "llm_int8_threshold": 5.0},
}


def quantized(tmp_path, bits):
    """A student in few bits, and a folder with its weights as they were before."""
    pytest.importorskip("bitsandbytes")
    base = tmp_path / "base"
    tiny.model(tiny.tokenizer(), hidden_size=64, intermediate_size=128, head_dim=32).save_pretrained(base)
    config = BitsAndBytesConfig(**QUANTIZED[bits])
    return base, AutoModelForCausalLM.from_pretrained(base, quantization_config=config)


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.tensor([[40, 41, 42, 43, 44]])).logits


def in_bfloat16(model):
    """The model with its adapter in bfloat16, as it was trained on quantized weights; PEFT loads it in float32."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    return model


@pytest.mark.parametrize("teacher", ["shared", "lora"])
@pytest.mark.parametrize("bits", QUANTIZED)
def test_the_cards_code_loads_a_quantized_student_and_its_teacher_as_they_were_trained(
    tmp_path, monkeypatch, bits, teacher
):
    _, model = quantized(tmp_path, bits)
    logits(model)  # bitsandbytes lays its weights out anew when a CPU first uses them
    trainer = tiny.trainer(
        tmp_path / "out",
        mdl=model,
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        teacher=teacher,
        e_step_frequency=1,
        learning_rate=1e-2,
    )
    trainer.train()
    trainer.save_model()
    monkeypatch.chdir(tmp_path)  # the card has the folder's name
    scope, code_ = {}, read(trainer).text.split("```python\n")[1].split("\n```")[0]
    exec(code_.split("\n\n# The teacher")[0], scope)
    trained, unquantized = logits(trainer.model), logits(in_bfloat16(AutoPeftModelForCausalLM.from_pretrained("out")))
    torch.testing.assert_close(logits(in_bfloat16(scope["student"])), trained)
    assert (unquantized - trained).abs().max() > 1e-3
    exec(code_, scope)
    assert ("teacher" in scope) == (teacher == "lora")
    if teacher == "lora":
        with trainer.teacher.target_context():
            torch.testing.assert_close(logits(scope["teacher"]), logits(trainer.model), atol=3e-3, rtol=0)
        assert (logits(scope["teacher"]) - trained).abs().max() > 0.1


def test_the_cards_code_loads_a_quantized_vision_language_student(tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    model, processor = tiny_vision.llava()
    model.save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(**QUANTIZED["nf4"])
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "base", quantization_config=config)
    logits(model)  # as above
    trainer = tiny.trainer(
        tmp_path / "out",
        mdl=model,
        tok=processor,
        data=tiny_vision.dataset(),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        max_steps=1,
    )
    trainer.train()
    trainer.save_model()
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(read(trainer).text.split("```python\n")[1].split("\n```")[0], scope)
    torch.testing.assert_close(logits(in_bfloat16(scope["student"])), logits(trainer.model))


def test_a_base_that_was_published_in_few_bits_needs_no_word_of_them(tmp_path, monkeypatch):
    _, model = quantized(tmp_path, "nf4")
    model.save_pretrained(tmp_path / "published")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "published")
    trainer = tiny.trainer(tmp_path / "out", mdl=model, peft_config=LoraConfig(r=4, task_type="CAUSAL_LM"))
    trainer.save_model()
    text = made(trainer).text
    assert "on weights quantized to 4 bits" in text
    code_ = text.split("```python\n")[1].split("\n```")[0]
    assert "BitsAndBytesConfig" not in code_
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(code_, scope)
    assert scope["student"].is_loaded_in_4bit


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"teacher": "shared", "teacher_temperature": 1.0}, ["the student's own weights", "q as it is"]),
        ({"teacher": "ema", "teacher_update_rate": 0.2}, ["a moving average", "rate 0.2", "q as it is"]),
        ({"teacher": "lora"}, ["an adapter of its own, of rank 16, in teacher/adapter"]),
        ({"teacher": "lora", "save_teacher_adapter": False}, ["of rank 16, not part of this model"]),
        ({"teacher_temperature": 2.0}, ["q flattened, q^(1/2)"]),
    ],
    ids=["shared", "ema", "lora", "lora, not saved", "flattened"],
)
def test_the_teacher_is_told_as_it_was(tmp_path, changes, words):
    told = rows(made(tiny.trainer(tmp_path, **changes)).text)
    for text in words:
        assert text.replace("an adapter", "a LoRA adapter") in f"{told['Teacher']} {told['Its target']}"


ODD = [
    'a "quoted" | name',
    "two\nlines\n---\n# forged",
    "<script>`x`</script>",
    "*[a](b)* $x$ {{ y }} \\",
    "é ü 模型",
    " ",
]


@pytest.mark.parametrize("name", ODD, ids=range(len(ODD)))
def test_odd_names_break_neither_metadata_nor_tables_nor_the_code(tmp_path, name):
    def odd(answer, **kwargs):
        return [None for _ in answer]

    odd.__name__ = name
    trainer = tiny.trainer(
        tmp_path,
        feedback_fn=[odd, lambda answer, **k: list(answer), functools.partial(odd), Judge()],
        critique_template=f"\n{name} {{critique}}",
        chat_template_kwargs={name: [name]},
    )
    trainer.hub_model_id = name
    trainer.state.log_history = [{"step": 1, "reward": 0.5}, {"step": 2, "reward": 0.25}]
    written = made(trainer, model_name=name, dataset_name=name, tags=["a|b", name])
    assert written.data.model_name == (" ".join(name.split()) or "model")
    assert {"a|b", name} <= set(written.data.tags)
    assert written.data.datasets is None
    what, results, settings = tables(written.text)
    assert all(len(row) == len(t[0]) for t in (what, results, settings) for row in t)
    seen = one_line(name).strip() or " "
    assert rows(written.text)["Feedback from"] == f"{seen}, <lambda>, {seen}, Judge"
    assert results[1:] == [["reward", "0.5 (1)", "0.25 (2)", "0.5 (1)"]]
    assert one_line(f"\n{name} {{critique}}").strip() in {value for field, value, _ in settings}
    tokens = markdown_it.MarkdownIt("commonmark").parse(written.text)
    title = next(token for token in tokens if token.type == "inline")
    assert {child.type for child in title.children} <= {"text", "text_special"}, "no markup"
    assert "".join(child.content for child in title.children) == written.data.model_name
    headings = re.findall(r"^#+ .*$", written.text, flags=re.M)
    assert headings[1:] == [
        "## Load", "## Training", "## Results", "## Settings that differ from the defaults", "## Framework versions",
        "## Citations",
    ]  # fmt: skip
    scope = {}
    code_ = written.text.split("```python\n")[1].split("\n```")[0]
    exec(next(line for line in code_.splitlines() if line.startswith("name = ")), scope)
    assert scope["name"] == name


def test_no_path_of_this_machine_is_in_a_card(tmp_path, tokenizer):
    (tmp_path / "base").mkdir()
    model = tiny.model(tokenizer)
    model.config._name_or_path = str(tmp_path / "base")
    trainer = tiny.trainer(
        tmp_path / "out",
        mdl=model,
        tok=tokenizer,
        chat_template_kwargs={"file": str(tmp_path / "template.jinja"), "more": [str(tmp_path / "x")]},
        run_name=str(tmp_path),
    )
    written = made(trainer, dataset_name=str(tmp_path / "train.jsonl"))
    assert str(tmp_path) not in written.content
    assert "/tmp" not in written.content
    assert written.data.base_model is None
    assert written.data.datasets is None
    assert "A local model, trained with" in written.text
    assert rows(written.text)["Data"] == "train.jsonl"
    settings = dict(row[:2] for row in tables(written.text)[-1])
    assert settings["chat_template_kwargs"] == "{'file': 'template.jinja', 'more': ['x']}"


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("gpt2", "gpt2"),
        ("", None),
        (None, None),
        ("/models/qwen", None),
        ("./qwen", None),
        ("../qwen", None),
        ("~/qwen", None),
        ("C:\\models\\qwen", None),
        ("a/b/c", None),
        ("vpd_trl", None),  # a folder here
    ],
)
def test_names_of_the_hub_are_told_from_paths(name, known):
    assert card.hub_name(name) == known


def test_a_data_set_that_knows_where_it_is_from_is_named(tmp_path):
    rows_ = tiny.dataset(8).to_dict()
    url = "hf://datasets/openai/gsm8k@cc7b047b6e5bb11b4f1af84efc572db110a51b3c/main/train-00000-of-00001.parquet"
    data = Dataset.from_dict(rows_, info=DatasetInfo(download_checksums={url: {"num_bytes": 1, "checksum": None}}))
    trainer = tiny.trainer(tmp_path, data=data)
    assert made(trainer).data.datasets == "openai/gsm8k"
    trainer.dataset_name = "tester/mine"
    assert made(trainer).data.datasets == "tester/mine"
    assert made(trainer, dataset_name="tester/given").data.datasets == "tester/given"
    assert made(tiny.trainer(tmp_path)).data.datasets is None


def test_only_the_main_process_writes_a_card(tmp_path, monkeypatch):
    trainer = tiny.trainer(tmp_path)
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    trainer.create_model_card()
    assert not (tmp_path / "README.md").exists()
    theirs = "---\nlicense: mit\n---\n\n# Of the main process\n"
    (tmp_path / "README.md").write_text(theirs)
    trainer.create_model_card()
    assert (tmp_path / "README.md").read_text() == theirs


def test_a_card_that_cannot_be_made_does_not_end_the_run(tmp_path, monkeypatch, caplog):
    trainer = tiny.trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    monkeypatch.setattr(card, "results", lambda trainer: 1 / 0)
    with caplog.at_level("WARNING"):
        trainer.train()
    assert "is TRL's, as this run's can't be written: ZeroDivisionError" in caplog.text
    assert "# Model Card for" in (tmp_path / "README.md").read_text()
    assert (tmp_path / "checkpoint-1" / "model.safetensors").exists()


def test_the_weights_of_the_best_checkpoint_are_told_from_those_of_the_last_step(tmp_path):
    trainer = tiny.trainer(
        tmp_path,
        max_steps=2,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        eval_dataset=tiny.dataset(4),
        per_device_eval_batch_size=4,
        load_best_model_at_end=True,
        metric_for_best_model="eval_reward",
        reward_funcs=lambda completions, trainer_state, **k: [1.0 - trainer_state.global_step] * len(completions),
    )
    trainer.train()
    assert trainer.state.best_global_step == 1
    text = made(trainer).text
    assert rows(text)["Weights"] == "after step 1 of 2"
    assert ["eval_reward", "0 (1)", "-1 (2)", "0 (1)"] in tables(text)[1]


def test_links_to_trackers_and_their_tags_are_kept(tmp_path, monkeypatch):
    url = "https://tester-runs.hf.space?project=p&runs=r&sidebar=collapsed"
    monkeypatch.setattr(base_trainer, "get_trackio_space_url", lambda: url)
    written = made(tiny.trainer(tmp_path))
    assert f"trackio:{url}" in written.data.tags
    assert 'alt="Visualize in Trackio"' in written.text
    assert f"]({url})" in written.text


def test_results_leave_out_what_is_no_number(tmp_path):
    trainer = tiny.trainer(tmp_path)
    assert card_results.results(trainer) == "Nothing has been logged yet."
    values = [None, float("nan"), 0.5, float("inf"), 1 / 3, True]
    trainer.state.log_history = [{"step": i, "reward": value} for i, value in enumerate(values)]
    assert tables(card_results.results(trainer))[0][1:] == [["reward", "0.5 (2)", "0.3333 (4)", "0.5 (2)"]]


def test_rewards_of_several_functions_and_data_sets_are_told_apart(tmp_path):
    def one(completions, **kwargs):
        return [1.0] * len(completions)

    trainer = tiny.trainer(
        tmp_path, reward_funcs=[one, tiny.parity_reward], eval_dataset={"a": tiny.dataset(4), "b": tiny.dataset(4)}
    )
    assert list(card_results.names(trainer)) == [
        f"{prefix}{name}"
        for prefix in ("", "eval_a_", "eval_b_")
        for name in ("reward", "rewards/one/mean", "rewards/parity_reward/mean")
    ]


def test_the_settings_that_a_card_can_tell_exist():
    names = {f.name for f in fields(VPDConfig)}
    assert not set(card.TOLD) - names
    assert len(card.TOLD) == len(set(card.TOLD))


def test_trls_card_has_what_this_one_keeps(tmp_path):
    trainer = tiny.trainer(tmp_path)
    super(type(trainer), trainer).create_model_card("m")
    text = (tmp_path / "README.md").read_text()
    assert text.count(card.VERSIONS) == 1
    assert text.index(card.VERSIONS) < text.index("## Citations")
    assert "licence" in ModelCard(text).data.to_dict()


def test_text_within_markdown_stays_text():
    assert one_line("a\nb\tc\x1b[0m") == r"a\nb\tc\x1b[0m"
    assert code("plain_name-1.5/x") == "`plain_name-1.5/x`"
    assert code("<lambda>") == "<code>&lt;lambda&gt;</code>"
    assert code("a|b") == "<code>a&#124;b</code>"
    assert plain("a*b*") == "a&#42;b&#42;"
    assert cell("a\nb|c") == "a<br>b&#124;c"
    assert table(("x", "y"), [("1", "2")]) == "| x | y |\n| --- | --- |\n| 1 | 2 |"
