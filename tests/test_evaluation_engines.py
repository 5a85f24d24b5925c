"""The engines sample what they are told to, and nothing of a model's own settings gets in."""

import sys
import types

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from tests import tiny
from vpd_trl.evaluation import Evaluation, Sampling, TransformersEngine, VLLMEngine
from vpd_trl.evaluation.transformers_engine import _Draw, weights_digest
from vpd_trl.evaluation.vllm_engine import files_digest


PROMPTS = ["1+1=", "a much longer question than the others: 2+2=", "3+", "what?"]
SEEDS = [11, 22, 33, 44]
SHORT = Sampling(max_new_tokens=8)


def engine(model=None, tok=None, **changes):
    tok = tok or tiny.tokenizer()
    return TransformersEngine(tiny.model(tok) if model is None else model, tok, **changes)


def sample(engine, prompts=PROMPTS, seeds=SEEDS, *, k=3, sampling=SHORT):
    return engine.generate(prompts, k=k, sampling=sampling, seeds=seeds)


def tokens(samples):
    return [[s.ids for s in group] for group in samples]


# ---- Randomness


def test_a_token_is_drawn_as_often_as_its_probability_says():
    probabilities = torch.tensor([0.0, 0.3, 0.0, 0.45, 0.25, 0.0])
    uniform = (torch.arange(1000, dtype=torch.float64)[:, None] + 0.5) / 1000
    left = _Draw(2, uniform)(torch.zeros(1000, 2, dtype=torch.long), probabilities.log().expand(1000, -1))
    drawn = left.argmax(dim=-1)
    assert torch.bincount(drawn, minlength=6).tolist() == [0, 300, 0, 450, 250, 0]
    assert (left.isfinite().sum(dim=-1) == 1).all(), "nothing else can be taken"
    ends = _Draw(0, torch.tensor([[0.0], [1 - 2**-53], [1.0]], dtype=torch.float64))
    assert ends(torch.zeros(3, 0), probabilities.log().expand(3, -1)).argmax(dim=-1).tolist() == [1, 4, 4]


def test_samples_follow_the_model_s_distribution_at_the_temperature_and_within_top_p(tokenizer, model):
    sampling = Sampling(temperature=0.6, top_p=0.8, max_new_tokens=1)
    model.lm_head.weight.data *= 5  # an untrained model is nearly uniform
    groups = sample(engine(model, tokenizer, batch_size=1000), ["1+1="], [5], k=4000, sampling=sampling)
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer("1+1=")["input_ids"]])).logits[0, -1].double()
    p, order = (logits / 0.6).softmax(-1).sort(descending=True)
    kept = order[: int((p.cumsum(0) < 0.8).sum()) + 1]
    expected = torch.zeros(len(logits), dtype=torch.double)
    expected[kept] = p[: len(kept)] / p[: len(kept)].sum()
    counts = np.bincount([s.ids[0] for s in groups[0]], minlength=len(logits))
    assert 5 < len(kept) < len(logits) / 2
    assert set(np.flatnonzero(counts)) <= set(kept.tolist())
    error = 5 * np.sqrt(expected.numpy() * (1 - expected.numpy()) / 4000) + 1e-9
    assert (np.abs(counts / 4000 - expected.numpy()) < error).all()


@pytest.mark.parametrize("changes", [{"top_k": 2}, {"min_p": 0.999999}, {"top_p": 1e-6}], ids=str)
def test_top_k_min_p_and_top_p_cut_what_is_sampled_from(changes):
    groups = sample(engine(), ["1+1="], [5], k=50, sampling=Sampling(temperature=2.0, max_new_tokens=1, **changes))
    assert len({s.ids[0] for s in groups[0]}) == changes.get("top_k", 1)


def test_a_sample_depends_on_its_seed_and_number_alone():
    reference = sample(engine())
    flat = [tuple(ids) for group in tokens(reference) for ids in group]
    assert len(set(flat)) == len(flat), "all differ"
    for batch_size in (1, 2, 5, 100):
        assert sample(engine(batch_size=batch_size)) == reference
    assert sample(engine(), PROMPTS[::-1], SEEDS[::-1]) == reference[::-1]
    assert sample(engine(), PROMPTS[2:3], SEEDS[2:3], k=2)[0] == reference[2][:2]
    assert sample(engine(), ["3+"], [34]) != [reference[2]]


