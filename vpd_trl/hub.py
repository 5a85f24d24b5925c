"""What goes to the Hub, or into a folder, beside the student: its teacher's adapter and its card; and what fails there."""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.logging import get_logger
from huggingface_hub import HfApi
from transformers import TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import HubStrategy

from . import __version__, card
from .teacher import TEACHER_FOLDER


if TYPE_CHECKING:
    from .trainer import VPDTrainer


logger = get_logger(__name__)


class TeacherBesideStudent(TrainerCallback):
    """
    Saves the teacher to `output_dir` when a push begins, as transformers puts the student there then.

    Not for every checkpoint: a push that still runs in the background reads these files, and the next checkpoint is not
    pushed until it has ended.
    """

    def __init__(self, trainer: VPDTrainer) -> None:
        self.trainer = trainer

    def on_push_begin(self, *args: Any, **kwargs: Any) -> None:
        save_teacher(self.trainer, self.trainer.args.output_dir)


def save_teacher(trainer: VPDTrainer, output_dir: str) -> None:
    """Write what the teacher has of its own below a folder. If that is nothing, what an earlier run left there goes."""
    if trainer.args.should_save:
        folder = os.path.join(output_dir, TEACHER_FOLDER)
        if trainer.parts.uses_feedback:
            trainer.teacher.save_pretrained(folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def save_card(trainer: VPDTrainer, output_dir: str) -> None:
    """Put the model card into a folder that a model was saved to."""
    trainer.create_model_card()
    source, target = Path(trainer.args.output_dir, card.FILE), Path(output_dir, card.FILE)
    if trainer.args.should_save and source.is_file() and source.absolute() != target.absolute():
        shutil.copyfile(source, target)


def push(trainer: VPDTrainer, method: Callable, *args: Any, **kwargs: Any) -> Any:
    """
    Push the model: `method`, which is transformers' `push_to_hub`, and what belongs around it.

    Returns:
        What `method` returns, a future with `blocking=False`.
    """
    given = inspect.signature(method).bind(*args, **kwargs).arguments
    token = given.get("token") or trainer.args.hub_token
    revision = given.get("revision") or trainer.args.hub_revision
    before = _saved_at(trainer)
    try:
        commit = method(*args, **kwargs)
    except Exception as error:
        # Not if it was the saving that failed
        if trainer.is_world_process_zero() and _saved_at(trainer) != before:
            logger.error(_failure(trainer, trainer.args.output_dir, error))
        raise
    if isinstance(commit, Future):
        _watch(trainer, commit, trainer.args.output_dir)
        _background().submit(_forget_teachers, trainer, [""], token, revision, [commit])
    elif trainer.is_world_process_zero():
        _forget_teachers(trainer, [""], token, revision, [])
    return commit


def push_checkpoint(trainer: VPDTrainer, method: Callable, checkpoint: str) -> None:
    """
    Push a checkpoint in the background: `method`, which is transformers', and what belongs around it.

    Args:
        trainer: The trainer.
        method: `Trainer._push_from_checkpoint`.
        checkpoint: The checkpoint's folder.
    """
    before = _pushes(trainer)
    method(checkpoint)
    started = [job for job in _pushes(trainer) if job not in before]
    if not started:  # it was not this process's turn, or the last push still runs
        return
    for job in started:
        _watch(trainer, job, checkpoint)
    args = trainer.args
    places = [""]
    if args.hub_strategy == HubStrategy.CHECKPOINT:
        places.append("last-checkpoint")
    if args.hub_strategy == HubStrategy.ALL_CHECKPOINTS:
        places.append(Path(checkpoint).name)
    arguments = (trainer, places, args.hub_token, args.hub_revision, started)
    trainer.push_in_progress.jobs.append(_background().submit(_forget_teachers, *arguments))


def _saved_at(trainer: VPDTrainer) -> int | None:
    """When the model was saved to `output_dir`: the last file of it that transformers writes is of then."""
    file = Path(trainer.args.output_dir, TRAINING_ARGS_NAME)
    return file.stat().st_mtime_ns if file.exists() else None


@cache
def _background() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="vpd-trl-hub")


def _pushes(trainer: VPDTrainer) -> list[Future]:
    """What is pushed in the background, or has been."""
    return list(getattr(getattr(trainer, "push_in_progress", None), "jobs", []))


def _watch(trainer: VPDTrainer, job: Future, folder: str) -> None:
    """Tell of a push in the background that fails. Nobody else asks how it ended."""

    def tell(done: Future) -> None:
        if not done.cancelled() and (error := done.exception()) is not None:
            logger.warning(_failure(trainer, folder, error))

    job.add_done_callback(tell)


def _failure(trainer: VPDTrainer, folder: str, error: BaseException) -> str:
    text = " ".join(str(error).split())
    return (
        f"The push to {trainer.hub_model_id or 'the Hub'} failed ({type(error).__name__}: {text}). Nothing is lost: "
        f"what was to be pushed is in {folder}. trainer.push_to_hub() tries again; without a trainer: "
        f"hf upload {trainer.hub_model_id or 'USER/NAME'} {folder}"
    )


def _forget_teachers(
    trainer: VPDTrainer, places: list[str], token: str | None, revision: str | None, pushes: list[Future]
) -> None:
    """
    Delete adapters that teachers of earlier runs have on the Hub, if this run's teacher has none.

    They would be taken for this student's. Only once the student is there: until then they are right.

    Args:
        trainer: The trainer.
        places: The folders of the repository that a model was pushed to.
        token, revision: Those of the push.
        pushes: What to wait for.
    """
    if card.saves_adapter(trainer) or any(push.exception() is not None for push in pushes):
        return
    api, repo = HfApi(library_name="vpd_trl", library_version=__version__), trainer.hub_model_id
    for place in places:
        folder = "/".join(filter(None, (place, Path(TEACHER_FOLDER).as_posix())))
        where = {"repo_id": repo, "revision": revision, "token": token}
        try:
            if api.file_exists(filename=f"{folder}/adapter_config.json", **where):
                message = "Remove the adapter of an earlier run's teacher"
                api.delete_folder(folder, commit_message=message, **where)
        except Exception as error:
            logger.warning(
                f"{folder} in {repo} may be an adapter of an earlier run's teacher, which is not this student's; it "
                f"could not be removed. {type(error).__name__}: {error}"
            )
