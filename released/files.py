"""Files of weights, read and written tensor by tensor; nothing in them is executed.

Reading: .safetensors, and torch's .pth, .pt and .bin by its restricted loader, memory-mapped. Writing: safetensors as a
stream, torch's format at once. Released files may be larger than the memory, therefore not core's `read_tensors` and
`write_tensors`, which hold a whole file.
"""

import json
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from crossflow.core.errors import UserError
from crossflow.core.files import replacing

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES)
WRAPPERS = ("state_dict", "model")
"""Keys under which some files hold their state dict."""
OnBytes = Callable[[int], None]
"""Called with the number of bytes written since the last call."""

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
    """The tensors of a file by name, each read on access. `empty`: the same tensors on the meta device."""

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
    """The weights of a file. Raises UserError when it is missing, damaged, of another format, or holds code."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"The file {path} does not exist. Give a file of weights ({', '.join(SUFFIXES)}).")
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
        dtypes = {key: part.get_dtype() for key, part in slices.items()}
        _expect_dense(path, {key: dtype for key, dtype in dtypes.items() if dtype not in _DTYPES})
        empty = {
            key: torch.empty(part.get_shape(), dtype=_DTYPES[dtypes[key]], device="meta")
            for key, part in slices.items()
        }
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error
    return Weights(path, empty, file.get_tensor)


def _read_torch(path: Path) -> Weights:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than tensors, or is not a file of torch. It was not opened further, since its content "
            "could run as a program. Ask its author for plain weights, or for safetensors."
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise _damaged(path, error) from error
    for name in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        kinds = sorted({type(value).__name__ for value in content.values()}) if isinstance(content, Mapping) else []
        types = " of ".join([type(content).__name__, *([", ".join(kinds)] if kinds else [])])
        raise UserError(f"Expected a state dict (tensors by name) in {path}, got {types}.")
    state = {str(key): value.detach() for key, value in content.items()}
    odd = {key: value for key, value in state.items() if value.dtype not in _NAMES or value.layout != torch.strided}
    _expect_dense(path, {key: f"{value.layout} {value.dtype}" for key, value in odd.items()})
    return Weights(path, {key: value.to("meta") for key, value in state.items()}, state.__getitem__)


def _expect_dense(path: Path, unsupported: Mapping[str, str]) -> None:
    """Raises UserError when there are unsupported tensors. unsupported: {name: type}."""
    if unsupported:
        key, kind = next(iter(unsupported.items()))
        raise UserError(
            f"{path} holds {len(unsupported)} tensors of other types than {', '.join(_DTYPES)}, such as {key} "
            f"({kind}). Save them as one of these."
        )


def _is_zip(path: Path) -> bool:
    """Whether a file has torch's zip format, which can be memory-mapped; the older format is read at once."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _damaged(path: Path, error: Exception) -> UserError:
    # On random bytes torch's reader raises KeyError, whose text is a bare number.
    message = "" if isinstance(error, KeyError) else str(error).strip()
    reason = message.splitlines()[0][:160] if message else type(error).__name__
    return UserError(
        f"{path} ({path.stat().st_size / 2**20:.1f} MiB) is truncated or damaged and cannot be read ({reason}). "
        "Compare its size with the published one, and download it again."
    )


class Piece(NamedTuple):
    """A tensor to be written."""

    name: str
    empty: Tensor
    """Of its shape and type, on the meta device."""
    make: Callable[[], Tensor]
    """Reads or computes it."""


def size_of(pieces: Iterable[Piece]) -> int:
    """The size of the pieces in bytes."""
    return sum(piece.empty.nbytes for piece in pieces)


def write_safetensors(path: Path, pieces: Iterable[Piece], on_bytes: OnBytes = lambda count: None) -> None:
    """Writes a safetensors file one tensor at a time, whole or not at all.

    Format: length of the header (8 bytes, little endian), header (JSON: type, shape and offsets of each tensor), data.
    """
    ordered = sorted(pieces, key=lambda piece: -piece.empty.element_size())  # wide types first keep all aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for piece in ordered:
        span = [offset, offset + piece.empty.nbytes]
        header[piece.name] = {
            "dtype": _NAMES[piece.empty.dtype],
            "shape": list(piece.empty.shape),
            "data_offsets": span,
        }
        offset = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for piece in ordered:
            tensor = piece.make()
            expected, actual = ((x.shape, x.dtype) for x in (piece.empty, tensor))
            assert actual == expected, f"{piece.name} is {actual}, expected {expected}"
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            on_bytes(tensor.nbytes)


class _Counting:
    """A file that reports the number of bytes written to it."""

    def __init__(self, file: BinaryIO, on_bytes: OnBytes) -> None:
        self.file, self.on_bytes = file, on_bytes

    def write(self, data: bytes) -> int:
        written = self.file.write(data)
        self.on_bytes(written)
        return written

    def flush(self) -> None:
        self.file.flush()


def write_torch(path: Path, pieces: Iterable[Piece], on_bytes: OnBytes = lambda count: None) -> None:
    """Writes a state dict in torch's format, whole or not at all; tensors do not share storage."""
    state = {piece.name: _independent(piece.make()) for piece in pieces}
    with replacing(path) as temporary, temporary.open("wb") as file:
        torch.save(state, _Counting(file, on_bytes))  # type: ignore[arg-type]


def _independent(tensor: Tensor) -> Tensor:
    """A copy of a tensor that is part of a larger storage, with which torch would save it."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor
