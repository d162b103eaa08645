import errno
import json
import logging
import os
import shutil
import stat
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import write_native
from safetensors.torch import load_file, save_file

from wan_fast.checkpoint import locate, open_checkpoint
from wan_fast.embeddings import Embeddings, fingerprint
from wan_fast.headers import TensorInfo, read_header
from wan_fast.tasks import TASKS
from wan_fast.user_cache import user_cache
from wan_fast.weights import Part

TINY = open_checkpoint(locate("tiny", TASKS["ti2v-5B"]))
TEXT = "a red ball bounces"


def embeddings(folder, **changes):
    given = {"text_encoder": TINY.text_encoder, "tokenizer": TINY.tokenizer, "settings": "bf16 cuda", "folder": folder}
    return Embeddings(**{**given, **changes})


def embedding(seed=0, rows=7, dtype=torch.bfloat16):
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def only_file(folder):
    (file,) = folder.iterdir()
    return file


@pytest.fixture
def kept(tmp_path):
    """A cache with the embedding of TEXT in it."""
    cache = embeddings(tmp_path / "embeddings")
    cache.put(TEXT, embedding())
    return cache


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_comes_back_bit_for_bit(tmp_path, dtype):
    given = embedding(dtype=dtype)
    given[0, :3] = torch.tensor([-0.0, torch.finfo(dtype).tiny / 4, torch.finfo(dtype).max])
    # neither contiguous nor of the autograd kind
    with torch.inference_mode():
        embeddings(tmp_path).put(TEXT, given.T.contiguous().T)
    found = embeddings(tmp_path).get(TEXT)
    assert found.dtype == dtype and found.shape == (7, 64) and found.device.type == "cpu"
    assert torch.equal(found.view(torch.uint8), given.view(torch.uint8))
    assert not found.is_inference() and found.add_(1) is found


def test_an_embedding_that_requires_grad(tmp_path):
    cache = embeddings(tmp_path)
    cache.put(TEXT, embedding().requires_grad_())
    assert not cache.get(TEXT).requires_grad


def test_has_and_get_agree(tmp_path):
    cache = embeddings(tmp_path / "embeddings")
    assert not cache.has(TEXT) and cache.get(TEXT) is None
    assert not cache.folder.exists()
    cache.put(TEXT, embedding())
    assert cache.has(TEXT) and cache.get(TEXT) is not None
    cache.put(TEXT, embedding(1))
    assert torch.equal(cache.get(TEXT), embedding(1)) and only_file(cache.folder)


@pytest.mark.parametrize("text", ["a red ball bounce", "bounces ball red a", "A red ball bounces", "", "bf16 cuda"])
def test_another_text_is_not_found(kept, text):
    assert not kept.has(text) and kept.get(text) is None


@pytest.mark.parametrize("text", ["  a red\n ball\tbounces ", "a red&#32;ball&amp;#32;bounces"])
def test_spellings_that_clean_to_the_same_share(kept, text):
    assert torch.equal(kept.get(text), embedding())


def test_other_settings_are_not_found(kept):
    assert not embeddings(kept.folder, settings="fp32 cuda").has(TEXT)
    # what ends one cannot begin the next
    assert not embeddings(kept.folder, settings="bf16").has(f"cuda {TEXT}")


def test_another_tokenizer_is_not_found(kept, tmp_path):
    folder = shutil.copytree(TINY.tokenizer, tmp_path / "tokenizer")
    assert embeddings(kept.folder, tokenizer=folder).has(TEXT)
    (folder / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes() + b" ")
    assert not embeddings(kept.folder, tokenizer=folder).has(TEXT)


def test_the_same_encoder_elsewhere_is_found_and_another_is_not(kept, tmp_path):
    shutil.copytree(TINY.path, tmp_path / "copy")
    copy = open_checkpoint(tmp_path / "copy").text_encoder
    assert embeddings(kept.folder, text_encoder=copy).has(TEXT)
    file = tmp_path / "copy" / "text_encoder" / "model.safetensors"
    state = load_file(file)
    state["encoder.final_layer_norm.weight"][5] += 1
    save_file(state, file, {"format": "pt"})
    assert not embeddings(kept.folder, text_encoder=open_checkpoint(tmp_path / "copy").text_encoder).has(TEXT)


# --- fingerprint ----------------------------------------------------------------------------------------------------


def flip(file, offset):
    """Change one byte in place."""
    with file.open("r+b") as stream:
        stream.seek(offset)
        (byte,) = stream.read(1)
        stream.seek(offset)
        stream.write(bytes([byte ^ 1]))


def test_every_end_of_every_tensor_counts(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(size, dtype=torch.uint8) for name, size in {"a": 3, "b": 50_000, "c": 8192}.items()}, file)
    header = read_header(file)
    part = Part(file, {}, {n: TensorInfo(n, n, shape, dtype, file) for n, (dtype, shape) in header.tensors.items()})
    seen = {fingerprint(part)}
    for name, start in header.offsets.items():
        (size,) = part.shapes[name]
        for offset in {start, start + min(size, 4096) - 1, start + size - min(size, 4096), start + size - 1}:
            flip(file, offset)
            seen.add(fingerprint(part))
            flip(file, offset)
    assert len(seen) == 1 + 2 + 4 + 4  # of three bytes first and last are the ends
    # a sample it is: what only lies deep inside does not
    flip(file, header.offsets["b"] + 25_000)
    assert fingerprint(part) in seen


def test_names_shapes_dtypes_and_scales_count(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(4, 2), "s": torch.ones(4), "t": torch.ones(4)}, file)
    info, scales = TensorInfo("a", "a", (4, 2), "F32", file), {n: TensorInfo(n, n, (4,), "F32", file) for n in "st"}
    part = Part(file, {}, {"a": info}, scales={"a": {"weight_scale": scales["s"]}})
    parts = [
        part,
        replace(part, tensors={"b": info}),
        replace(part, tensors={"a": replace(info, shape=(2, 4))}),
        replace(part, tensors={"a": replace(info, dtype="I32")}),
        replace(part, scales={}),
        replace(part, scales={"a": {"input_scale": scales["s"]}}),
        replace(part, scales={"a": {"weight_scale": scales["t"]}}),
        replace(part, dialect="comfy"),
    ]
    assert len({fingerprint(part) for part in parts}) == len(parts)
    before = fingerprint(part)
    flip(file, read_header(file).offsets["s"])
    assert fingerprint(part) != before


def test_a_pth_encoder(tmp_path):
    folder = write_native(tmp_path, "t2v-1.3B", layers=1, width=128)
    file = folder / "models_t5_umt5-xxl-enc-bf16.pth"
    part = open_checkpoint(folder).text_encoder
    before = fingerprint(part)
    assert part.tensors and before == fingerprint(part) != fingerprint(TINY.text_encoder)
    content, state = file.read_bytes(), torch.load(file)
    for tensor in state.values():
        raw = tensor.view(torch.uint8).numpy().tobytes()
        for offset in (content.index(raw), content.index(raw) + len(raw) - 1):
            flip(file, offset)
            assert fingerprint(part) != before
            flip(file, offset)
    assert fingerprint(part) == before


def test_the_checksums_in_a_pth_tell_what_lies_deep_inside(tmp_path):
    file = tmp_path / "model.pth"
    part = Part(file, {}, {"a": TensorInfo("a", "a", (200_000,), "U8", file)})

    def written(byte):
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(zipfile.ZipInfo("model/data/0"), bytes(100_000) + bytes([byte]) + bytes(99_999))
        return fingerprint(part)

    assert written(0) == written(0) != written(1)


