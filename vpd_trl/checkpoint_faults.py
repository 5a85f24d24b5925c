"""What shows that a checkpoint is not whole."""

from __future__ import annotations

import json
import pickletools
import re
import zipfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import torch
from accelerate import PartialState

from . import state


# The last file of a checkpoint that the main process writes
TRAINER_STATE = "trainer_state.json"

# Under FSDP and DeepSpeed they are in folders
_WEIGHTS = ("*.safetensors", "pytorch_model*", "global_step*")
_OPTIMIZER = ("optimizer*", "global_step*")
_SHARDED = ("pytorch_model*", "optimizer*")

# Other programs call their files ".bin" too
_TORCH_BINS = ("pytorch_model", "optimizer", "adapter_model", "training_args")
# How files began that `torch.save` wrote before it wrote zip files: with this magic number, pickled
_EARLIER_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
# Such as zero_pp_rank_1_mp_rank_00_optim_states.pt of DeepSpeed and pytorch_model_fsdp_0_rank1.bin of FSDP
_OF_A_PROCESS = re.compile(r"(zero_pp_rank_|_rank)\d+(?=_mp_rank_|\.bin$)")


def find_fault(checkpoint: str | Path) -> str | None:
    """
    What shows that a checkpoint was not written to its end, or was partly deleted; `None` if nothing does.

    Files are looked at, not read through: a file that was cut off is found, a flipped bit is not. Nothing is found in a
    torch file of the format before zip files, unless it is empty, as nothing at its end tells that it is whole.

    Args:
        checkpoint: The folder. Of what each process saves for itself, this process's is looked for.
    """
    try:
        return next(_faults(Path(checkpoint)), None)
    except Exception as error:  # raising on one process alone, it would leave the others waiting
        return f"it can't be read ({type(error).__name__}: {error})"


def _faults(folder: Path) -> Iterator[str]:
    if not (folder / TRAINER_STATE).exists():
        yield f"{TRAINER_STATE}, which is written last, is missing"
    if not is_json(folder / TRAINER_STATE):
        yield f"{TRAINER_STATE} is cut off"
    if not _has_any(folder, _WEIGHTS):
        yield "it has no weights"
    for path in sorted(folder.rglob("*")):
        if not _is_whole(path):
            yield f"{path.relative_to(folder)} is cut off"
        if path.name.endswith(".index.json"):
            yield from (f"{name} is missing" for name in _shards(path) if not (path.parent / name).exists())
    for path in sorted(path for pattern in _SHARDED for path in folder.glob(pattern) if path.is_dir()):
        yield from _faults_of_sharded(path)
    if _has_any(folder, ("global_step*",)):
        yield from _faults_of_deepspeed(folder)
    if (folder / state.STATE_FILE).exists() and not _has_any(folder, _OPTIMIZER):  # else: save_only_model
        yield "optimizer.pt is missing"
    yield from (f"{name} is missing" for name in _expected(folder) if not (folder / name).exists())


def _faults_of_sharded(folder: Path) -> Iterator[str]:
    """Of a state dict in torch's distributed format, of which each process wrote a part and the main one an index."""
    index = folder / ".metadata"
    if not index.exists():
        yield f"{folder.name}/{index.name} is missing"
    try:
        with index.open("rb") as file:
            strings = [value for _, value, _ in pickletools.genops(file) if isinstance(value, str)]
    except ValueError:
        yield f"{folder.name}/{index.name} is cut off"
        return
    # Those that are named alone: a process that has nothing to write leaves an empty file
    parts = {name for name in strings if name.endswith(".distcp")}
    if not parts:
        yield f"{folder.name} has nothing in it"
    for name in sorted(parts):
        if not (folder / name).exists():
            yield f"{folder.name}/{name} is missing"
        if not _ends_as_zip(folder / name):
            yield f"{folder.name}/{name} is cut off"


