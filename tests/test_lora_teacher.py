"""A teacher with an adapter of its own: what trains it, what it leaves alone, and who never meets it."""

import copy
import os

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl import GRPOTrainer
from trl.generation.vllm_generation import VLLMGeneration

from tests import tiny
from vpd_trl.batch import loss_mask
from vpd_trl.losses import bco_loss


ADAPTER = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
STUDENTS = {"full": {}, "lora": {"peft_config": LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")}}
CHECKPOINTING = {
    "stored": {},
    "recomputed": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
}

every_student = pytest.mark.parametrize("student", STUDENTS)
every_checkpointing = pytest.mark.parametrize("checkpointing", CHECKPOINTING)


def build(folder, student="full", checkpointing="stored", **changes):
    changes = {"e_step_frequency": 1, "teacher_peft_config": ADAPTER} | changes
    return tiny.trainer(folder, teacher="lora", **STUDENTS[student], **CHECKPOINTING[checkpointing], **changes)


def adapter(trainer):
    return {name: p.detach().clone() for name, p in trainer.teacher.parameters.items()}


def randomize(trainer, scale=0.5):
    """An adapter that is not zero any more."""
    generator = torch.Generator().manual_seed(0)
    for parameter in trainer.teacher.parameters.values():
        parameter.data = scale * torch.randn(parameter.shape, generator=generator)


def prompt_ids():
    return torch.arange(4, 20).unsqueeze(0)


def logits(trainer, *, teacher):
    model = trainer.model.eval()
    with torch.no_grad():
        if not teacher:
            return model(input_ids=prompt_ids()).logits
        with trainer.teacher.target_context():
            return model(input_ids=prompt_ids()).logits


def watched(trainer):
    """Runs of the E-step and the student's optimizer note what they changed: (phase, adapter?, student?)."""
    changes = []

    def watch(phase, call):
        def wrapped(*args, **kwargs):
            before = adapter(trainer), tiny.weights(trainer)
            result = call(*args, **kwargs)
            after = adapter(trainer), tiny.weights(trainer)
            changes.append((phase, *(not tiny.same(a, b) for a, b in zip(before, after, strict=True))))
            return result

        return wrapped

    trainer.e_step.run = watch("e_step", trainer.e_step.run)
    opened = trainer.create_optimizer

    def create_optimizer(*args, **kwargs):
        optimizer = opened(*args, **kwargs)
        optimizer.step = watch("m_step", optimizer.step)
        return optimizer

    trainer.create_optimizer = create_optimizer
    trainer.evaluate = watch("evaluate", trainer.evaluate)
    trainer.save_model = watch("save", trainer.save_model)
    return changes


@every_student
@every_checkpointing
def test_the_e_step_trains_the_adapter_alone_and_the_m_step_the_student_alone(tmp_path, student, checkpointing):
    trainer = build(
        tmp_path,
        student,
        checkpointing,
        eval_dataset=tiny.dataset(4),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        per_device_eval_batch_size=4,
        lr_scheduler_type="constant",
    )
    structure = str(trainer.model)
    changes = watched(trainer)
    trainer.train()
    assert changes.count(("e_step", True, False)) == 3
    assert changes.count(("m_step", False, True)) == 3
    assert changes.count(("evaluate", False, False)) == 3
    assert changes.count(("save", False, False)) == 3
    assert len(changes) == 12
    assert str(trainer.model) == structure
    trainable = [n for n, p in trainer.model.named_parameters() if p.requires_grad]
    assert trainable
    assert not any("teacher" in name for name, _ in trainer.model.named_parameters())
    assert all(p.grad is None for p in trainer.teacher.parameters.values())
    # Rank 4 of both matrices moved: B in the first E-step, A once B is not zero
    fresh = adapter(build(tmp_path / "fresh", student, checkpointing))
    assert all(not torch.equal(fresh[n], p) for n, p in adapter(trainer).items())


def test_a_qlora_student_and_its_teacher_are_trained_apart(tmp_path):
    pytest.importorskip("bitsandbytes")
    tokenizer = tiny.tokenizer()
    tiny.model(tokenizer, hidden_size=64, intermediate_size=128, head_dim=32).save_pretrained(tmp_path / "base")
    trainer = build(
        tmp_path,
        "lora",
        mdl=str(tmp_path / "base"),
        tok=tokenizer,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        ),
        lr_scheduler_type="constant",
    )
    assert any(p.dtype == torch.uint8 for p in trainer.model.parameters())
    with torch.no_grad():  # bitsandbytes lays its weights out anew when a CPU first uses them
        trainer.model(prompt_ids())
    changes = watched(trainer)
    trainer.train()
    assert changes.count(("e_step", True, False)) == 3
    assert changes.count(("m_step", False, True)) == 3


def raise_within(context, trainer):
    with context:
        assert "teacher" in str(trainer.model)
        raise KeyError("on purpose")


@every_student
def test_the_student_comes_back_after_an_exception_in_every_context(tmp_path, student):
    trainer = build(tmp_path, student)
    structure, trainable = str(trainer.model), [p.requires_grad for p in trainer.model.parameters()]
    before = tiny.weights(trainer), adapter(trainer)
    for context in (trainer.teacher.target_context, trainer.teacher.training_context):
        with pytest.raises(KeyError, match="on purpose"):
            raise_within(context(), trainer)
        assert str(trainer.model) == structure
        assert [p.requires_grad for p in trainer.model.parameters()] == trainable
    after = tiny.weights(trainer), adapter(trainer)
    assert tiny.same(before[0], after[0])
    assert tiny.same(before[1], after[1])


@every_student
def test_the_teacher_starts_as_the_student_and_follows_it(tmp_path, student):
    trainer = build(tmp_path, student, learning_rate=1e-2)
    assert torch.equal(logits(trainer, teacher=True), logits(trainer, teacher=False))
    trainer.train()
    for parameter in trainer.teacher.parameters.values():
        parameter.data.zero_()
    assert torch.equal(logits(trainer, teacher=True), logits(trainer, teacher=False))
    randomize(trainer)
    assert not torch.allclose(logits(trainer, teacher=True), logits(trainer, teacher=False), atol=1e-2)


def rollouts(trainer):
    """A trainer that has collected a rollout batch: its micro-batches."""
    kept = []
    trainer.e_step.run = lambda batches, **kwargs: (kept.extend(batches), False)[1]
    trainer.train()
    trainer.model.train()
    return kept


def oracle_gradients(trainer, batches, shift):
    """The E-step's gradients of the adapter, by a plain PeftModel on a merged copy of the student."""
    model = copy.deepcopy(trainer.model)
    if isinstance(model, PeftModel):
        model = model.merge_and_unload()
    model = get_peft_model(model, copy.deepcopy(ADAPTER), adapter_name="teacher").train()
    own = {n.replace(".teacher", ""): p for n, p in model.named_parameters() if "lora_" in n}
    assert own.keys() == trainer.teacher.parameters.keys()
    for name, parameter in own.items():
        parameter.data.copy_(trainer.teacher.parameters[name])
    outcome = torch.cat([batch["outcome"] for batch in batches])
    total = 0.0
    for batch in batches:
        mask = loss_mask(batch).bool()
        with torch.no_grad():
            prior = trainer.scorer.frozen_logps(batch)
        ids = torch.cat([batch["teacher_prompt_ids"], batch["completion_ids"]], 1)
        attention = torch.cat([batch["teacher_prompt_mask"], batch["completion_mask"]], 1)
        hidden = model.base_model.model.model(input_ids=ids, attention_mask=attention).last_hidden_state
        length = mask.size(1)
        scores = (hidden[:, -length - 1 : -1] @ model.get_output_embeddings().weight.T).log_softmax(-1)
        logps = scores.gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1)
        ratio = torch.where(mask, logps - prior, 0.0).sum(-1)
        success = batch["outcome"] == 1
        loss = bco_loss(ratio, success, temperature=trainer.args.bco_temperature, shift=shift)
        weight = torch.where(success, 1 / (outcome == 1).sum(), 1 / (outcome == 0).sum())
        total = total + (loss * weight).sum()
    total.backward()
    return {name: parameter.grad for name, parameter in own.items()}


