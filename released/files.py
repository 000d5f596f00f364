"""Files of weights, read tensor by tensor without running anything that they hold, and written so too.

Reading: .safetensors, and torch's .pth, .pt and .bin by its restricted loader, mapped into memory. Writing: a
safetensors file as a stream, so that a file larger than the memory can be rewritten; torch's format in one piece.
"""

import json
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crossflow.core.errors import UserError
from crossflow.core.files import replacing

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES)
WRAPPERS = ("state_dict", "model")
"""Names under which some files hold their state dict."""
OnBytes = Callable[[int], None]
"""Told how many bytes more were written."""

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


class Weights(Mapping[str, Tensor]):
    """The tensors of a file by name, each read when it is asked for. `empty`: the same on the meta device."""

    def __init__(self, path: Path, empty: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> None:
        self.path = path
        self.empty = empty
        self._read = read

    def __getitem__(self, key: str) -> Tensor:
        if key not in self.empty:
            raise KeyError(key)
        return self._read(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.empty)

    def __len__(self) -> int:
        return len(self.empty)


def read_weights(path: str | Path) -> Weights:
    """The weights of a file. Raises UserError when it is not there, damaged, of another kind, or holds code."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no file {path}. Give a file of weights ({', '.join(SUFFIXES)}).")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix not in TORCH_SUFFIXES:
        raise UserError(f"{path} is not a file of weights: its name must end in {', '.join(SUFFIXES)}.")
    return _read_torch(path)


def _read_safetensors(path: Path) -> Weights:
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, "pt")
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
        _expect_numbers(path, {key: one.get_dtype() for key, one in slices.items() if one.get_dtype() not in _DTYPES})
        empty = {
            key: torch.empty(one.get_shape(), dtype=_DTYPES[one.get_dtype()], device="meta")
            for key, one in slices.items()
        }
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error
    return Weights(path, empty, file.get_tensor)


def _read_torch(path: Path) -> Weights:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than tensors, or is no file of torch's at all. It was not opened further, since what "
            "is pickled in such a file can run as a program. Ask its author for plain weights, or for safetensors."
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise _damaged(path, error) from error
    for name in WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
            found = found[name]
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        kinds = sorted({type(value).__name__ for value in found.values()}) if isinstance(found, Mapping) else []
        what = " of ".join([type(found).__name__, *([", ".join(kinds)] if kinds else [])])
        raise UserError(f"{path} holds {what}; a state dict, tensors by their names, is needed.")
    state = {str(key): value.detach() for key, value in found.items()}
    odd = {key: value for key, value in state.items() if value.dtype not in _NAMES or value.layout != torch.strided}
    _expect_numbers(path, {key: f"{value.layout} {value.dtype}" for key, value in odd.items()})
    return Weights(path, {key: value.to("meta") for key, value in state.items()}, state.__getitem__)


def _expect_numbers(path: Path, odd: Mapping[str, str]) -> None:
    """Raises UserError when some tensors, `odd` by name with what they are, cannot be kept as they are."""
    if odd:
        key, kind = next(iter(odd.items()))
        raise UserError(
            f"{path} holds {len(odd)} tensors of other types than {', '.join(_DTYPES)}, such as {key} ({kind}). Save "
            "it as one of these."
        )


def _is_zip(path: Path) -> bool:
    """Whether it is torch's present format, which can be mapped; the old one is read whole."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _damaged(path: Path, error: Exception) -> UserError:
    # Junk stops torch's reader at a KeyError, whose text is a bare number.
    told = "" if isinstance(error, KeyError) else str(error).strip()
    reason = told.splitlines()[0][:160] if told else type(error).__name__
    return UserError(
        f"{path} ({path.stat().st_size / 2**20:.1f} MiB) is cut off or damaged and cannot be read ({reason}). Compare "
        "its size with the one it was published with, and download it again."
    )


class Piece(NamedTuple):
    """A tensor to be written: its name, an empty tensor of its shape and type, and what makes it."""

    name: str
    empty: Tensor
    make: Callable[[], Tensor]


def size_of(pieces: Iterable[Piece]) -> int:
    """Bytes."""
    return sum(piece.empty.nbytes for piece in pieces)


def write_safetensors(path: Path, pieces: Iterable[Piece], on_bytes: OnBytes = lambda count: None) -> None:
    """Writes a safetensors file one tensor at a time, whole or not at all.

    Format: length of the header (8 bytes, little endian), header (JSON: type, shape and place of each tensor), data.
    """
    ordered = sorted(pieces, key=lambda piece: -piece.empty.element_size())  # wide types first, so that all are aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for piece in ordered:
        span = [place, place + piece.empty.nbytes]
        header[piece.name] = {
            "dtype": _NAMES[piece.empty.dtype],
            "shape": list(piece.empty.shape),
            "data_offsets": span,
        }
        place = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for piece in ordered:
            tensor = piece.make()
            same = (tensor.shape, tensor.dtype) == (piece.empty.shape, piece.empty.dtype)
            assert same, f"{piece.name} is {tensor.shape}, announced as {piece.empty.shape}"
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            on_bytes(tensor.nbytes)


class _Counting:
    """A file that tells how much was written to it."""

    def __init__(self, file: Any, on_bytes: OnBytes) -> None:
        self.file, self.on_bytes = file, on_bytes

    def write(self, data: Any) -> int:
        written: int = self.file.write(data)
        self.on_bytes(written)
        return written

    def flush(self) -> None:
        self.file.flush()


def write_torch(path: Path, pieces: Iterable[Piece], on_bytes: OnBytes = lambda count: None) -> None:
    """Writes a state dict in torch's format, whole or not at all; each tensor has a storage of its own."""
    state = {piece.name: _apart(piece.make()) for piece in pieces}
    with replacing(path) as temporary, temporary.open("wb") as file:
        torch.save(state, _Counting(file, on_bytes))  # type: ignore[arg-type]


def _apart(tensor: Tensor) -> Tensor:
    """A tensor that is a part of another would be saved with the whole of it."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor
