"""Tiny vision-language models with their processors."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen3Config,
    SiglipVisionConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor
from transformers.models.llava.processing_llava import LlavaProcessor

from tests import tiny


VISION = dict(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=28,
    patch_size=14,
    projection_dim=16,
)
TEXT = {**tiny.SHAPE, "max_position_embeddings": 4096}


def _tokenizer(image: str, *added: str) -> Any:
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(list(added), special_tokens=True)
    part = "{{ part['text'] }}"
    with_images = "{% if part['type'] == 'image' %}" + image + "{% else %}" + part + "{% endif %}"
    tokenizer.chat_template = tiny.CHAT_TEMPLATE.replace(part, with_images)
    return tokenizer


def llava() -> tuple[Any, Any]:
    """One row of pixels for each image, no token types."""
    tokenizer = _tokenizer("<image>", "<image>")
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )
    text = Qwen3Config(vocab_size=len(tokenizer), eos_token_id=2, pad_token_id=0, bos_token_id=None, **TEXT)
    token = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=text, image_token_id=token, image_seq_length=4
    )
    return LlavaForConditionalGeneration(config), processor


def gemma() -> tuple[Any, Any]:
    """One row of pixels for each image, and token types."""
    tokens = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer = _tokenizer("<start_of_image>", *tokens.values())
    ids = {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}
    for name, value in (tokens | ids).items():
        setattr(tokenizer, name, value)
    processor = Gemma3Processor(
        image_processor=Gemma3ImageProcessorPil(size={"height": 28, "width": 28}),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=tokenizer.chat_template,
    )
    text = Gemma3TextConfig(vocab_size=len(tokenizer), eos_token_id=2, pad_token_id=0, bos_token_id=None, **TEXT)
    vision = SiglipVisionConfig(**{k: v for k, v in VISION.items() if k != "projection_dim"})
    config = Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=4,
        boi_token_index=ids["boi_token_id"],
        eoi_token_index=ids["eoi_token_id"],
        image_token_id=ids["image_token_id"],
        eos_token_id=2,
    )
    return Gemma3ForConditionalGeneration(config), processor


MODELS = {"llava": llava, "gemma": gemma}


def dataset(n: int = 16) -> Dataset:
    """Questions on squares of one colour each."""
    images = [Image.new("RGB", (28, 28), (16 * i % 256, 255 - 16 * i % 256, 128)) for i in range(n)]
    return Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": f"Colour {i}?"}] for i in range(n)],
            "images": [[image] for image in images],
            "answer": [str(i) for i in range(n)],
        }
    )
