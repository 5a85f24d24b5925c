"""TRL's private surface moves between versions: each hook that this library uses is named here, with its form."""

import inspect

import pytest
import trl
from transformers import Trainer
from trl import GRPOTrainer
from trl.kernels import ChunkedLogProbFunction, chunked_divergence, chunked_logprob
from trl.models.utils import _ForwardRedirection
from trl.trainer import utils

from tests import tiny
from vpd_trl import VPDTrainer


HOOKS = [
    (GRPOTrainer._generate, "self prompts"),
    (GRPOTrainer._calculate_rewards, "self inputs prompts completions completion_ids_list"),
    (GRPOTrainer._generate_and_score_completions, "self inputs"),
    (GRPOTrainer._prepare_inputs, "self generation_batch"),
    (GRPOTrainer._compute_loss, "self model inputs"),
    (
        GRPOTrainer._get_per_token_logps_and_entropies,
        "self model input_ids attention_mask logits_to_keep batch_size compute_entropy compute_aux_loss pixel_values "
        "image_grid_thw num_images pixel_attention_mask spatial_shapes num_tiles image_sizes token_type_ids "
        "mm_token_type_ids image_position_ids",
    ),
    (GRPOTrainer._tokenize_prompts, "self prompts"),
    (GRPOTrainer._log_completion_extra, "self column values"),
    (GRPOTrainer._log_metric, "self name value"),
    (GRPOTrainer._get_train_sampler, "self dataset"),
    (GRPOTrainer._save_checkpoint, "self model trial"),
    (GRPOTrainer._load_optimizer_and_scheduler, "self checkpoint"),
    (GRPOTrainer.training_step, "self model inputs num_items_in_batch"),
    (Trainer.get_batch_samples, "self epoch_iterator num_batches device"),
    (Trainer._get_output_dir, "self trial"),
    (GRPOTrainer.create_model_card, "self model_name dataset_name tags"),
    (Trainer._push_from_checkpoint, "self checkpoint_folder"),
    (Trainer.push_to_hub, "self commit_message blocking token revision private kwargs"),
    (Trainer._load_best_model, "self"),
    (Trainer.train, "self resume_from_checkpoint trial ignore_keys_for_eval"),
    (Trainer._load_from_checkpoint, "self resume_from_checkpoint model"),
    (Trainer.evaluate, "self eval_dataset ignore_keys metric_key_prefix"),
    (Trainer.save_model, "self output_dir _internal_call"),
    (Trainer.get_optimizer_cls_and_kwargs, "args model"),
    (utils.get_callable_name, "func"),
    (utils.is_async_callable, "func"),
    (utils.split_pixel_values_by_grid, "batch"),
    (utils.unsplit_pixel_values_by_grid, "batch"),
    (utils.start_event_loop_in_daemon, "name"),
    (utils.shutdown_event_loop_in_daemon, "thread loop"),
    (_ForwardRedirection.__call__, "self wrapper_module original_module method args kwargs"),
    (chunked_divergence._project, "tile hidden_chunk weight bias start end dtype"),
    (chunked_logprob._addmm_fp32, "acc a b"),
    (utils.maybe_gather_lm_head_ctx, "params"),
    (
        ChunkedLogProbFunction.forward,
        "ctx hidden weight bias targets temperature chunk_size final_logit_softcapping logit_scale outputs",
    ),
]


@pytest.mark.parametrize(("function", "names"), HOOKS, ids=lambda x: getattr(x, "__qualname__", ""))
def test_a_hook_has_the_form_that_this_library_expects(function, names):
    assert list(inspect.signature(function).parameters) == names.split()


def test_single_turn_generation_takes_what_generate_passes():
    names = list(inspect.signature(GRPOTrainer._generate_single_turn).parameters)
    assert names[:5] == ["self", "prompt_ids", "images", "multimodal_fields", "num_generations"]


def test_trl_is_of_the_supported_series():
    assert trl.__version__.startswith("1.16.")


def test_the_trainer_has_the_attributes_that_this_library_reads(tmp_path):
    trainer = tiny.trainer(tmp_path, max_steps=1)
    trainer.train()
    for name in [
        "_step",
        "_buffered_inputs",
        "_metrics",
        "_tokenizer",
        "_is_vlm",
        "_dist",
        "_current_train_step_time",
        "aux_loss_enabled",
        "temperature",
        "num_iterations",
        "num_generations",
        "reward_weights",
        "chat_template",
        "chat_template_kwargs",
        "model_wrapped",
        "current_gradient_accumulation_steps",
        "generation_config",
        "eos_token_ids",
        "log_completions",
        "reward_func_names",
    ]:
        assert hasattr(trainer, name), name
    batch = trainer._buffered_inputs[0]
    assert {"prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "num_items_in_batch"} <= batch.keys()


@pytest.mark.parametrize("method", [Trainer.push_to_hub, Trainer._push_from_checkpoint], ids=lambda m: m.__name__)
def test_a_push_tells_callbacks_before_it_reads_files(method):
    source = inspect.getsource(method)
    assert 0 < source.index("callback_handler.on_push_begin(") < source.index("upload_folder(")


def test_trls_record_of_the_rollouts_has_the_parts_of_its_completions_table(tmp_path):
    trainer = tiny.trainer(tmp_path)
    assert {"prompt", "completion", "rewards", "extra", "advantages"} <= trainer._logs.keys()


def test_the_trainer_takes_what_grpotrainer_takes_in_its_order():
    ours, theirs = (list(inspect.signature(c.__init__).parameters) for c in (VPDTrainer, GRPOTrainer))
    assert ours == [*theirs, "feedback_fn", "teacher_peft_config", "evaluation"]
