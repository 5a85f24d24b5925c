"""Vision-language models: student and teacher see the same images, and each row its own."""

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from PIL import Image

from tests import tiny, tiny_vision
from vpd_trl import Feedback
from vpd_trl.batch import pieces_of, rows_of
from vpd_trl.evaluation import Evaluation
from vpd_trl.feedback import SelfCritiqueFeedback
from vpd_trl.prompts import check_images, check_prompt
from vpd_trl.text import with_text


@pytest.fixture(params=tiny_vision.MODELS)
def vision(request):
    torch.manual_seed(0)
    return tiny_vision.MODELS[request.param]()


def build(tmp_path, vision, *, data=None, **changes):
    model, processor = vision
    data = tiny_vision.dataset() if data is None else data
    return tiny.trainer(tmp_path, tok=processor, mdl=model, data=data, **{"max_steps": 1, **changes})


def alone(trainer, processor, prompt, images, completion):
    """Log-probabilities (T,) of a completion behind one prompt, without padding or other rows."""
    text = processor.apply_chat_template(prompt, add_generation_prompt=True)
    inputs = processor(text=[text], images=[images] if images else None, return_tensors="pt")
    for name, value in inputs.items():
        if value.dim() == 2 and name != "pixel_values":
            tail = torch.ones_like(completion) if name == "attention_mask" else torch.zeros_like(completion)
            inputs[name] = torch.cat([value, completion[None] if name == "input_ids" else tail[None]], dim=1)
    with torch.no_grad():
        logits = trainer.model(**inputs).logits[0, -len(completion) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, completion[:, None]).squeeze(-1)


def with_images(prompt, images):
    parts = [{"type": "image"} for _ in images]
    return [{**prompt[0], "content": [*parts, {"type": "text", "text": prompt[0]["content"]}]}]


def feedback_but_for_one(answer, **kwargs):
    return [None if a == "1" else f"It is {a}." for a in answer]


def test_student_and_teacher_score_each_row_with_its_own_images(tmp_path, vision):
    data = tiny_vision.dataset(4)
    trainer = build(tmp_path, vision, data=data, feedback_fn=feedback_but_for_one, num_generations=2)
    trainer.train()
    trainer.model.eval()
    processor, questions = trainer.processing_class, {row["prompt"][0]["content"]: row for row in data}
    asked = []
    for batch in trainer._buffered_inputs:
        scores = [trainer.scorer.frozen_logps(batch, teacher=teacher) for teacher in (False, True)]
        for i, mask in enumerate(batch["completion_mask"].bool()):
            completion = batch["completion_ids"][i][mask]
            text = trainer._tokenizer.decode(batch["prompt_ids"][i])
            row = next(row for question, row in questions.items() if question in text)
            prompt = with_images(row["prompt"], row["images"])
            expected = alone(trainer, processor, prompt, row["images"], completion)
            torch.testing.assert_close(scores[0][i][mask], expected)
            asked.append(row["answer"])
            assert batch["has_feedback"][i] == (row["answer"] != "1")
            if batch["has_feedback"][i]:
                critique = Feedback(critique=f"It is {row['answer']}.")
                shown = trainer.prompt_builder.render(prompt, critique)
                expected = alone(trainer, processor, shown, row["images"], completion)
                torch.testing.assert_close(scores[1][i][mask], expected)
    assert sorted(asked) == ["0", "0", "1", "1", "2", "2", "3", "3"]


def test_other_images_change_what_their_own_rows_score(tmp_path, vision):
    trainer = build(tmp_path, vision)
    trainer.train()
    batch = trainer._buffered_inputs[0]
    changed = dict(batch, pixel_values=batch["pixel_values"].clone())
    changed["pixel_values"][1] += 1
    for teacher in (False, True):
        before, after = (trainer.scorer.frozen_logps(b, teacher=teacher) for b in (batch, changed))
        differs = (before != after).any(dim=1).tolist()
        assert differs == [False, True, False, False]


def test_an_image_behind_the_last_token_of_the_student_s_own_is_no_obstacle(tmp_path):
    """As in a last tool result that the student wrote nothing after."""
    model, processor = tiny_vision.llava()
    trainer = build(tmp_path, (model, processor))
    trainer.train()
    batch = dict(trainer._buffered_inputs[0])
    n, image = len(batch["completion_ids"]), processor.tokenizer.convert_tokens_to_ids("<image>")
    completion = torch.tensor([[5, 6, *[image] * 4]] * n)
    batch |= {"completion_ids": completion, "completion_mask": torch.ones_like(completion)}
    batch |= {"tool_mask": torch.tensor([[1, 1, 0, 0, 0, 0]] * n), "num_images": [2] * n}
    batch["pixel_values"] = batch["pixel_values"].repeat_interleave(2, dim=0)
    trainer.model.eval()
    inputs = {
        "input_ids": torch.cat([batch["prompt_ids"], completion], dim=1),
        "attention_mask": torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
    }
    with torch.no_grad():
        logits = trainer.model(**inputs, pixel_values=batch["pixel_values"]).logits[:, -7:-5]
    expected = logits.log_softmax(-1).gather(-1, completion[:, :2, None]).squeeze(-1)
    torch.testing.assert_close(trainer.scorer.frozen_logps(batch)[:, :2], expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "sdpo", "teacher": "ema"},
        {"method": "joint_loss"},
        {"method": "advantage_reshaping"},
        {"teacher": "lora", "teacher_peft_config": LoraConfig(r=2, target_modules=["q_proj", "v_proj"])},
        {"peft_config": LoraConfig(r=2, target_modules=["q_proj", "v_proj"]), "prior": "fixed"},
        {"gradient_checkpointing": True},
    ],
    ids=lambda changes: " ".join(changes),
)
def test_every_method_and_teacher_trains_on_images(tmp_path, vision, changes):
    trainer = build(tmp_path, vision, max_steps=2, feedback_fn=feedback_but_for_one, **changes)
    before = tiny.weights(trainer)
    trainer.train()
    assert not tiny.same(before, tiny.weights(trainer))
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert all(torch.isfinite(torch.tensor([row["loss"], row["grad_norm"]])).all() for row in rows)


