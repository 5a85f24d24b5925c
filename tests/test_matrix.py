"""
Every method on every engine, as users start it.

A cell of the matrix trains with two processes on CPUs, ends in the weights of one process alone, resumes from a
checkpoint to the same weights, and does not hang when one process has no feedback or no success.
"""

import json
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

from tests import matrix, tiny
from vpd_trl import checks
from vpd_trl.engines import DeepSpeedEngine, Engine, FSDP1Engine, FSDP2Engine, ZeRO3Engine, make_engine
from vpd_trl.teacher import SharedTeacher, WeightSnapshot


# With reentrant checkpointing, which TRL insists on there
REFUSED = {("joint-loss/lora", "zero3"), ("joint-loss/qlora", "zero3")}


@pytest.mark.slow
@pytest.mark.parametrize("engine", matrix.ENGINES)
@pytest.mark.parametrize("cell", matrix.CELLS)
def test_a_cell_of_the_matrix_works(tmp_path, cell, engine):
    if reason := matrix.missing(engine):
        pytest.skip(reason)
    found = matrix.measure([engine], [cell], tmp_path)[cell][engine]
    if (cell, engine) in REFUSED:
        assert "joint_loss" in found["error"], found
    else:
        assert found["works"], found


@pytest.mark.slow
def test_on_zero3_the_joint_loss_trains_an_adapter_where_activations_are_stored(tmp_path):
    if reason := matrix.missing("zero3"):
        pytest.skip(reason)
    cell = "joint-loss/lora-stored"
    found = matrix.measure(["zero3"], [cell], tmp_path)[cell]["zero3"]
    assert found["works"], found


def test_the_readmes_table_of_engines_comes_from_its_results_file():
    results = json.loads(matrix.RESULTS.read_text())
    assert {"command", "commit", "seeds", "machine", "versions"} <= results.keys()
    start, end = matrix.MARKERS
    assert matrix.README.read_text(encoding="utf-8").split(start)[1].split(end)[0] == matrix.table(results)


def test_the_table_tells_what_works_from_what_does_not_and_what_was_not_tried():
    cells = {"vpd/full": {"ddp": {"works": True}, "fsdp2": {"works": False}}}
    row = next(line for line in matrix.table({"cells": cells}).splitlines() if line.startswith("| `vpd` | full"))
    assert row == "| `vpd` | full | yes | no | untested | untested |"


def weights(value):
    return {"weights": {"w": torch.tensor([value])}, "adapter": {}, "wrapper": "W"}


@pytest.mark.parametrize(
    ("phase", "rank", "works"),
    [(None, 0, True), ("whole", 1, False), ("resumed", 1, False), ("no_success_on_one", 0, False)],
)
def test_a_cell_works_only_if_all_its_weights_agree(phase, rank, works):
    ranks = [{"error": None} | {p: weights(1.0) for p in matrix.PHASES} for _ in range(2)]
    if phase:
        ranks[rank][phase] = weights(1.001)
    assert matrix.judge(ranks, {"whole": weights(1.0)})["works"] is works
    assert not matrix.judge(ranks, {"whole": weights(1.001)})["works"]
    assert not matrix.judge([ranks[0], {"error": "ended in phase saved"}], {"whole": weights(1.0)})["works"]
    assert not matrix.judge([], {"whole": weights(1.0)})["works"]


@pytest.mark.parametrize("engine", matrix.ENGINES)
def test_the_configurations_are_ones_that_accelerate_reads(engine):
    config = load_config_from_file(str(matrix.CONFIGS / f"{engine}.yaml"))
    kind = {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}.get(engine, "DEEPSPEED")
    assert config.distributed_type == kind
    assert not config.use_cpu
    if kind == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2
    if kind == "DEEPSPEED":
        assert config.deepspeed_config["zero_stage"] == int(engine[-1])


# ---- What is called on an engine, where it can't run


class DeepSpeed:
    """What an engine of DeepSpeed's is asked to do, and what it counts."""

    def __init__(self):
        self.calls = []
        self.lr_scheduler = "the student's schedule"
        self.global_steps = self.global_samples = self.micro_steps = 7
        self.group = {"lr": 0.1}

    def set_gradient_accumulation_boundary(self, last):
        self.calls.append(("boundary", last))

    def backward(self, loss, scale_wrt_gas=True):
        self.calls.append(("backward", scale_wrt_gas))

    def step(self):
        self.calls.append(("step", self.group["lr"], self.lr_scheduler))
        self.global_steps += 1
        self.global_samples += 1
        self.micro_steps += 1

    def get_global_grad_norm(self):
        return torch.tensor(3.0)