@every_student
@every_checkpointing
def test_the_e_steps_gradient_is_that_of_a_plain_peft_model(tmp_path, student, checkpointing):
    """Of the teacher's forward and backward pass in one context: not lost, and not of the student's network."""
    trainer = build(tmp_path, student, checkpointing, max_steps=1, max_grad_norm=0.0)
    run = trainer.e_step.run
    batches = rollouts(trainer)
    randomize(trainer)
    expected_for = {}

    class Kept(Exception):
        pass

    def keep():
        expected_for.update({n: p.grad.clone() for n, p in trainer.teacher.parameters.items() if p.grad is not None})
        raise Kept

    trainer.teacher.update = keep
    with pytest.raises(Kept):
        run(batches)
    assert all(p.grad is None for p in trainer.model.parameters())
    expected = oracle_gradients(trainer, batches, trainer.e_step.shift.value)
    assert expected_for.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 1e-6, name
        assert torch.allclose(expected_for[name], gradient, atol=1e-5, rtol=1e-3), name


def test_leaving_the_context_before_a_recomputing_backward_would_give_a_wrong_gradient(tmp_path):
    """The reason for one context: the trap is real here too."""
    trainer = build(tmp_path, checkpointing="recomputed", max_steps=1)
    batches = rollouts(trainer)
    randomize(trainer)
    with trainer.teacher.training_context():
        inside = trainer.scorer.sampled_logps(trainer.model, batches[0], teacher=True).sum()
        inside.backward()
        right = {n: p.grad.clone() for n, p in trainer.teacher.parameters.items()}
        trainer.teacher.optimizer.zero_grad()
    with trainer.teacher.training_context():
        outside = trainer.scorer.sampled_logps(trainer.model, batches[0], teacher=True).sum()
    try:
        outside.backward()
        wrong = {n: p.grad for n, p in trainer.teacher.parameters.items()}
    except (RuntimeError, torch.utils.checkpoint.CheckpointError):
        return  # torch noticed that other tensors were recomputed
    assert any(wrong[n] is None or not torch.allclose(wrong[n], right[n]) for n in right)