def test_a_feedback_function_that_asks_the_student_shows_it_the_image(tmp_path, vision):
    critique = SelfCritiqueFeedback()
    trainer = build(tmp_path, vision, feedback_fn=critique, reward_funcs=lambda **k: [0.0] * 8)
    asked, sample = [], trainer._generate_single_turn

    def noted(prompt_ids, images, fields, num_generations):
        asked.append((len(prompt_ids), images, fields["pixel_values"]))
        return sample(prompt_ids, images, fields, num_generations)

    trainer._generate_single_turn = noted
    trainer.train()
    (n, images, pixels), (m, images_again, pixels_again) = asked
    assert n == m == 8
    assert images == images_again
    assert torch.equal(torch.as_tensor(pixels), torch.as_tensor(pixels_again))


def test_a_model_of_text_alone_is_not_given_images_silently(tmp_path):
    with pytest.raises(ValueError, match=r"has images \(images\), but the model is shown text alone"):
        tiny.trainer(tmp_path, data=tiny_vision.dataset())
    with pytest.raises(ValueError, match=r"has images \(images\)"):
        tiny.trainer(tmp_path, eval_dataset={"a": tiny_vision.dataset(4)}, per_device_eval_batch_size=4)
    stream = IterableDataset.from_generator(lambda: iter(tiny_vision.dataset()))
    with pytest.raises(ValueError, match=r"has images \(images\)"):
        tiny.trainer(tmp_path, data=stream)


@pytest.mark.parametrize("column", ["image", "images"])
def test_an_evaluation_that_would_not_see_its_images_is_refused(tmp_path, column):
    rows = [{"prompt": "Colour?", column: Image.new("RGB", (2, 2))}]
    with pytest.raises(ValueError, match=rf"problems have images \({column}\), but .* text alone.*eval_dataset"):
        Evaluation(rows, tiny.parity_reward)


@pytest.mark.parametrize("empty", [None, []])
def test_rows_without_images_among_others_are_refused_before_processes_wait_for_each_other(tmp_path, empty):
    def tiny_image():
        return Image.new("RGB", (28, 28))

    with_image, without = {"prompt": "a", "images": [tiny_image()]}, {"prompt": "b", "images": empty}
    check_images([with_image] * 2, alone=False)
    check_images([{"prompt": "text alone"}] * 2, alone=False)
    check_images([without] * 2, alone=True)
    with pytest.raises(ValueError, match=r"^1 of 2 rows .* nothing in images.*each row an image"):
        check_images([with_image, without], alone=True)
    with pytest.raises(ValueError, match=r"^2 of 2 rows"):
        check_images([without] * 2, alone=False)
    rows = tiny_vision.dataset(4).to_list()
    data = Dataset.from_list([{**row, "images": empty if i == 1 else [tiny_image()]} for i, row in enumerate(rows)])
    with pytest.raises(ValueError, match="can't be mixed"):
        build(tmp_path, tiny_vision.llava(), data=data, num_generations=2).train()


def test_rows_take_along_the_pixels_of_their_images_in_every_layout():
    ids = torch.arange(3)[:, None]
    base = {"completion_ids": ids, "scale": torch.tensor(2.0), "num_images": [2, 0, 1]}
    # As Qwen-VL has them: the patches of all images one behind the other, grids of unequal size
    grid = base | {
        "pixel_values": torch.arange(6 + 2 + 4)[:, None],
        "image_grid_thw": torch.tensor([[1, 2, 3], [1, 1, 2], [1, 2, 2]]),
    }
    some = rows_of(grid, torch.tensor([2, 0]))
    assert some["pixel_values"].flatten().tolist() == [8, 9, 10, 11, 0, 1, 2, 3, 4, 5, 6, 7]
    assert some["image_grid_thw"].tolist() == [[1, 2, 2], [1, 2, 3], [1, 1, 2]]
    assert some["num_images"] == [1, 2]
    # One row of pixels for each image
    flat = base | {"pixel_values": torch.arange(3)[:, None], "image_sizes": torch.arange(3)[:, None]}
    pieces = pieces_of(flat, 2)
    assert [piece["pixel_values"].flatten().tolist() for piece in pieces] == [[0, 1], [2]]
    assert [piece["image_sizes"].flatten().tolist() for piece in pieces] == [[0, 1], [2]]
    # One row of pixels for each row
    padded = {"completion_ids": ids, "num_images": [2, 2, 2], "pixel_values": torch.arange(3)[:, None]}
    assert rows_of(padded, slice(1, 3))["pixel_values"].flatten().tolist() == [1, 2]


def test_images_keep_their_places_in_the_teachers_prompt_and_other_parts_are_refused():
    image = {"type": "image", "image": Image.new("RGB", (2, 2))}
    message = {"role": "user", "content": [{"type": "text", "text": "a"}, image, {"type": "text", "text": "b"}]}
    assert with_text(message, "new")["content"] == [{"type": "text", "text": "new"}, image]
    assert with_text({"role": "user", "content": [image]}, "new")["content"] == [
        image,
        {"type": "text", "text": "new"},
    ]
    assert len(message["content"]) == 3
    check_prompt([message])
    with pytest.raises(ValueError, match=r"Only text and images .* type \['video'\]"):
        check_prompt([{"role": "user", "content": [{"type": "video"}]}])