def test_the_random_state_of_the_process_is_neither_read_nor_changed():
    torch.manual_seed(0)
    first = sample(engine())
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = engine()
    torch.set_rng_state(before)
    assert sample(one) == first
    assert torch.equal(torch.get_rng_state(), before)


def test_temperature_0_takes_the_most_likely_token(tokenizer, model):
    groups = sample(engine(model, tokenizer), sampling=Sampling(temperature=0, max_new_tokens=8))
    for prompt, group in zip(PROMPTS, groups, strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        with torch.no_grad():
            expected = model.generate(ids, do_sample=False, max_new_tokens=8, attention_mask=torch.ones_like(ids))
        assert [s.ids for s in group] == [expected[0, ids.size(1) :].tolist()] * 3


# ---- What the model brings along


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_model_s_generation_config_has_no_say(tokenizer, wrapped):
    def fresh():
        model = tiny.model(tokenizer)
        adapter = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(model, adapter) if wrapped else model

    reference = sample(engine(fresh(), tokenizer))
    model = fresh()
    theirs = GenerationConfig(
        do_sample=True,
        temperature=2.0,
        top_k=1,
        top_p=0.1,
        repetition_penalty=5.0,
        no_repeat_ngram_size=1,
        suppress_tokens=list(range(4, 60)),
        min_new_tokens=8,
        max_length=3,
        eos_token_id=tokenizer.eos_token_id,
    )
    (model.get_base_model() if wrapped else model).generation_config = theirs
    assert sample(engine(model, tokenizer)) == reference
    assert model.generation_config is theirs


def test_every_end_token_of_the_model_ends_a_completion(tokenizer, model):
    free = sample(engine(model, tokenizer), k=20)
    common = int(np.bincount([i for group in free for s in group for i in s.ids]).argmax())
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, common]
    model.generation_config.pad_token_id = None
    ended = sample(engine(model, tokenizer), k=20)
    assert any(s.finished for group in ended for s in group)
    for before, after in zip((s for group in free for s in group), (s for group in ended for s in group), strict=True):
        cut = before.ids[: before.ids.index(common) + 1] if common in before.ids else before.ids
        assert after.ids == cut
        assert after.finished == (after.ids[-1] in (common, tokenizer.eos_token_id))
        assert after.text == tokenizer.decode(cut, skip_special_tokens=True)


@pytest.mark.parametrize("pad_is_end", [False, True])
def test_a_completion_stops_at_the_end_of_the_context_unfinished(pad_is_end):
    tok = tiny.tokenizer()
    if pad_is_end:
        tok.pad_token = tok.eos_token
    model = tiny.model(tok, max_position_embeddings=20)
    prompts = ["x" * 17, "x" * 12, "x" * 20, "x" * 30]
    never_ends = model.get_input_embeddings().weight
    never_ends.data[tok.eos_token_id] = 0  # its logit is 0, far below the others' best
    model.lm_head.weight.data *= 20
    groups = sample(engine(model, tok), prompts, sampling=Sampling(max_new_tokens=6))
    assert [[len(s.ids) for s in group] for group in groups] == [[3] * 3, [6] * 3, [0] * 3, [0] * 3]
    assert not any(s.finished for group in groups for s in group)
    assert [s.text for s in groups[3]] == [""] * 3


def test_conversations_go_through_the_chat_template_with_thinking_off(tokenizer, model):
    seen = []
    generate = model.generate
    model.generate = lambda **kwargs: (seen.append(kwargs["input_ids"][0].tolist()), generate(**kwargs))[1]
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "1+1="}]},
    ]
    one = engine(model, tokenizer)
    sample(one, [chat], [1], k=1)
    sample(one, [chat], [1], k=1, sampling=Sampling(max_new_tokens=8, chat_template_kwargs={}))
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1=<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(seen[0]) == text + "<think>\n\n</think>\n\n"
    assert tokenizer.decode(seen[1]) == text


def test_conversations_without_a_template_and_images_are_refused(tokenizer, model):
    one = engine(model, tokenizer)
    image = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    with pytest.raises(ValueError, match="Only text"):
        sample(one, [image], [1])
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        sample(one, [[{"role": "user", "content": "1+1="}]], [1])


def test_dropout_is_off_while_sampling_and_the_model_s_mode_comes_back(tokenizer):
    model = tiny.model(tokenizer, attention_dropout=0.9)
    reference = sample(engine(model.eval(), tokenizer))
    model.train()
    model.model.layers[0].eval()
    assert sample(engine(model, tokenizer)) == reference
    assert model.training
    assert not model.model.layers[0].training


def test_a_batch_that_does_not_fit_in_memory_is_halved_until_it_does(tokenizer, model, caplog):
    reference = sample(engine(model, tokenizer))
    generate, sizes = model.generate, []

    def short_of_memory(**kwargs):
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return generate(**kwargs)

    model.generate = short_of_memory
    one = engine(model, tokenizer, batch_size=8)
    assert sample(one) == reference
    assert sizes == [8, 4, 2, 2, 2, 2, 2, 2]
    assert "8 completions at once don't fit in memory" in caplog.text
    one.collective = True
    sizes.clear()
    one.batch_size = 8
    with pytest.raises(torch.OutOfMemoryError):
        sample(one)
    assert sizes == [8], "processes that work together must not repeat anything alone"


def test_an_error_that_is_not_about_memory_is_raised(tokenizer, model):
    def broken(**kwargs):
        raise RuntimeError("shapes do not match")

    model.generate = broken
    with pytest.raises(RuntimeError, match="shapes do not match"):
        sample(engine(model, tokenizer))


# ---- Models by name, and which one it was


def test_a_model_and_an_adapter_are_loaded_from_their_folders(tmp_path, tokenizer, model):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    loaded = TransformersEngine(str(tmp_path / "model"), dtype=torch.float32)
    assert sample(loaded) == sample(engine(model, tokenizer))
    assert loaded.describe()["model"] == str(tmp_path / "model")
    adapter = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    tuned = get_peft_model(TransformersEngine(str(tmp_path / "model")).model, adapter)
    tuned.save_pretrained(tmp_path / "adapter")
    with_adapter = TransformersEngine(str(tmp_path / "adapter"), str(tmp_path / "model"))
    assert sample(with_adapter) == sample(engine(tuned, tokenizer)) != sample(loaded)
    with pytest.raises(ValueError, match="tokenizer is needed"):
        TransformersEngine(model)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        engine(batch_size=0)


def test_results_of_a_model_that_was_trained_on_in_the_same_folder_are_refused(tmp_path, tokenizer, model):
    run = Evaluation(tiny.dataset(4), tiny.parity_reward, k=2, sampling=SHORT)
    run.run(engine(model, tokenizer), tmp_path / "results", progress=False)
    run.run(engine(tiny.model(tokenizer), tokenizer), tmp_path / "results", progress=False)
    for parameter in model.parameters():
        parameter.data *= 1.01
    with pytest.raises(ValueError, match=r"model\.weights is .* there and .* here"):
        run.run(engine(model, tokenizer), tmp_path / "results", progress=False)


def test_the_digest_of_weights_sees_a_change_and_not_the_device_s_rounding(tokenizer, model):
    before = weights_digest(model)
    assert before == weights_digest(tiny.model(tokenizer))
    assert before != weights_digest(tiny.model(tokenizer).to(torch.bfloat16))
    model.model.norm.weight.data += 1e-6
    assert before != weights_digest(model)


def test_the_digest_of_files_sees_other_weights_of_the_same_size(tmp_path, tokenizer, model):
    model.save_pretrained(tmp_path)
    before = files_digest(str(tmp_path))
    model.save_pretrained(tmp_path)
    assert files_digest(str(tmp_path)) == before
    tiny.model(tokenizer, seed=1).save_pretrained(tmp_path)
    assert files_digest(str(tmp_path)) != before
    assert files_digest("somebody/model") is None


# ---- vLLM


@pytest.fixture
def vllm(monkeypatch):
    """A module with the part of vLLM's interface that is used, which notes its calls and answers with the seeds."""
    module = types.ModuleType("vllm")
    module.calls = []

    class SamplingParams:
        def __init__(self, **kwargs):
            self.__dict__ = kwargs

    class LLM:
        def __init__(self, model, **kwargs):
            module.calls.append(("LLM", model, kwargs))
            config = types.SimpleNamespace(max_model_len=kwargs.get("max_model_len", 512))
            self.llm_engine = types.SimpleNamespace(model_config=config)

        def get_tokenizer(self):
            return tiny.tokenizer()

        def generate(self, prompts, sampling_params, use_tqdm):
            for params in sampling_params:
                if params.temperature == 0 and params.n > 1:
                    raise ValueError("n must be 1 when using greedy sampling")
            module.calls.append(("generate", prompts, sampling_params, use_tqdm))
            eos = tiny.tokenizer().eos_token_id
            return [
                types.SimpleNamespace(
                    outputs=[
                        types.SimpleNamespace(
                            token_ids=(20 + params.seed % 7 + i, eos) if i else (20,),
                            finish_reason="stop" if i else "length",
                        )
                        for i in range(params.n)
                    ]
                )
                for params in sampling_params
            ]

    module.LLM, module.SamplingParams = LLM, SamplingParams
    monkeypatch.setitem(sys.modules, "vllm", module)
    return module


def test_vllm_gets_token_ids_the_settings_and_a_seed_for_each_problem(vllm, tokenizer):
    one = VLLMEngine("a/model", tensor_parallel_size=2)
    chat = [{"role": "user", "content": "1+1="}]
    groups = sample(one, ["2+2=", chat], [5, 7], k=3, sampling=Sampling(top_k=9, min_p=0.1, max_new_tokens=6))
    (_, model, kwargs), (_, prompts, params, use_tqdm) = vllm.calls
    assert (model, kwargs, use_tqdm) == ("a/model", {"tensor_parallel_size": 2}, False)
    texts = [tokenizer.decode(prompt["prompt_token_ids"]) for prompt in prompts]
    assert texts == [
        "2+2=",
        "<|im_start|>user\n1+1=<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ]
    settings = {"temperature": 0.6, "top_p": 0.95, "top_k": 9, "min_p": 0.1, "repetition_penalty": 1.0}
    assert [vars(p) for p in params] == [{"n": 3, "seed": seed, "max_tokens": 6, **settings} for seed in (5, 7)]
    eos = tokenizer.eos_token_id
    assert [s.ids for s in groups[0]] == [[20], [26, eos], [27, eos]]
    assert [s.finished for s in groups[0]] == [False, True, True]
    assert groups[0][1].text == tokenizer.decode([26])


def test_vllm_is_asked_once_for_the_most_likely_tokens(vllm):
    groups = sample(VLLMEngine("a/model"), ["2+2="], [5], k=3, sampling=Sampling(temperature=0.0))
    assert [vars(p)["n"] for p in vllm.calls[-1][2]] == [1]
    assert len(groups[0]) == 3
    assert len({tuple(s.ids) for s in groups[0]}) == 1


def test_vllm_is_not_asked_what_its_context_does_not_hold(vllm):
    one = VLLMEngine("a/model", max_model_len=10)
    groups = sample(one, ["x" * 9, "x" * 10], [1, 2], k=2)
    assert len(vllm.calls[-1][1]) == 1
    assert [len(s.ids) for s in groups[0]] == [1, 2]
    assert [(s.text, s.ids, s.finished) for s in groups[1]] == [("", [], False)] * 2
    before = len(vllm.calls)
    sample(one, ["x" * 10], [1], k=2)
    assert len(vllm.calls) == before


def test_an_evaluation_runs_on_vllm_in_portions_and_names_it(vllm, tmp_path):
    run = Evaluation(tiny.dataset(5), tiny.parity_reward, k=2)
    result = run.run(VLLMEngine("a/model", batch_size=6, revision="main"), tmp_path, progress=False)
    assert [len(call[1]) for call in vllm.calls if call[0] == "generate"] == [3, 2]
    model = result.settings["model"]
    assert (model["engine"], model["model"], model["revision"]) == ("vllm", "a/model", "main")
    seeds = [params.seed for call in vllm.calls if call[0] == "generate" for params in call[2]]
    assert len(set(seeds)) == 5


def test_without_vllm_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"pip install 'vpd-trl\[vllm\]'"):
        VLLMEngine("a/model")
