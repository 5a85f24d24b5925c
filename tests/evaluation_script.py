"""Trains on one of several processes with an evaluation after each step, and saves what this process saw."""

import sys
import traceback
from pathlib import Path

import torch
from accelerate import PartialState

from tests import tiny
from vpd_trl.evaluation import Evaluation, Sampling


SCRIPT = Path(__file__)


def main(scenario, folder):
    state = PartialState(cpu=True)
    rank, world = state.process_index, state.num_processes

    def reward(completion_ids, **kwargs):
        if scenario == "raises_on_one" and rank == 1:
            raise KeyError("no reward today")
        return tiny.parity_reward(completion_ids)

    data = tiny.dataset(1 if scenario == "one_problem" else 5)
    run = Evaluation(data, reward, k=3, sampling=Sampling(max_new_tokens=5), answer_fn=lambda text: text[:1])
    result, asked, metrics = {"error": None}, [], []
    try:
        # A learning rate of 0: the student is the same whatever its batches are
        trainer = tiny.trainer(
            f"{folder}/run", evaluation=run, max_steps=2, learning_rate=0.0, eval_strategy="steps", eval_steps=1
        )
        engine = trainer.evaluation.engine
        engine.collective = scenario == "collective"
        generate = engine.generate
        engine.generate = lambda prompts, **kwargs: (asked.extend(prompts), generate(prompts, **kwargs))[1]
        evaluate = trainer.evaluate
        trainer.evaluate = lambda *args, **kwargs: (metrics.append(evaluate(*args, **kwargs)), metrics[-1])[1]
        trainer.train()
        result |= {"metrics": metrics, "asked": asked, "weights": tiny.weights(trainer)}
    except Exception:
        result["error"] = traceback.format_exc()
        raise
    finally:
        torch.save(result, f"{folder}/world{world}_rank{rank}.pt")
    state.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
