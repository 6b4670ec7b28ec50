"""What weight files hold, read from their headers: which files, how many numbers, of which kind."""

import warnings
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from llava.constants import InputError
from llava.model.files import REMEDY, brief, find_file, is_folder, read_object
from llava.schema import OBJECT, shown, some

# With one of these options a hub id means files that `find_file` does not look at.
ELSEWHERE = {"cache_dir", "revision", "subfolder", "variant", "token", "gguf_file", "use_safetensors"}
# In the order in which transformers looks for them.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
# What a checkpoint may hold that the model has no place for: tables once saved with the weights.
IGNORED = ("rotary_emb.inv_freq", "position_ids")
# What the readers of damaged files raise, ours and those of transformers and peft.
DAMAGED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RecursionError,
    RuntimeError,
    SafetensorError,
    TypeError,
    UnpicklingError,
    ValueError,
)
# Above what a config asks for beyond the weights that are there: room for heads tied to the embedding, added tokens.
ROOM = 10**6
# Numbers of the largest tower on the hub, whose files are not asked before they are needed.
LARGEST_TOWER = 3 * 10**9


def weight_files(path: str) -> list[Path]:
    """Return the weight files of a folder or hub repository: one, or those that its index names.

    Raises:
        InputError: there are none, or the index is damaged or names what is no file beside it.
    """
    for name in WEIGHTS:
        file = find_file(path, name)
        if file is not None:
            return _indexed(path, file) if name.endswith(".json") else [file]
    raise InputError(f"no weights at {path!r} ({WEIGHTS[0]}, {WEIGHTS[2]} or an index of several files); {REMEDY}")


def _indexed(path: str, index: Path) -> list[Path]:
    """Return the files that an index names; they must be beside it, and not lead elsewhere."""
    listing = read_object(index, {"weight_map": OBJECT, "metadata": OBJECT})
    names = listing.get("weight_map", {}).values()
    suffix = Path(index.stem).suffixes[-2]  # of model.safetensors.index.json
    if not names or "metadata" not in listing:
        raise InputError(f"{str(index)!r} must have metadata and a weight_map that names files")
    wrong = [name for name in names if not isinstance(name, str) or Path(name).name != name or "\0" in name]
    wrong += [name for name in names if name not in wrong and not name.endswith(suffix)]
    if wrong:
        raise InputError(f"{str(index)!r} names {shown(wrong[0])}; it must name *{suffix} files beside it")
    files = []
    for name in sorted(set(names)):
        file = find_file(path, name)
        if file is None:
            raise InputError(f"{str(index)!r} names {shown(name)}, which is not there; get the missing file")
        inside = index.resolve().parent
        # The hub's own cache keeps files as links into the `blobs` beside its snapshots.
        if file.resolve().parent not in (inside, index.parent.resolve(), inside.parent.parent / "blobs"):
            raise InputError(f"{str(file)!r} is a link that leads out of its folder; put the file itself there")
        files.append(file)
    return files


def read_header(file: Path) -> dict[str, tuple[int, bool]]:
    """Return how many numbers every tensor of a file has, and whether they are floating-point; reads no numbers.

    Raises:
        InputError: the file is damaged, or holds anything but tensors.
    """
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as held:
                slices = {name: held.get_slice(name) for name in held.keys()}  # noqa: SIM118 - no mapping
                kinds = {name: (s.get_shape(), s.get_dtype()) for name, s in slices.items()}
            return {n: (prod(shape), kind[0] == "F" or kind == "BF16") for n, (shape, kind) in kinds.items()}
        tensors = read_tensors(file, "meta")
    except InputError:
        raise
    except DAMAGED as error:
        raise InputError(f"cannot load {str(file)!r}: {why(error)}") from error
    return {name: (tensor.numel(), tensor.is_floating_point()) for name, tensor in tensors.items()}


def read_tensors(file: Path, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Return the tensors of a `.bin` file; on `meta` their shapes alone are read.

    Raises:
        InputError: the file is damaged, or holds anything but tensors.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of old pickles, which are read or refused
            found: Any = torch.load(file, map_location=device, weights_only=True)
    except DAMAGED as error:
        raise InputError(f"cannot load {str(file)!r}: {why(error)}") from error
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in found.items()
    ):
        raise InputError(f"{str(file)!r} must hold a dictionary of tensors")
    return found


def why(error: BaseException) -> str:
    """Say in a few words why a file could not be loaded; torch's own about pickles advise to run what is in them."""
    if isinstance(error, UnpicklingError):
        return (
            "it is damaged, or holds objects that are no tensors, which are never loaded; "
            "get the file again, or the checkpoint as safetensors"
        )
    return f"{type(error).__name__} {brief(error)}"


def count_weights(path: str, quantised: bool = False) -> int:
    """Return how many numbers the weights of a checkpoint have.

    Args:
        path: a folder or hub id.
        quantised: the checkpoint is, so that integers are to be expected, two numbers in each.

    Raises:
        InputError: a file is damaged, or holds integers in the place of weights.
    """
    total, integers = 0, []
    for file in weight_files(path):
        for name, (size, floating) in read_header(file).items():
            total += size * (2 if quantised else 1)
            if not floating and not quantised and not name.endswith(IGNORED):
                integers.append(name)
    refuse_integers(integers, path)
    return total


def refuse_integers(names: list[str], path: str) -> None:
    """Refuse what is no floating-point number in the place of weights.

    Raises:
        InputError: there is some; the message names the tensors.
    """
    if names:
        raise InputError(
            f"the weights at {path!r} are no floating-point numbers in {some(names)}; get them unquantised"
        )


def language_size(config: Any) -> int:
    """Return how many numbers the matrices of a language model have; norms and biases are too few to matter."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    layer = head * (2 * heads + 2 * kv_heads) + 3 * config.intermediate_size
    return config.hidden_size * (config.vocab_size + config.num_hidden_layers * layer)


def tower_size(shape: dict[str, Any]) -> int:
    """The same of a tower's shape, see `vision_config`."""
    width, patch = shape["hidden_size"], shape["patch_size"]
    positions = (shape["image_size"] // patch) ** 2
    return width * (
        positions + 3 * patch**2 + shape["num_hidden_layers"] * (4 * width + 2 * shape["intermediate_size"])
    )


def check_size(asked: int, path: str, quantised: bool = False, tower: str | None = None) -> None:
    """Refuse a config that asks for far more weights than there are, before a model is built from it.

    Building takes time by layers, and what no file fills is drawn at random: neither may be without bounds. Twice as
    many are let pass, as what is a little wrong is better told by the names of its tensors.

    Args:
        asked: numbers that the config asks for.
        path: folder or hub id of the weights.
        quantised: see `count_weights`.
        tower: where they may come from as well, looked at where the former do not suffice.

    Raises:
        InputError: so it is, or see `count_weights`.
    """
    held = count_weights(path, quantised)
    if tower and asked > 2 * held + ROOM:
        files = is_folder(tower) and any(find_file(tower, name) for name in WEIGHTS)
        held += count_weights(tower) if files else 0 if is_folder(tower) else LARGEST_TOWER
    if asked > 2 * held + ROOM:
        raise InputError(
            f"the config of {tower or path!r} asks for {asked:,} weights, its files hold {held:,}; one is wrong"
        )
