import http.server
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from models import write_native
from safetensors.torch import load_file, save_file

from wan_fast.checkpoint import check, describe, locate, open_checkpoint, read_tensors, tasks_of
from wan_fast.config import WanFastError
from wan_fast.headers import read_pth_header, read_safetensors_header
from wan_fast.tasks import TASKS

TI2V = TASKS["ti2v-5B"]
DIT = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    return write_native(tmp_path_factory.mktemp("native"), "ti2v-5B")


@pytest.fixture
def broken(native, tmp_path):
    """A copy to break."""
    return Path(shutil.copytree(native, tmp_path / "copy"))


def edit_dit(folder, change):
    state = load_file(folder / DIT)
    change(state)
    save_file(state, folder / DIT)


def assert_refused(folder, *says, spec=TI2V):
    with pytest.raises(WanFastError) as error:
        check(open_checkpoint(folder), spec)
    for words in says:
        assert words in str(error.value), str(error.value)


@pytest.mark.parametrize("task", ["t2v-1.3B", "t2v-A14B", "ti2v-5B"])
@pytest.mark.parametrize(("shards", "dtype"), [(1, torch.float32), (3, torch.bfloat16)])
def test_native_layout_opens_checks_and_reads_back(tmp_path, task, shards, dtype):
    opened = open_checkpoint(write_native(tmp_path, task, shards=shards, dtype=dtype))
    check(opened, TASKS[task])
    assert opened.layout == "native" and tuple(opened.experts) == TASKS[task].experts
    for part in (*opened.experts.values(), opened.vae, opened.text_encoder):
        read = {name: (tuple(t.shape), t.dtype) for name, t in read_tensors(part)}
        assert {name: shape for name, (shape, _) in read.items()} == part.shapes
        assert sum(t.nbytes for _, t in read_tensors(part)) == part.num_bytes
    assert {t.dtype for _, t in read_tensors(next(iter(opened.experts.values())))} == {dtype}


def test_width_does_not_tell_tasks_apart_but_kind_does(tmp_path, native):
    opened = open_checkpoint(write_native(tmp_path, "t2v-14B"))
    assert tasks_of(opened) == ["t2v-1.3B", "t2v-14B", "t2i-14B", "phantom-1.3B", "phantom-14B"]
    assert tasks_of(open_checkpoint(native)) == ["ti2v-5B"]
    assert_refused(native, "t2v-A14B does not fit", "fits ti2v-5B", spec=TASKS["t2v-A14B"])


def test_tiny_is_in_diffusers_layout():
    opened = open_checkpoint(locate("tiny", TI2V))
    check(opened, TI2V)
    assert opened.layout == "diffusers" and opened.defaults["size"] == (128, 128) and "toy" in opened.note


def test_describe(native):
    facts = describe(open_checkpoint(native))
    assert facts["fits"] == ["ti2v-5B"] and facts["layout"] == "native"
    assert facts["parts"]["DiT"]["missing"] == facts["parts"]["VAE"]["surplus"] == "none"
    assert "num_layers 2" in facts["parts"]["DiT"]["sizes"]


# --- what is wrong with files -----------------------------------------------------------------------------------------


def test_no_folder_and_empty_folder(tmp_path):
    for name in (str(tmp_path / "nowhere"), "./nowhere"):
        with pytest.raises(WanFastError, match="does not exist"):
            locate(name, TI2V)
    with pytest.raises(WanFastError, match=r"no Wan checkpoint.*it holds: nothing"):
        open_checkpoint(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(WanFastError, match="is a file"):
        locate(str(tmp_path / "file"), TI2V)


def test_missing_tensor(broken):
    edit_dit(broken, lambda state: state.pop("blocks.1.ffn.0.bias"))
    assert_refused(broken, "1 missing: blocks.1.ffn.0.bias")


def test_surplus_tensor(broken):
    edit_dit(broken, lambda state: state.update({"blocks.0.extra": torch.zeros(1)}))
    assert_refused(broken, "1 surplus: blocks.0.extra")


def test_wrong_shape(broken):
    edit_dit(broken, lambda state: state.update({"blocks.0.norm3.weight": torch.zeros(8)}))
    assert_refused(broken, "blocks.0.norm3.weight is [8], expected [256]")


def test_lost_layers_are_missed(broken):
    """The config says how many there are."""
    edit_dit(broken, lambda state: [state.pop(n) for n in list(state) if n.startswith("blocks.1.")])
    assert_refused(broken, "missing: blocks.1")


def test_one_tensor_under_two_names(tmp_path):
    copy = Path(shutil.copytree(locate("tiny", TI2V), tmp_path / "tiny"))
    file = copy / "transformer" / DIT
    state = load_file(file)
    save_file({**state, "blocks.0.self_attn.q.weight": torch.zeros(256, 256)}, file)
    assert_refused(copy, "blocks.0.self_attn.q.weight stands twice")


def test_experts_of_different_kinds(tmp_path):
    folder, other = write_native(tmp_path / "a", "t2v-A14B"), write_native(tmp_path / "b", "ti2v-5B")
    shutil.copy(other / DIT, folder / "low_noise_model")
    assert_refused(folder, "different kinds", spec=TASKS["t2v-A14B"])
    edit = folder / "low_noise_model" / DIT
    save_file({"x": torch.zeros(1)}, edit)
    assert_refused(folder, "tensor 'patch_embedding.weight' is missing", spec=TASKS["t2v-A14B"])


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("config.json", "[]", "no JSON object"),
        ("config.json", '{"num_heads": 7}', "7 heads do not divide a width of 256"),
        ("config.json", '{"num_layers": "two"}', "'two'"),
        ("config.json", "{", "cannot be read as JSON"),
    ],
)
def test_odd_configs(broken, file, content, says):
    (broken / file).write_text(content)
    assert_refused(broken, says)


def test_odd_index_files(tmp_path):
    folder = write_native(tmp_path, "ti2v-5B", shards=3)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text('{"weight_map": ["a"]}')
    assert_refused(folder, "no weight_map")


def test_a_generation_config_for_other_purposes_is_left_alone(broken):
    (broken / "generation_config.json").write_text('{"do_sample": true, "num_steps": 7, "note": "hello"}')
    opened = open_checkpoint(broken)
    assert opened.defaults == {"num_steps": 7} and opened.note == "hello"


def test_missing_shard(tmp_path):
    folder = write_native(tmp_path, "ti2v-5B", shards=3)
    (folder / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    assert_refused(folder, "shard diffusion_pytorch_model-00002-of-00003.safetensors of 3 is missing")


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_truncated_safetensors(broken, keep):
    content = (broken / DIT).read_bytes()
    (broken / DIT).write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    assert_refused(broken, DIT, "download it again")


@pytest.mark.parametrize("keep", [0, 100, 0.5, -1])
def test_truncated_pth(broken, keep):
    file = broken / "Wan2.2_VAE.pth"
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    assert_refused(broken, "Wan2.2_VAE.pth", "download it again")


class Payload:
    def __reduce__(self):
        return os.mkdir, ("payload-ran",)


@pytest.mark.parametrize("form", ["zip", "plain", "nested"])
def test_pickle_with_a_payload_is_refused_and_not_run(broken, form, monkeypatch):
    monkeypatch.chdir(broken)
    file = broken / "Wan2.2_VAE.pth"
    if form == "zip":
        torch.save({"conv1.weight": Payload()}, file)
    elif form == "nested":
        torch.save({"state": [torch.zeros(1), Payload()]}, file)
    else:
        file.write_bytes(pickle.dumps(Payload()))
    assert_refused(broken, "Wan2.2_VAE.pth")
    assert not (broken / "payload-ran").exists()


def test_pth_header_tells_what_torch_would_load(tmp_path):
    state = {"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16), "c": torch.zeros((), dtype=torch.int64)}
    state["view"] = torch.arange(12.0).view(3, 4)[:, 1:3]
    state["parameter"] = torch.nn.Parameter(torch.zeros(5, dtype=torch.float16))
    torch.save(state, tmp_path / "x.pth")
    expected = {
        "a": ("F32", (2, 3)),
        "b": ("BF16", (4,)),
        "c": ("I64", ()),
        "view": ("F32", (3, 2)),
        "parameter": ("F16", (5,)),
    }
    assert read_pth_header(tmp_path / "x.pth") == expected


def test_pth_that_is_no_state_dict(tmp_path):
    torch.save([1, 2], tmp_path / "x.pth")
    with pytest.raises(WanFastError, match="no state dict"):
        read_pth_header(tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "y.pth", "w") as archive:
        archive.writestr("readme", "hello")
    with pytest.raises(WanFastError, match="no PyTorch file"):
        read_pth_header(tmp_path / "y.pth")


def test_safetensors_header_lies(tmp_path):
    for header in ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}, {"a": 1}, []):
        text = json.dumps(header).encode()
        (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
        with pytest.raises(WanFastError, match="not a whole safetensors file"):
            read_safetensors_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("remove", "says"),
    [
        ("Wan2.2_VAE.pth", "has no Wan2.2_VAE.pth"),
        ("models_t5_umt5-xxl-enc-bf16.pth", "has no models_t5"),
        ("google/umt5-xxl/tokenizer.json", "has no google/umt5-xxl"),
        (DIT, "holds neither"),
    ],
)
def test_missing_part(broken, remove, says):
    (broken / remove).unlink()
    assert_refused(broken, says)


def test_the_vae_of_another_model(broken, tmp_path):
    other = write_native(tmp_path / "other", "t2v-1.3B")
    (broken / "Wan2.2_VAE.pth").unlink()
    shutil.copy(other / "Wan2.1_VAE.pth", broken)
    assert_refused(broken, "needs the Wan 2.2 VAE")


def test_one_expert_of_two(tmp_path):
    folder = write_native(tmp_path, "t2v-A14B")
    shutil.rmtree(folder / "low_noise_model")
    assert_refused(folder, "no low_noise_model/", spec=TASKS["t2v-A14B"])


# --- loading ------------------------------------------------------------------------------------------------------------

_PEAK = """
import sys, threading, time, torch
from safetensors.torch import save_file
from pathlib import Path
from wan_fast.checkpoint import Part, TensorInfo
from wan_fast.loading import load_model

def anonymous():  # file-backed pages do not count: the kernel drops them at will
    fields = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
    return int(fields["RssAnon"].split()[0]) * 1024

count, rows, file = 24, 1_000_000, Path(sys.argv[1])
save_file({f"{i}.weight": torch.zeros(rows, 1) for i in range(count)}, file)
names = [f"{i}.weight" for i in range(count)]
part = Part(file.parent, {}, {n: TensorInfo(n, n, (rows, 1), "F32", file) for n in names})
build = lambda: torch.nn.ModuleList(torch.nn.Linear(1, rows, bias=False) for _ in range(count))
peak, done = 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)
before = anonymous()
thread = threading.Thread(target=watch); thread.start()
model = load_model(build, part, "cpu", lambda name: torch.bfloat16)
peak = max(peak, anonymous())
done = True; thread.join()
print(peak - before, sum(p.nbytes for p in model.parameters()))
"""


def test_loading_takes_little_more_memory_than_the_model(tmp_path):
    out = subprocess.run([sys.executable, "-c", _PEAK, tmp_path / "x.safetensors"], capture_output=True, text=True, check=True)
    peak, model = map(int, out.stdout.split())
    # 48 MB of bf16 from 96 MB of fp32: one tensor of 4 MB in flight, allocator slack
    assert 0.9 * model < peak < model + 25e6


# --- the hub ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub(native):
    """A stub of the hub's HTTP interface on loopback that serves `native` as Wan-AI/Wan2.2-TI2V-5B."""
    served = {str(p.relative_to(native)): p.read_bytes() for p in native.rglob("*") if p.is_file()}
    commit = "0" * 40

    class Handler(http.server.BaseHTTPRequestHandler):
        requests: ClassVar[list[str]] = []

        def answer(self, body, headers=None, status=200):
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self):
            type(self).requests.append(self.path)
            path = self.path.split("?")[0]
            if "/api/models/" in path and "Wan2.2-TI2V-5B" in path:
                files = [
                    {"rfilename": n, "size": len(b), "type": "file", "path": n, "oid": "0" * 40} for n, b in served.items()
                ]
                body = files if "/tree/" in path else {"id": "x", "sha": commit, "siblings": files}
                self.answer(json.dumps(body).encode(), {"Content-Type": "application/json"})
            elif "/resolve/" in path:
                name = path.split("/resolve/")[1].split("/", 1)[1]
                body = served[name]
                self.answer(body, {"ETag": f'"{abs(hash(name)):x}"', "X-Repo-Commit": commit, "X-Linked-Size": str(len(body))})
            else:
                self.answer(b"{}", {"X-Error-Code": "RepoNotFound"}, 404)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", Handler
    server.shutdown()


def in_hub(code, endpoint, cache):
    env = dict(os.environ, HF_ENDPOINT=endpoint, HF_HOME=str(cache), HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1")
    code = "from wan_fast.checkpoint import *; from wan_fast.tasks import TASKS; from wan_fast.config import *\n" + code
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)


OPENED = "c = open_checkpoint(locate(None, TASKS['ti2v-5B'])); check(c, TASKS['ti2v-5B']); print(c.layout)"


@pytest.fixture(scope="module")
def downloaded(hub, tmp_path_factory):
    """A process that downloads the checkpoint, when it has ended, and the cache that it leaves."""
    cache = tmp_path_factory.mktemp("hub")
    return in_hub(OPENED, hub[0], cache), cache


def test_hub_download_then_cache(hub, downloaded):
    endpoint, handler = hub
    first, cache = downloaded
    assert first.stdout == "native\n", first.stderr[-2000:]
    assert "Wan2.2_VAE" in first.stderr or "Fetching" in first.stderr or "%" in first.stderr  # a progress bar
    assert (served := len(handler.requests)) > 0
    assert in_hub(OPENED, endpoint, cache).stdout == "native\n"
    assert len(handler.requests) == served, "the cache was not used"
    assert in_hub(OPENED, "http://127.0.0.1:9", cache).stdout == "native\n"


@pytest.mark.parametrize("part", [DIT, "Wan2.2_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth", "tokenizer.json"])
def test_an_interrupted_download_goes_on(hub, downloaded, tmp_path, part):
    endpoint, _ = hub
    cache = shutil.copytree(downloaded[1], tmp_path / "cache", symlinks=True)
    lost = next(p for p in cache.rglob(part) if p.is_symlink())
    assert cache in lost.resolve().parents
    lost.resolve().unlink()
    lost.unlink()
    assert in_hub(OPENED, endpoint, cache).stdout == "native\n"


def test_hub_out_of_reach(tmp_path):
    run = [
        sys.executable,
        "-m",
        "wan_fast",
        "run",
        "--task",
        "ti2v-5B",
        "--prompt",
        "x",
        "--vram",
        "900GiB",
        "--device",
        "cpu",
    ]
    env = dict(os.environ, HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path))
    done = subprocess.run([*run, "--save_file", str(tmp_path / "x.mp4")], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "Wan-AI/Wan2.2-TI2V-5B is neither a folder nor in the hub cache" in done.stderr.splitlines()[-1]