def _faults_of_deepspeed(folder: Path) -> Iterator[str]:
    if not (folder / "latest").exists():
        yield "latest, which names the folder of DeepSpeed's states, is missing"
    name = _latest(folder)
    if not name:
        yield "latest is cut off"
    if not (folder / name).is_dir():
        yield f"{name} is missing"
    model_states = sorted((folder / name).glob("*_model_states.pt"))
    if not model_states:
        yield f"{name} has no model states"
    if not _has_any(folder / name, ("*_optim_states.pt",)) and not any(map(_has_optimizer, model_states)):
        yield f"{name} has no optimizer states"


def _latest(folder: Path) -> str:
    """The subfolder that DeepSpeed reads its states from."""
    latest = folder / "latest"
    return latest.read_text(encoding="utf-8", errors="replace").strip() if latest.exists() else ""


def _has_optimizer(model_states: Path) -> bool:
    """Whether DeepSpeed wrote the optimizer's state with the model's, as without ZeRO, or `None` in its place."""
    if not zipfile.is_zipfile(model_states):  # of the format before: not told
        return True
    with zipfile.ZipFile(model_states) as archive:
        pickled = next((name for name in archive.namelist() if name.endswith("data.pkl")), None)
        content = archive.read(pickled) if pickled is not None else b"."
    # Not unpickled, as that may run code
    steps = [(op.name, value) for op, value, _ in pickletools.genops(content) if "PUT" not in op.name]
    return any(value == "optimizer" and after != "NONE" for (_, value), (after, _) in pairwise(steps))


def _has_any(folder: Path, patterns: tuple[str, ...]) -> bool:
    return any(True for pattern in patterns for _ in folder.glob(pattern))


def is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _is_whole(path: Path) -> bool:
    if path.suffix == ".safetensors":
        return _is_whole_safetensors(path)
    if path.suffix in (".pt", ".pth") or (path.suffix == ".bin" and path.name.startswith(_TORCH_BINS)):
        return _is_whole_torch(path)
    return True


def _is_whole_torch(path: Path) -> bool:
    """Whether a file is a zip file to its end, or of torch's earlier format, which doesn't show."""
    if zipfile.is_zipfile(path):
        return True
    with path.open("rb") as file:
        return file.read(len(_EARLIER_TORCH)) == _EARLIER_TORCH


def _ends_as_zip(path: Path) -> bool:
    """Whether the last of many zip files in one is whole. `is_zipfile` would find the end of one before it."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - zipfile.sizeEndCentDir))  # type: ignore[attr-defined]
        return file.read(4) == zipfile.stringEndArchive  # type: ignore[attr-defined]


def _is_whole_safetensors(path: Path) -> bool:
    """Whether a file is as long as its header says."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (OSError, ValueError, MemoryError, OverflowError, KeyError, AttributeError):
        return False
    return path.stat().st_size == 8 + length + max(ends, default=0)


def _shards(index: Path) -> set[str]:
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError):
        return {f"{index.name} is cut off; what it lists"}


def _expected(folder: Path) -> list[str]:
    """Files that a checkpoint with our state has for this process beside the model and its optimizer."""
    if not (folder / state.STATE_FILE).exists():  # save_only_model, or of another trainer
        return []
    saved = torch.load(folder / state.STATE_FILE, map_location="cpu", weights_only=True, mmap=True)
    processes = saved.get("geometry", {}).get("processes", 1)
    rank = PartialState().process_index
    # A scheduler of DeepSpeed's own is in its folder
    expected = [] if _has_any(folder, ("global_step*",)) else ["scheduler.pt"]
    if rank < processes:
        expected.append("rng_state.pth" if processes == 1 else f"rng_state_{rank}.pth")
        if saved.get("within_rollout_batch", False):
            expected.append(state.ROLLOUTS_FILE.format(rank))
        # Where one process has a file of its own, each has
        files = [path.relative_to(folder).as_posix() for path in (*folder.glob("*"), *folder.glob("global_step*/*"))]
        own = {_OF_A_PROCESS.sub(rf"\g<1>{rank}", name) for name in files if _OF_A_PROCESS.search(name)}
        expected += sorted(own)
    return expected