@every_student
def test_the_m_steps_gradient_is_the_students_alone_and_its_targets_are_the_teachers(tmp_path, student):
    trainer = build(tmp_path, student, max_steps=1)
    batches = rollouts(trainer)
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    plain = trainer._compute_loss(trainer.model, batches[0])
    randomize(trainer)
    with_adapter = trainer._compute_loss(trainer.model, batches[0])
    assert abs(with_adapter.item() - plain.item()) > 1e-3
    trainer.model.zero_grad()
    with_adapter.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in trainer.model.parameters())
    assert all(p.grad is None for p in trainer.teacher.parameters.values())


def test_the_adapters_optimizer_holds_the_adapter_and_the_students_holds_the_student(tmp_path):
    trainer = build(tmp_path)
    trainer.train()
    of_teacher = {id(p) for group in trainer.teacher.optimizer.param_groups for p in group["params"]}
    of_student = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert of_teacher == {id(p) for p in trainer.teacher.parameters.values()}
    assert of_student == {id(p) for p in trainer.model.parameters() if p.requires_grad}
    assert not of_teacher & of_student


def test_without_e_steps_a_lora_teacher_is_the_shared_one_to_the_bit(tmp_path):
    never = {"e_step_min_per_class": 1000}
    lora = build(tmp_path / "a", **never)
    lora.train()
    shared = tiny.trainer(tmp_path / "b", e_step_frequency=1, teacher_temperature=1.0, **never)
    shared.train()
    assert tiny.same(tiny.weights(lora), tiny.weights(shared))


@every_student
def test_the_memory_above_a_shared_teacher_is_the_adapter_and_its_optimizer_state(tmp_path, student):
    trainer = build(tmp_path, student)
    trainer.train()
    student_tensors = {p.data_ptr() for p in trainer.model.parameters()}
    own = {
        p.data_ptr(): p.nbytes
        for layer in trainer.teacher._layers
        for p in layer.teacher.parameters()
        if p.data_ptr() not in student_tensors
    }
    size = sum(p.nbytes for p in trainer.teacher.parameters.values())
    assert sum(own.values()) == size
    state = [v for s in trainer.teacher.optimizer.state.values() for v in s.values() if torch.is_tensor(v) and v.ndim]
    assert sum(v.nbytes for v in state) == 2 * size


@pytest.mark.parametrize("iterations", [1, 2])
def test_the_adapter_fades_once_after_each_rollout_batch(tmp_path, iterations):
    never = {"e_step_min_per_class": 1000, "num_iterations": iterations, "max_steps": 4}
    trainer = build(tmp_path, teacher_adapter_decay=0.25, **never)
    randomize(trainer)
    before = adapter(trainer)
    trainer.train()
    batches = 4 // iterations
    for name, now in adapter(trainer).items():
        kept = 0.75**batches if "lora_B" in name else 1.0  # of their product, which is all that matters
        assert torch.allclose(now, kept * before[name]), name


def test_dropout_of_the_adapter_acts_in_e_steps_and_not_in_targets(tmp_path):
    config = LoraConfig(r=4, lora_dropout=0.5, target_modules="all-linear")
    trainer = build(tmp_path, max_steps=1, teacher_peft_config=config)
    (batch, *_) = rollouts(trainer)
    randomize(trainer)

    def scores(call):
        return [call().detach() for _ in range(2)]

    with trainer.teacher.training_context():
        one, other = scores(lambda: trainer.scorer.sampled_logps(trainer.model, batch, teacher=True))
        assert not torch.equal(one, other)
        one, other = scores(lambda: trainer.scorer.frozen_logps(batch, teacher=True))
        assert torch.equal(one, other)
    mask = loss_mask(batch).bool()
    one, other = scores(lambda: trainer.scorer.distill(trainer.model, batch, mask).divergence)
    assert torch.equal(one, other)


def test_the_adapter_of_a_bfloat16_student_is_kept_in_float32(tmp_path):
    trainer = build(tmp_path, mdl=tiny.model(tiny.tokenizer()).to(torch.bfloat16))
    trainer.train()
    assert {p.dtype for p in trainer.teacher.parameters.values()} == {torch.float32}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}
    assert any(p.abs().max() > 0 for n, p in trainer.teacher.parameters.items() if "lora_B" in n)


def test_what_a_user_freezes_stays_frozen_and_what_is_replaced_is_frozen_too(tmp_path):
    """A wrapper of sharded training puts other parameters in the place of the first ones."""
    trainer = build(tmp_path)
    trainer.model.model.embed_tokens.weight.requires_grad_(False)
    layer = trainer.model.model.layers[0].mlp.gate_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
    with trainer.teacher.training_context():
        own = {id(p) for p in trainer.teacher.parameters.values()}
        assert not any(p.requires_grad for p in trainer.model.parameters() if id(p) not in own)
    assert not trainer.model.model.embed_tokens.weight.requires_grad
    assert layer.weight.requires_grad


OTHER_STUDENTS = {
    "head trained whole": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "a layer trained whole": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["up_proj"]),
    "tokens": LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[4, 5]),
}


@pytest.mark.parametrize("student", OTHER_STUDENTS)
def test_modules_that_the_student_trains_whole_stay_its_own(tmp_path, student):
    config = copy.deepcopy(OTHER_STUDENTS[student])
    tied = student == "a layer trained whole"
    tokenizer = tiny.tokenizer()
    model = tiny.model(tokenizer, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "base")
    trainer = build(tmp_path / "run", mdl=str(tmp_path / "base"), tok=tokenizer, peft_config=config)
    before = tiny.weights(trainer)
    structure = str(trainer.model)
    trainer.train()
    randomize(trainer, 0.1)
    assert str(trainer.model) == structure
    assert not tiny.same(before, tiny.weights(trainer))
    assert not any("modules_to_save" in n or "original_module" in n for n in trainer.teacher.parameters)
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    loaded = PeftModel.from_pretrained(loaded, tmp_path / "saved").merge_and_unload()
    with torch.no_grad():
        assert torch.allclose(loaded(prompt_ids()).logits, logits(trainer, teacher=False), atol=1e-5)
        teacher = PeftModel.from_pretrained(loaded, tmp_path / "saved" / "teacher" / "adapter")
        assert torch.allclose(teacher(prompt_ids()).logits, logits(trainer, teacher=True), atol=1e-5)


def moe(**changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "vocab_size": len(tiny.tokenizer())}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, **experts, **changes))


def test_a_mixture_of_experts_can_have_a_lora_teacher(tmp_path):
    trainer = build(tmp_path, mdl=moe(), teacher_peft_config=None)
    structure = str(trainer.model)
    changes = watched(trainer)
    trainer.train()
    assert ("e_step", True, False) in changes
    assert ("m_step", False, True) in changes
    assert str(trainer.model) == structure


