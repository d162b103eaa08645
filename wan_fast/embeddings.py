"""Text embeddings kept on disk from run to run, so that a prompt seen before needs no text encoder."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tempfile
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from wan_fast.checkpoint import read_tokenizer
from wan_fast.encoders import clean
from wan_fast.headers import TensorInfo, read_header
from wan_fast.user_cache import user_cache
from wan_fast.weights import Part

# bytes of the folder; an embedding is up to 512 x 4096 in bf16, 4 MiB: 64 of the longest, some hundreds of the usual length
LIMIT = 256 * 2**20
FORMAT = 1
# bytes read of each end of a tensor
SAMPLE = 4096
# an embedding, or one being written; nothing else is ever deleted
_OURS = re.compile(r"[0-9a-f]{64}\.safetensors|\.[0-9a-f]{64}\.\w+\.safetensors")
_log = logging.getLogger(__name__)


class Embeddings:
    """Text embeddings kept on disk from run to run: found by what they were made of.

    That is the text as it is cleaned, the tokenizer, a sample of the text encoder (see `fingerprint`) and the settings. Prompts
    are private: a file holds none, its name is a hash, and the folder is made for its owner alone. It still tells who can read
    it whether a guess is right. Several processes may share the folder. What cannot be kept or read is encoded anew.
    """

    def __init__(
        self, text_encoder: Part, tokenizer: Path, settings: str, *, folder: Path | None = None, limit: int = LIMIT
    ) -> None:
        """Touches no file.

        Args:
            text_encoder: whose embeddings they are.
            tokenizer: the folder of its tokenizer.json, or the file that holds one.
            settings: what else changes the numbers, in words: "bf16 cuda, up to 512 tokens".
            folder: where they lie; None: wan-fast/embeddings in the user's cache.
            limit: bytes the folder may hold; those not used for longest go first.
        """
        self.text_encoder, self.tokenizer, self.settings, self.limit = text_encoder, tokenizer, settings, limit
        self.folder = folder or user_cache() / "embeddings"
        self._told = False

    def has(self, text: str) -> bool:
        """Whether there is a file of the text; it may still turn out damaged."""
        return os.path.isfile(self._file(text))

    def get(self, text: str) -> Tensor | None:
        """[S, text_dim] on the CPU in the dtype it was put, or None. A damaged file is told of and deleted."""
        file = self._file(text)
        try:
            # read, not mapped: another machine may delete it from a shared folder meanwhile
            embedding = _unpacked(file.read_bytes(), file.stem)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, SafetensorError, ValueError, LookupError, TypeError, RuntimeError) as error:
            _log.warning("%s is no whole embedding (%s); it is to be deleted, and the text encoded anew", file, error)
            with suppress(OSError):
                file.unlink()
            return None
        with suppress(OSError):
            os.utime(file)
        return embedding

    def put(self, text: str, embedding: Tensor) -> None:
        """Keep the embedding of a text, and delete what the folder then has too much; where it cannot, say so once.

        Args:
            text: what was encoded.
            embedding: [S, text_dim] bf16, fp16 or fp32, on any device; kept only if it is finite.
        """
        file, embedding = self._file(text), embedding.detach().cpu().contiguous()
        if not _sound(embedding):
            return
        content = save({"embedding": embedding}, {"sha256": _digest(embedding, file.stem)})
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if len(content) <= self.limit:
                _write(file, content)
            self._shrink(file)
        except OSError as error:
            if not self._told:
                _log.warning("%s cannot be written (%s); prompts are encoded anew in every run", self.folder, error)
            self._told = True

    @cached_property
    def _made_by(self) -> list[str]:
        tokenizer = hashlib.sha256(read_tokenizer(self.tokenizer)).hexdigest()
        return [fingerprint(self.text_encoder), tokenizer, self.settings]

    def _file(self, text: str) -> Path:
        key = hashlib.sha256(json.dumps([FORMAT, *self._made_by, clean(text)]).encode()).hexdigest()
        return self.folder / f"{key}.safetensors"

    def _shrink(self, newest: Path) -> None:
        """Delete the least recently used files until the rest is within the limit."""
        found = []
        for file in self.folder.iterdir():
            if _OURS.fullmatch(file.name):
                with suppress(FileNotFoundError):
                    status = file.stat()
                    # clocks are coarse: of files of one moment the newest stays
                    found.append((file == newest, status.st_mtime_ns, status.st_size, file))
        total = 0
        for _, _, size, file in sorted(found, reverse=True):
            total += size
            if total > self.limit:
                file.unlink(missing_ok=True)


def fingerprint(part: Part) -> str:
    """A hash of a model by a sample of it, which takes a fraction of a second where 11 GB take a minute.

    Of every tensor, scales among them, it covers name, dtype, shape and the first and last 4096 bytes as stored, and of every
    file its size; of a .pth also the checksum that its writer left of each tensor. Another model is told apart; what is changed
    in place within a large tensor, and nowhere else, is not.
    """
    named = [(name, "", info) for name, info in part.tensors.items()]
    named += [(name, kind, info) for name, kinds in part.scales.items() for kind, info in kinds.items()]
    told = [(name, kind, info.stored_name, info.dtype, info.shape) for name, kind, info in named]
    digest = hashlib.sha256(repr((part.dialect, told)).encode())
    by_file: dict[Path, list[TensorInfo]] = {}
    for _, _, info in named:
        by_file.setdefault(info.file, []).append(info)
    for file, infos in by_file.items():
        digest.update(str(file.stat().st_size).encode())
        with file.open("rb") as stream:
            for start, stop in _spans(file, infos):
                for offset in (start, max(start, stop - SAMPLE)):
                    stream.seek(offset)
                    digest.update(stream.read(min(SAMPLE, stop - start)))
    return digest.hexdigest()


def _spans(file: Path, infos: Sequence[TensorInfo]) -> list[tuple[int, int]]:
    """From and to which byte of a file each of its tensors lies."""
    if file.suffix in (".safetensors", ".gguf"):
        offsets = read_header(file).offsets
        return [(offsets[info.stored_name], offsets[info.stored_name] + info.num_bytes) for info in infos]
    # the members of the archive, the pickle that names them among these; name and CRC-32 lie directly before or after each
    with zipfile.ZipFile(file) as archive:
        return list(pairwise([*sorted(member.header_offset for member in archive.infolist()), archive.start_dir]))


def _write(file: Path, content: bytes) -> None:
    """Whole or not at all."""
    # a name of its own: two threads may write the same embedding
    handle, scratch = tempfile.mkstemp(prefix=f".{file.stem}.", suffix=file.suffix, dir=file.parent)
    try:
        with open(handle, "wb") as stream:
            stream.write(content)
        os.replace(scratch, file)
    finally:
        Path(scratch).unlink(missing_ok=True)


def _unpacked(content: bytes, key: str) -> Tensor:
    """The embedding in a file's bytes.

    Raises:
        SafetensorError, ValueError, LookupError, TypeError, RuntimeError: it is damaged, or of another text.
    """
    embedding = load(content)["embedding"]
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    if header["__metadata__"]["sha256"] != _digest(embedding, key):
        raise ValueError("its hash is another")
    if not _sound(embedding):
        raise ValueError("its values cannot be")
    return embedding


def _digest(embedding: Tensor, key: str) -> str:
    """Of the bytes and of what they stand for."""
    told = f"{key} {embedding.dtype} {tuple(embedding.shape)}"
    return hashlib.sha256(told.encode() + embedding.view(torch.uint8).numpy().tobytes()).hexdigest()


def _sound(embedding: Tensor) -> bool:
    return embedding.ndim == 2 and embedding.is_floating_point() and bool(embedding.isfinite().all())