def deepspeed_trainer():
    wrapped = DeepSpeed()
    state = SimpleNamespace(sync_gradients=False)
    state._set_sync_gradients = lambda value: setattr(state, "sync_gradients", value)
    trainer = SimpleNamespace(
        model_wrapped=wrapped,
        accelerator=SimpleNamespace(gradient_state=state, distributed_type="DEEPSPEED"),
        optimizer=SimpleNamespace(param_groups=[wrapped.group]),
        lr_scheduler=SimpleNamespace(base_lrs=[0.2]),
        args=SimpleNamespace(e_step_learning_rate=0.6, learning_rate=0.2, max_grad_norm=1.0),
    )
    trainer.engine = DeepSpeedEngine(trainer)
    return trainer


def test_an_e_step_under_deepspeed_is_a_window_of_its_own_at_its_own_rate():
    trainer = deepspeed_trainer()
    teacher = SharedTeacher(trainer)
    for last in (False, True):
        with teacher.accumulate(last=last):
            teacher.backward(torch.tensor(0.0))
    assert teacher.update() == 3.0
    engine = trainer.model_wrapped
    assert engine.calls[:4] == [("boundary", False), ("backward", False), ("boundary", True), ("backward", False)]
    ((name, rate, schedule),) = engine.calls[4:]
    assert (name, schedule) == ("step", None), "the schedule does not move"
    assert rate == pytest.approx(0.1 * 0.6 / 0.2)
    assert engine.group["lr"] == 0.1
    assert engine.lr_scheduler == "the student's schedule"
    assert engine.global_steps == engine.global_samples == engine.micro_steps == 7, "steps of the student's alone"
    assert not trainer.accelerator.gradient_state.sync_gradients


@dataclass(frozen=True)
class Policy:
    param_dtype: str = "bfloat16"
    output_dtype: str | None = "bfloat16"


def test_under_fsdp2_log_probabilities_are_not_rounded_to_half_precision():
    plugin = SimpleNamespace(mixed_precision_policy=Policy())
    FSDP2Engine(SimpleNamespace(accelerator=SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))))
    assert plugin.mixed_precision_policy == Policy(output_dtype=None)


@pytest.mark.parametrize(
    ("deepspeed", "zero3", "fsdp", "kind"),
    [
        (False, False, None, Engine),
        (False, False, 1, FSDP1Engine),
        (False, False, 2, FSDP2Engine),
        (True, False, None, DeepSpeedEngine),
        (True, True, None, ZeRO3Engine),
    ],
)
def test_the_engine_is_the_one_that_accelerate_was_configured_for(deepspeed, zero3, fsdp, kind):
    plugin = SimpleNamespace(mixed_precision_policy=None)
    trainer = SimpleNamespace(
        is_deepspeed_enabled=deepspeed,
        _dist=SimpleNamespace(is_zero3=zero3, fsdp_version=fsdp),
        accelerator=SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)),
    )
    assert type(make_engine(trainer)) is kind


class HalfOfEach(Engine):
    """Holds the first half of each weight, as one of two processes would."""

    shards_weights = gathers_weights = True

    def __init__(self, trainer=None):
        super().__init__(trainer)
        self.settled = 0

    def settle(self):
        self.settled += 1

    def part(self, parameter):
        return parameter.data.view(-1)[: parameter.numel() // 2]

    def part_of(self, parameter, whole):
        return whole.view(-1)[: parameter.numel() // 2]


def test_a_copy_of_sharded_weights_stands_in_where_they_are_and_goes_with_them():
    network = torch.nn.Linear(4, 2, bias=False)
    initial = network.weight.detach().clone()
    snapshot = WeightSnapshot(network, HalfOfEach())
    assert not snapshot.weights, "nothing is copied before the weights are sharded"
    snapshot.take()
    with torch.no_grad():
        network.weight.add_(1.0)
    memory = network.weight.data_ptr()
    with suppress(ZeroDivisionError), snapshot.swapped_in():
        assert torch.equal(network.weight[0], initial[0]), "this process's part"
        assert torch.equal(network.weight[1], initial[1] + 1.0), "another's"
        assert network.weight.data_ptr() == memory
        raise ZeroDivisionError
    assert torch.equal(network.weight, initial + 1.0)
    snapshot.move_towards(0.5)
    assert torch.allclose(snapshot.weights["weight"], initial[0] + 0.5)
    snapshot.take()
    assert torch.allclose(snapshot.weights["weight"], initial[0] + 0.5), "a second start of training keeps it"
    snapshot.load_state_dict({"weight": initial})
    assert torch.equal(snapshot.weights["weight"], initial[0])
    with pytest.raises(ValueError, match="has shape"):
        snapshot.load_state_dict({"weight": initial[:1]})


@pytest.mark.parametrize(("rank", "part"), [(0, [0.0, 1.0, 2.0]), (1, [3.0, 4.0, 0.0])])
def test_a_slice_of_a_weight_under_zero3_is_padded_at_the_end(monkeypatch, rank, part):
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: rank)
    parameter = SimpleNamespace(ds_tensor=torch.empty(3), ds_process_group=None)
    assert ZeRO3Engine(None).part_of(parameter, torch.arange(5.0)).tolist() == part


def test_slices_of_a_weight_under_zero3_are_put_together_without_the_padding(monkeypatch):
    def gather(whole, part, group):
        whole.copy_(torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 0.0]))

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_into_tensor", gather)
    trainer = SimpleNamespace(accelerator=SimpleNamespace(device="cpu"))
    parameter = SimpleNamespace(ds_process_group=None, ds_numel=5, ds_shape=(5, 1))
    whole = ZeRO3Engine(trainer).whole(parameter, torch.tensor([0.0, 1.0, 2.0]))
    assert whole.tolist() == [[0.0], [1.0], [2.0], [3.0], [4.0]]


@pytest.mark.parametrize("changes", [{"teacher": "ema"}, {"prior": "fixed"}, {"teacher": "lora"}])
def test_the_first_version_of_fsdp_is_refused_with_weights_beside_the_students(tmp_path, changes):
    trainer = tiny.trainer(tmp_path, **changes)
    checks.check_model(trainer)
    trainer._dist = SimpleNamespace(fsdp_version=1, is_zero3=False, gather_params=nullcontext)
    ((name, value),) = changes.items()
    with pytest.raises(ValueError, match=f"{name}='{value}' .*fsdp_version: 2"):
        checks.check_model(trainer)


@pytest.mark.parametrize(
    ("zero", "named"),
    [
        ({"offload_param": {"device": "nvme"}}, "offload_param.device=nvme"),
        ({"zero_hpz_partition_size": 8}, "zero_hpz_partition_size=8"),
        ({"mics_shard_size": 4}, "mics_shard_size=4"),
        ({"offload_param": {"device": "cpu"}, "zero_hpz_partition_size": 1, "mics_shard_size": -1}, None),
    ],
)
def test_zero3_is_refused_where_copies_of_weights_would_not_be_read(tmp_path, zero, named):
    trainer = tiny.trainer(tmp_path, teacher="ema")
    trainer._dist = SimpleNamespace(fsdp_version=None, is_zero3=True, gather_params=nullcontext)
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": zero})
    trainer.accelerator = SimpleNamespace(num_processes=1, state=SimpleNamespace(deepspeed_plugin=plugin))
    with pytest.raises(ValueError, match=named) if named else nullcontext():
        checks.check_model(trainer)


def test_the_head_is_read_in_its_modules_forward_pass(tmp_path):
    """Engines that shard weights gather the head's in hooks of that pass."""
    trainer = tiny.trainer(tmp_path, max_steps=1)
    head, runs = trainer.model.get_output_embeddings(), []
    head.register_forward_pre_hook(lambda module, args: runs.append([tuple(a.shape) for a in args]))
    trainer.train()
    runs.clear()
    batch = trainer._buffered_inputs[0]
    tokens = int(batch["completion_mask"].sum())
    trainer.scorer.frozen_logps(batch, teacher=True)
    assert runs == [[(tokens, 32)]]
    runs.clear()
    trainer.scorer.distill(trainer.model, batch, batch["completion_mask"].bool())
    assert runs == [[(tokens, 32)]], "the student's, as the teacher has the same head"
    assert "forward" not in head.__dict__