def test_a_gguf_encoder(tmp_path):
    gguf = pytest.importorskip("gguf")
    file = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(file, "t5encoder")
    for name in ("a", "b"):
        writer.add_tensor(name, torch.ones(4, 64).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_header(file)
    part = Part(file, {}, {n: TensorInfo(n, n, shape, dtype, file) for n, (dtype, shape) in header.tensors.items()})
    before = fingerprint(part)
    last = header.offsets["b"] + part.tensors["b"].num_bytes - 1
    flip(file, last)
    assert fingerprint(part) != before
    flip(file, last)
    assert fingerprint(part) == before
    with file.open("ab") as stream:
        stream.write(bytes(32))
    assert fingerprint(part) != before


def test_the_encoder_is_read_once(kept, monkeypatch):
    monkeypatch.setattr("wan_fast.embeddings.fingerprint", lambda part: pytest.fail("read again"))
    assert kept.has(TEXT) and kept.get(TEXT) is not None
    kept.put(TEXT, embedding())


# --- damage ---------------------------------------------------------------------------------------------------------


def rewritten(**changes):
    """Damage to what safetensors holds to be sound."""

    def damage(file):
        with_old = {"tensors": load_file(file), "metadata": {"sha256": "0" * 64}, **changes}
        save_file(with_old["tensors"], file, with_old["metadata"])

    return damage


def other_dtype(file):
    file.write_bytes(file.read_bytes().replace(b'"BF16"', b'"F16" '))


def other_shape(file):
    file.write_bytes(file.read_bytes().replace(b"[7,64]", b"[64,7]"))


DAMAGES = {
    "empty": lambda file: file.write_bytes(b""),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "truncated-header": lambda file: file.write_bytes(file.read_bytes()[:20]),
    "noise": lambda file: file.write_bytes(os.urandom(500)),
    "too-long": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "bit-of-the-tensor": lambda file: flip(file, file.stat().st_size - 1),
    "other-dtype": other_dtype,
    "other-shape": other_shape,
    "other-hash": rewritten(),
    "no-hash": rewritten(metadata=None),
    "other-tensor": rewritten(tensors={"weight": embedding()}),
    "other-rank": rewritten(tensors={"embedding": torch.ones(())}),
}


def assert_told_and_deleted(cache, caplog):
    assert cache.has(TEXT)
    with caplog.at_level(logging.WARNING, "wan_fast.embeddings"):
        assert cache.get(TEXT) is None
    assert "no whole embedding" in caplog.text
    assert not cache.has(TEXT) and not list(cache.folder.iterdir())
    cache.put(TEXT, embedding())
    assert cache.get(TEXT) is not None


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_told_of_and_deleted(kept, caplog, damage):
    file = only_file(kept.folder)
    before = file.read_bytes()
    DAMAGES[damage](file)
    assert file.read_bytes() != before
    assert_told_and_deleted(kept, caplog)


def test_a_file_of_another_text_is_damaged(kept, caplog):
    file = only_file(kept.folder)
    kept.put("another", embedding(1))
    (other,) = set(kept.folder.iterdir()) - {file}
    other.replace(file)
    assert_told_and_deleted(kept, caplog)


def test_values_that_are_not_finite_are_neither_kept_nor_given(kept, caplog, monkeypatch):
    bad = embedding()
    bad[3, 3] = torch.nan
    kept.put("another", bad)
    assert not kept.has("another")
    with monkeypatch.context() as patch:
        patch.setattr("wan_fast.embeddings._sound", lambda embedding: True)
        kept.put(TEXT, bad)
    assert_told_and_deleted(kept, caplog)


def test_what_cannot_be_read_is_no_error(kept, caplog):
    file = only_file(kept.folder)
    file.unlink()
    file.mkdir()
    assert not kept.has(TEXT) and kept.get(TEXT) is None
    assert "no whole embedding" in caplog.text


# --- bounds ---------------------------------------------------------------------------------------------------------


def aged(cache, texts, start=1_000_000_000):
    """Put embeddings of one size, each used a second after the one before. Returns the size."""
    for age, text in enumerate(texts):
        cache.put(text, embedding(age))
        os.utime(cache._file(text), (start + age, start + age))
    return cache._file(texts[0]).stat().st_size


def test_the_least_recently_used_go(tmp_path):
    cache = embeddings(tmp_path)
    cache.limit = 3 * aged(cache, "abc")
    assert cache.get("a") is not None  # now b is the oldest
    cache.put("d", embedding())
    assert [text for text in "abcd" if cache.has(text)] == ["a", "c", "d"]
    cache.put("e", embedding())
    assert [text for text in "abcde" if cache.has(text)] == ["a", "d", "e"]
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= cache.limit


def test_has_is_no_use(tmp_path):
    cache = embeddings(tmp_path)
    cache.limit = 2 * aged(cache, "ab")
    assert cache.has("a")
    cache.put("c", embedding())
    assert [text for text in "abc" if cache.has(text)] == ["b", "c"]


def test_what_was_just_put_stays_whatever_the_clocks_say(tmp_path):
    cache = embeddings(tmp_path)
    cache.limit = 2 * aged(cache, "ab", start=4_000_000_000)
    cache.put("c", embedding())
    assert [text for text in "abc" if cache.has(text)] == ["b", "c"]


def test_other_files_stay(tmp_path):
    foreign = ["notes.txt", "model.safetensors", f"{'0' * 64}.json", f"{'g' * 64}.safetensors", ".hidden"]
    for name in foreign:
        (tmp_path / name).write_bytes(bytes(10_000))
        os.utime(tmp_path / name, (0, 0))
    # what a process that was killed left half-written is ours
    left = tmp_path / f".{'0' * 64}.ab_c1.safetensors"
    left.write_bytes(bytes(2000))
    os.utime(left, (0, 0))
    cache = embeddings(tmp_path)
    cache.limit = aged(cache, "a")
    cache.put("b", embedding())
    assert {file.name for file in tmp_path.iterdir()} == {*foreign, cache._file("b").name}


@pytest.mark.parametrize("limit", [0, 100, -1])
def test_a_limit_below_an_embedding_keeps_nothing(tmp_path, caplog, limit):
    full = embeddings(tmp_path)
    aged(full, "ab")
    cache = embeddings(tmp_path, limit=limit)
    cache.put(TEXT, embedding())
    assert cache.get(TEXT) is None and not list(tmp_path.iterdir()) and not caplog.records


def test_one_that_is_too_large_drives_no_other_out(tmp_path):
    cache = embeddings(tmp_path)
    cache.limit = aged(cache, "a")
    cache.put("b", embedding(rows=8))
    assert cache.has("a") and not cache.has("b")


def test_many_at_once(tmp_path, caplog):
    caches = [embeddings(tmp_path) for _ in range(4)]
    size = aged(caches[0], "a")
    for cache in caches:
        cache.limit = 5 * size + 100  # of eight texts: they also delete what another reads or writes

    def work(worker):
        for step in range(40):
            text = "abcdefgh"[(step * 3 + worker) % 8]
            found = caches[worker].get(text)
            assert found is None or torch.equal(found, embedding(ord(text)))
            caches[worker].put(text, embedding(ord(text)))

    caches[0].put("a", embedding(ord("a")))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    caches[0].put("a", embedding(ord("a")))
    files = list(tmp_path.iterdir())
    assert sum(file.stat().st_size for file in files) <= caches[0].limit
    assert not [file for file in files if file.name.startswith(".")]
    assert "no whole embedding" not in caplog.text


def test_the_same_key_at_once(tmp_path, caplog):
    caches = [embeddings(tmp_path) for _ in range(4)]

    def work(cache):
        for _ in range(25):
            cache.put(TEXT, embedding(rows=200))
            assert torch.equal(cache.get(TEXT), embedding(rows=200))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, caches))
    assert only_file(tmp_path) and not caplog.records


# --- folder ---------------------------------------------------------------------------------------------------------


def test_the_folder_is_private_and_the_prompt_is_not_in_it(kept):
    assert stat.S_IMODE(kept.folder.stat().st_mode) == 0o700
    file = only_file(kept.folder)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    content = file.read_bytes()
    assert not [word for word in TEXT.split() if len(word) > 2 and word.encode() in content]
    assert set(json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]) == {"sha256"}


def test_the_default_folder_is_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert embeddings(None).folder == tmp_path / "wan-fast" / "embeddings"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert embeddings(None).folder == tmp_path / ".cache" / "wan-fast" / "embeddings"


def test_a_folder_that_cannot_be_is_told_of_once(tmp_path, caplog):
    (tmp_path / "file").write_text("in its place")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        cache = embeddings(folder)
        caplog.clear()
        for text in "ab":
            cache.put(text, embedding())
            assert not cache.has(text) and cache.get(text) is None
        assert ["cannot be written" in record.getMessage() for record in caplog.records] == [True]


def test_a_full_disk_is_told_of_once_and_leaves_nothing(kept, caplog, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    kept.put("a", embedding())
    kept.put("b", embedding())
    assert len(caplog.records) == 1 and "No space left" in caplog.text
    assert only_file(kept.folder) and kept.get(TEXT) is not None


def test_files_of_a_folder_that_cannot_be_written_are_read(kept, caplog, monkeypatch):
    def refuse(*args):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "utime", refuse)
    assert torch.equal(kept.get(TEXT), embedding()) and not caplog.records


def test_files_that_vanish_meanwhile_are_no_error(tmp_path, caplog, monkeypatch):
    cache = embeddings(tmp_path)
    aged(cache, "abc")
    real = type(tmp_path).iterdir
    gone = tmp_path / f"{'0' * 64}.safetensors"
    monkeypatch.setattr(type(tmp_path), "iterdir", lambda self: [*real(self), gone])
    cache.put("d", embedding())
    assert not caplog.records and all(cache.has(text) for text in "abcd")


def test_a_user_without_a_home_has_a_cache_too(monkeypatch):
    """As in a container that is run under a number that nobody has."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory.")))
    assert user_cache().name == "wan-fast" and str(os.getuid()) in str(user_cache())