def test_a_student_with_an_adapter_on_experts_is_refused(tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    with pytest.raises(ValueError, match="can't be put on top of that"):
        build(tmp_path, mdl=moe(), peft_config=config)


def test_the_best_students_teacher_comes_back_with_it(tmp_path):
    rewards = iter([1.0, 0.0, 0.0, 0.0])
    trainer = build(
        tmp_path,
        eval_dataset=tiny.dataset(4),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_reward",
        per_device_eval_batch_size=4,
        lr_scheduler_type="constant",
    )
    seen = []
    evaluate = trainer.evaluate

    def scripted(*args, **kwargs):
        seen.append(adapter(trainer))
        return evaluate(*args, **kwargs) | {"eval_reward": next(rewards)}

    trainer.evaluate = scripted
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    assert not tiny.same(seen[0], seen[2])
    now = adapter(trainer)
    # The decay after the rollout batch comes before the checkpoint, and the evaluation before both or after: by value
    saved = torch.load(tmp_path / "checkpoint-1" / "vpd_state.pt", weights_only=True)["teacher"]["adapter"]
    assert tiny.same(now, saved)


@pytest.mark.parametrize("save_teacher_adapter", [True, False])
def test_a_push_during_training_takes_the_teacher_that_goes_with_the_student(tmp_path, save_teacher_adapter):
    trainer = build(tmp_path, save_teacher_adapter=save_teacher_adapter, save_strategy="steps", save_steps=1)
    folder = tmp_path / "teacher" / "adapter"
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(b"of an earlier run")
    pushed = []

    def push(self, checkpoint):
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        weights = folder / "adapter_model.safetensors"
        pushed.append(load_file(weights) if weights.exists() else None)

    original = GRPOTrainer._push_from_checkpoint
    GRPOTrainer._push_from_checkpoint = push
    try:
        trainer.train()
        trainer._push_from_checkpoint(str(tmp_path / "checkpoint-3"))
    finally:
        GRPOTrainer._push_from_checkpoint = original
    if save_teacher_adapter:
        assert tiny.same(pushed[-1], adapter(trainer))
    else:
        assert pushed[-1] is None


class FakeClient:
    """Takes what a vLLM server would be sent."""

    def __init__(self):
        self.sent = []

    def update_named_params(self, metadata, params):
        sent = {name: value.detach().clone() for name, value in params}
        assert [name for name, _, _ in metadata] == list(sent)
        self.sent.append(sent)

    def reset_prefix_cache(self):
        pass


def sync_of(trainer):
    """TRL's own weight sync, to a client that records."""
    engine = object.__new__(VLLMGeneration)
    engine.__dict__.update(trainer.__dict__)
    engine.mode, engine.enable_sleep_mode, engine._weight_metadata = "server", False, None
    engine.vllm_client = FakeClient()
    return engine


@every_student
def test_weight_sync_sends_the_students_values_under_base_names_after_e_steps(tmp_path, student):
    trainer = build(tmp_path, student, lr_scheduler_type="constant")
    engine = sync_of(trainer)
    randomize(trainer)
    expected = []

    def generate(prompt_ids, *args, **kwargs):
        engine.sync_weights()
        merged = copy.deepcopy(trainer.model)
        merged = merged.merge_and_unload() if isinstance(merged, PeftModel) else merged
        expected.append(dict(merged.named_parameters()))
        return [[10 + i, 20] for i, _ in enumerate(prompt_ids)], None

    trainer._generate_single_turn = generate
    trainer.train()
    names = set(dict(tiny.model(tiny.tokenizer()).named_parameters()))
    assert len(engine.vllm_client.sent) == 3
    for sent, now in zip(engine.vllm_client.sent, expected, strict=True):
        assert set(sent) == names
        assert all(torch.allclose(value, now[name], atol=1e-6) for name, value in sent.items())
    first, last = engine.vllm_client.sent[0], engine.vllm_client.sent[-1]
    assert any(not torch.equal(first[name], last[name]) for name in names)


@every_student
def test_rollouts_and_evaluation_run_on_the_student_alone(tmp_path, student):
    trainer = build(tmp_path, student, eval_dataset=tiny.dataset(4), per_device_eval_batch_size=4)
    seen = []
    generate = trainer._generate_single_turn
    trainer._generate_single_turn = lambda *a, **k: (seen.append("teacher" in str(trainer.model)), generate(*a, **k))[
        1
    ]
    trainer.train()
    trainer.evaluate()
    assert len(seen) > 3
    assert not any(seen)


@every_student
def test_the_saved_adapter_makes_the_teacher_out_of_the_saved_student(tmp_path, student):
    base = tmp_path / "base"
    tokenizer = tiny.tokenizer()
    tiny.model(tokenizer).save_pretrained(base)
    trainer = build(tmp_path / "run", student, mdl=str(base), tok=tokenizer)
    trainer.train()
    randomize(trainer)
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved" if student == "full" else base, dtype=torch.float32
    )
    if student == "lora":
        loaded = PeftModel.from_pretrained(loaded, tmp_path / "saved").merge_and_unload()
    with torch.no_grad():
        assert torch.allclose(loaded(prompt_ids()).logits, logits(trainer, teacher=False), atol=1e-5)
        teacher = PeftModel.from_pretrained(loaded, tmp_path / "saved" / "teacher" / "adapter")
        assert torch.allclose(teacher(prompt_ids()).logits, logits(trainer, teacher=True), atol=1e-5)
    top = os.listdir(tmp_path / "saved")
    assert ("adapter_model.safetensors" in top) is (student == "lora")


def test_a_run_without_an_adapter_leaves_none_of_an_earlier_run_beside_its_model(tmp_path):
    folder = tmp_path / "saved" / "teacher" / "adapter"
    build(tmp_path).save_model(str(tmp_path / "saved"))
    assert folder.exists()
    tiny.trainer(tmp_path).save_model(str(tmp_path / "saved"))
    assert not folder.exists()


@pytest.mark.parametrize("save_teacher_adapter", [True, False])
def test_the_adapter_can_be_left_out_of_what_is_saved_and_pushed(tmp_path, save_teacher_adapter):
    trainer = build(tmp_path, save_teacher_adapter=save_teacher_adapter)
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "teacher").exists() is save_teacher_adapter


def test_a_resumed_adapter_of_another_form_is_refused(tmp_path):
    trainer = build(tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    other = LoraConfig(r=2, target_modules=["q_proj"])
    with pytest.raises(ValueError, match="Resume with the same teacher_peft_config"):
        build(tmp_path, teacher_peft_config=other).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_the_callers_adapter_configuration_is_left_as_it_was(tmp_path):
    config = LoraConfig(r=4, target_modules="all-linear")
    trainer = build(tmp_path, teacher_peft_config=config)
    assert config.target_modules == "all-linear"
    assert len(trainer.teacher.parameters) == 28


def test_a_lora_teacher_needs_no_configuration(tmp_path):
    trainer = build(tmp_path, teacher_peft_config=None)
    trainer.train()
    assert {p.shape[0] for n, p in trainer.teacher.parameters.items() if "lora_A" in n} == {16}


REFUSED = [
    ({"use_dora": True}, "use_dora must be False"),
    ({"bias": "all"}, "bias must be 'none'"),
    ({"modules_to_save": ["up_proj"]}, "modules_to_save must be None"),
    ({"trainable_token_indices": [4]}, "trainable_token_indices must be None"),
    ({"layer_replication": [(0, 1), (0, 1)]}, "layer_replication must be None"),
    ({"alora_invocation_tokens": [4]}, "alora_invocation_tokens must be None"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights must be True or 'gaussian'"),
    ({"init_lora_weights": False}, "init_lora_weights must be True or 'gaussian'"),
    ({"target_modules": ["q_proj", "lm_head"]}, "adapts the output head"),
]


@pytest.mark.parametrize(
    ("change", "message"), REFUSED, ids=lambda change: str(change) if isinstance(change, dict) else ""
)
def test_an_adapter_that_would_not_follow_the_student_is_refused(tmp_path, change, message):
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **change})
    with pytest.raises(ValueError, match=message):
        build(tmp_path, teacher_peft_config=config)


def test_an_adapter_is_refused_where_nothing_would_train_or_use_it(tmp_path):
    with pytest.raises(ValueError, match="teacher='lora' has an adapter that only an E-step trains"):
        build(tmp_path, method="sdpo")
    with pytest.raises(ValueError, match="teacher_peft_config is for teacher='lora'"):
        tiny.trainer(tmp_path, teacher_peft_config=ADAPTER)
    with pytest.raises(TypeError, match=r"must be a peft\.LoraConfig; got str"):
        build(tmp_path, teacher_peft_config="lora")


@pytest.mark.parametrize("learning_rate", [None, 5e-3])
def test_the_adapters_learning_rate_follows_the_students_schedule(tmp_path, learning_rate):
    trainer = build(tmp_path, e_step_learning_rate=learning_rate, learning_rate=1e-3, max_steps=4)
    step, seen = trainer.teacher.optimizer.step, []

    def spy():
        seen.append((trainer.optimizer.param_groups[0]["lr"], trainer.teacher.optimizer.param_groups[0]["lr"]))
        step()

    trainer.teacher.optimizer.step = spy
    trainer.train()
    factor = 10.0 if learning_rate is None else 5.0
    assert len(seen) == 4
    assert all(inside == pytest.approx(factor * outside) for outside, inside in seen)
    assert seen[0][1] > seen[-1][1], "linear decay"
