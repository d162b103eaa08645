import fcntl
import json
import os
import pty
import re
import shlex
import signal
import struct
import subprocess
import sys
import termios
import time
from functools import partial

import pytest
import torch
from models import write_native
from PIL import Image
from safetensors.torch import load_file

from wan_fast import cli
from wan_fast.cli import main
from wan_fast.prompt_extension import Extended
from wan_fast.tasks import TASKS

RUN = "run --task ti2v-5B --ckpt_dir tiny --device cpu --prompt cat"
FAST = "--size 64*64 --frame_num 5 --sample_steps 2"


def wan_fast(arguments, **options):
    command = [sys.executable, "-m", "wan_fast", *(shlex.split(arguments) if isinstance(arguments, str) else arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- what is refused: exit 2, one line, fast ------------------------------------------------------------------------------


def truncated_checkpoint(folder):
    write_native(folder, "ti2v-5B")
    file = folder / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def wrong_task_checkpoint(folder):
    write_native(folder, "t2v-1.3B")


def checkpoint_with_a_payload(folder):
    write_native(folder, "ti2v-5B")

    class Payload:
        def __reduce__(self):
            return os.mkdir, ("payload-ran",)

    torch.save({"conv1.weight": Payload()}, folder / "Wan2.2_VAE.pth")


def picture_cut_in_half(folder):
    folder.mkdir()
    Image.effect_noise((64, 64), 50).save(folder / "cut.png")
    content = (folder / "cut.png").read_bytes()
    (folder / "cut.png").write_bytes(content[: len(content) // 2])


REFUSED = {
    "unknown task": (RUN.replace("ti2v-5B", "ti2v-5b"), "unknown task 'ti2v-5b'; did you mean ti2v-5B?"),
    "no task": ("run --prompt x", "--task"),
    "unknown flag": (f"{RUN} --sampel_steps 4", "unknown flag --sampel_steps; did you mean --sample_steps?"),
    "flag without value": (f"{RUN} --size", "--size"),
    "unknown command": ("rnu --task ti2v-5B", "unknown command 'rnu'; did you mean run?"),
    "stray word": (f"{RUN} dog", "dog"),
    "option of another task": (f"{RUN} --infer_frames 80", "takes no --infer_frames (given 80); tasks that do: s2v-14B"),
    "text to speech": (f"{RUN.replace('ti2v-5B', 's2v-14B')} --enable_tts", "--enable_tts needs CosyVoice"),
    "flag for several processes": (f"{RUN} --ulysses_size 8", "--ulysses_size 8: for several processes, and there is 1"),
    "size off the grid": (f"{RUN} --size 100*100", "not on the 32-pixel grid of ti2v-5B; the nearest that is: 96*96"),
    "size no size": (f"{RUN} --size big", "--size must be WIDTH*HEIGHT in pixels, got 'big'"),
    "frames not 4n+1": (f"{RUN} --frame_num 32", "--frame_num must be 4n+1, got 32; take 29 or 33"),
    "no steps": (f"{RUN} --sample_steps 0", "--sample_steps must be from 1 to 1000, got 0"),
    "steps no number": (f"{RUN} --sample_steps many", "--sample_steps must be a whole number, got 'many'"),
    "picture missing": (f"{RUN} --image no.png", "--image 'no.png' is not a file"),
    "picture cut in half": (f"{RUN} --image made/cut.png", "picture 'made/cut.png' cannot be read"),
    "picture for a task without": (
        "run --task t2v-1.3B --ckpt_dir tiny --prompt x --image made/cut.png",
        "task t2v-1.3B takes no --image",
    ),
    "no prompt": (f"{RUN} --prompt ''", "needs a prompt"),
    "picture without a prompt": ("run --task ti2v-5B --ckpt_dir tiny --image made/cut.png", "needs a prompt"),
    "no checkpoint folder": (f"{RUN} --ckpt_dir ./nowhere", "checkpoint folder './nowhere' does not exist"),
    "empty checkpoint folder": (f"{RUN} --ckpt_dir made", "holds no Wan checkpoint"),
    "missing shard": (
        f"{RUN} --ckpt_dir made",
        "shard diffusion_pytorch_model-00002-of-00003.safetensors of 3 is missing",
    ),
    "truncated safetensors": (f"{RUN} --ckpt_dir made", "is truncated"),
    "wrong shapes": (f"{RUN} --ckpt_dir made", "1 of a wrong shape: blocks.0.norm3.weight is [8], expected [256]"),
    "surplus tensors": (f"{RUN} --ckpt_dir made", "1 surplus: blocks.0.extra"),
    "checkpoint of another task": (f"{RUN} --ckpt_dir made", "does not fit the checkpoint 'made', which fits t2v-1.3B"),
    "pickle with a payload": (f"{RUN} --ckpt_dir made", "which is no tensor; take a file with tensors only"),
    "output folder missing": (f"{RUN} --save_file no/such/x.mp4", "does not exist; create it first"),
    "output suffix": (f"{RUN} --save_file x.avi", "must be one of .mp4 .webm .gif"),
    "output that cannot be made": (f"{RUN} --save_file {'x' * 250}.mp4", "cannot be written there"),
    "frames per second": (f"{RUN} --fps 1e300", "--fps must be from 1 to 240"),
    "folder taken for a hub id": (f"{RUN} --ckpt_dir made/Wan2.2-TI2V-5B", "does not exist"),
    "a number of 5000 digits": (f"{RUN} --size {'1' * 5000}*64", "--size must be"),
    "lost blocks": (f"{RUN} --ckpt_dir made", "missing: blocks.1"),
    "stats folder missing": (f"{RUN} --stats no/x.json", "--stats 'no/x.json': the folder"),
    "no memory": (f"{RUN} --vram 10MiB", "out of memory by plan: stage"),
    "no memory of that form": (f"{RUN} --vram lots", "--vram must be a size or auto"),
    "noise of another shape": (f"{RUN} --noise made/noise.safetensors", "need f32 [48, 9, 8, 8]"),
}


def edit(folder, change):
    from safetensors.torch import save_file

    write_native(folder, "ti2v-5B")
    file = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file)


def missing_shard(folder):
    write_native(folder, "ti2v-5B", shards=3)
    (folder / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()


def noise_of_another_shape(folder):
    from safetensors.torch import save_file

    folder.mkdir()
    save_file({"noise": torch.zeros(48, 1, 8, 8)}, folder / "noise.safetensors")


MAKE = {
    "picture cut in half": picture_cut_in_half,
    "picture for a task without": picture_cut_in_half,
    "picture without a prompt": picture_cut_in_half,
    "empty checkpoint folder": lambda folder: folder.mkdir(),
    "folder taken for a hub id": lambda folder: folder.mkdir(),
    "lost blocks": lambda folder: edit(folder, lambda s: [s.pop(n) for n in list(s) if n.startswith("blocks.1.")]),
    "missing shard": missing_shard,
    "truncated safetensors": truncated_checkpoint,
    "wrong shapes": lambda folder: edit(folder, lambda s: s.update({"blocks.0.norm3.weight": torch.zeros(8)})),
    "surplus tensors": lambda folder: edit(folder, lambda s: s.update({"blocks.0.extra": torch.zeros(1)})),
    "checkpoint of another task": wrong_task_checkpoint,
    "pickle with a payload": checkpoint_with_a_payload,
    "noise of another shape": noise_of_another_shape,
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, here):
    arguments, says = REFUSED[case]
    if case in MAKE:
        MAKE[case](here / "made")
    before = sorted(here.rglob("*"))
    start = time.monotonic()
    done = wan_fast(arguments, timeout=60)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr, done.stderr
    assert done.stderr.startswith("wan-fast: error: ") and done.stderr.count("\n") == 1
    assert not done.stdout and sorted(here.rglob("*")) == before
    assert time.monotonic() - start < 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(here):
    done = wan_fast(RUN.replace("--device cpu", "--device cuda"), timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("wan-fast: error: --device cuda: ")


def test_refusing_needs_no_torch(here):
    """Why it is fast: torch alone takes seconds to import."""
    (here / "torch.py").write_text("raise SystemExit('torch was imported')")
    for case in ("size off the grid", "no memory", "output suffix", "no prompt"):
        done = wan_fast(REFUSED[case][0], timeout=60)
        assert done.returncode == 2 and "torch was imported" not in done.stderr


# --- what is done -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["", "run", "plan", "quantize", "calibrate", "doctor", "inspect"])
def test_help(command):
    start = time.monotonic()
    done = wan_fast(f"{command} --help")
    assert done.returncode == 0 and "usage: wan-fast" in done.stdout and not done.stderr
    assert time.monotonic() - start < 1


def test_run_writes_everything_asked_for(here, capsys):
    outputs = "--save_file ball.mp4 --save-latents l.safetensors --save_frames f.safetensors --stats s.json --quiet"
    assert main(shlex.split(f"{RUN} --size=64x64 --num-frames 5 --sample-steps 2 --base_seed 1 {outputs}")) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == "ball.mp4" and "seed 1" in printed.out and "tiny is a toy" in printed.out
    assert printed.err == ""
    assert load_file("l.safetensors")["latents"].shape == (48, 2, 4, 4)
    frames = load_file("f.safetensors")["frames"]
    assert frames.shape == (3, 5, 64, 64) and frames.dtype == torch.float32
    stats = json.loads((here / "s.json").read_text())
    assert set(stats["seconds"]) == {"load", "prepare", "denoise", "decode"} and len(stats["plan"]["steps"]) == 2
    assert stats["plan"]["kernels"] and stats["peak_bytes"] > 0
    assert sorted(p.name for p in here.iterdir()) == ["ball.mp4", "f.safetensors", "l.safetensors", "s.json"]


def test_a_video_that_cannot_be_written_costs_nothing_else(here, capsys, monkeypatch):
    def full(path, fps, codec):
        yield
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("wan_fast.video._video", full)
    outputs = "--save_file ball.mp4 --save-latents l.safetensors --quiet"
    assert main(shlex.split(f"{RUN} --size=64x64 --num-frames 13 --sample-steps 1 {outputs}")) == 2
    assert "'ball.mp4' cannot be written ([Errno 28] No space left" in capsys.readouterr().err
    assert [p.name for p in here.iterdir()] == ["l.safetensors"]


def test_a_picture_gives_its_shape(here, capsys):
    Image.effect_noise((300, 200), 60).save("wide.png")
    assert main(shlex.split(f"{RUN} --image wide.png --frame_num 5 --sample_steps 1 --save_file wide.mp4 --quiet")) == 0
    width, height = map(int, re.search(r"video +(\d+)x(\d+)", capsys.readouterr().out).groups())
    assert width > height and width * height <= 128 * 128
    import av

    with av.open("wide.mp4") as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.frames) == (width, height, 5)


def test_picture_task_and_default_name(here, capsys):
    write_native(here / "ckpt", "t2i-14B")
    arguments = "run --task t2i-14B --ckpt_dir ckpt --prompt 'a cat, sleeping' --size 64*48 --sample_steps 1 --quiet"
    assert main(shlex.split(arguments)) == 0
    name = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"t2i-14B_64x48_a_cat__sleeping_\d{8}_\d{6}\.png", name)
    assert Image.open(name).size == (64, 48)


def test_progress_bars_show_the_time_left(here):
    done = wan_fast(f"{RUN} {FAST} --save_file x.mp4", timeout=300)
    assert done.returncode == 0, done.stderr
    for stage in ("load", "prepare", "denoise", "decode"):
        assert re.search(rf"{stage} +: 100%.*\[\d\d:\d\d<\d\d:\d\d", done.stderr), stage
    assert done.stdout.splitlines()[-1] == "x.mp4"


def test_plan_in_words_and_for_machines(capsys):
    assert main(shlex.split(f"plan {RUN[4:]} {FAST} --base_seed 1")) == 0
    words = capsys.readouterr().out
    assert "seed 1" in words and re.search(r"^ +1 +833 ", words, re.MULTILINE) and "attention: sdpa" in words
    assert main(shlex.split(f"plan {RUN[4:]} {FAST} --json")) == 0
    todo = json.loads(capsys.readouterr().out)
    assert todo["latent_shape"] == [48, 2, 4, 4] and len(todo["steps"]) == 2 and todo["memory"]["offload"] is False


def test_doctor_and_inspect(capsys):
    assert main(["doctor"]) == 0
    assert "extension" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["package"]["torch"] == torch.__version__
    assert main(["inspect", "tiny", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fits"] == ["ti2v-5B"]
    assert main(["inspect", "tiny"]) == 0
    assert "missing: none" in capsys.readouterr().out


@pytest.mark.parametrize("value", ["bf16", "off"])
def test_values_that_ask_for_nothing_are_taken(value, capsys):
    flags = "--precision bf16 --ring_size 1" if value == "bf16" else "--step-cache off --cfg_cache off --no-cuda-graphs"
    assert main(shlex.split(f"plan {RUN[4:]} {flags} --json")) == 0


def test_official_command_lines_are_understood(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for line, size, steps in (
        (
            "--task t2v-1.3B --size 832*480 --offload_model True --t5_cpu --sample_shift 8 --sample_guide_scale 6",
            [832, 480],
            50,
        ),
        ("--task t2v-A14B --size 1280*720 --offload_model True --convert_model_dtype", [1280, 720], 40),
        ("--task ti2v-5B --size 1280*704 --offload_model True --convert_model_dtype --t5_cpu", [1280, 704], 50),
        ("--task t2i-14B --size 1024*1024", [1024, 1024], 50),
    ):
        assert main(["plan", *shlex.split(line), "--prompt", "x", "--vram", "900GiB", "--json"]) == 0
        todo = json.loads(capsys.readouterr().out)
        assert todo["request"]["size"] == size and len(todo["steps"]) == steps


def test_a_prompt_may_look_like_a_flag(capsys):
    assert main([*shlex.split(f"plan {RUN[4:]} --json --prompt"), "--no text-- cat"]) == 0
    assert json.loads(capsys.readouterr().out)["request"]["prompt"] == "--no text-- cat"


def test_a_reader_that_leaves_early_is_no_error():
    line = f"{sys.executable} -m wan_fast plan {RUN[4:]} --json --sample_steps 1000 | head -1"
    done = subprocess.run(line, shell=True, capture_output=True, text=True)
    assert done.stdout == "{\n" and not done.stderr


def test_every_task_is_known_to_the_command_line():
    text = wan_fast("run --help").stdout
    assert all(task in text for task in TASKS)


@pytest.mark.parametrize("when", ["load    ", "denoise "])
def test_interrupt_leaves_nothing_behind(here, when):
    """Ctrl-C at a terminal, once loading and once in the loop."""
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))  # bars are as wide as the terminal
    command = [sys.executable, "-m", "wan_fast", *shlex.split(f"{RUN} --sample_steps 500 --save_file x.mp4")]
    # a shell's background job, as this test may be, ignores the signal, and would pass that on
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        command, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True, preexec_fn=heed
    )
    os.close(terminal)
    seen = ""
    deadline = time.monotonic() + 120
    while f"{when}:" not in seen and time.monotonic() < deadline:
        seen += os.read(controller, 4096).decode(errors="replace")
    process.send_signal(signal.SIGINT)
    try:
        while True:
            seen += os.read(controller, 4096).decode(errors="replace")
    except OSError:  # the terminal's other end was closed
        pass
    assert process.wait(60) == 130, seen
    assert "interrupted; no half-written file is left" in seen and "Traceback" not in seen
    assert not list(here.iterdir())


def test_the_schedule_is_shown_as_text(capsys):
    words = ["plan", "--task", "ti2v-5B", "--ckpt_dir", "tiny", "--device", "cpu", "--prompt", "a red ball"]
    assert main([*words, "--step-cache", "##..#.#..#.#", "--cfg-cache", "difference:3,0.5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("schedule"))
    assert lines[start] == "schedule    ##..#.#..#.#  conditional (# computed, . reused, ~ reconstructed)"
    assert lines[start + 1] == "            ##..#.~~~#.#  unconditional"
    assert lines[start + 2] == "forwards    11 of 24, 2.18 times fewer"
    assert main([*words, "--cfg-zero", "2", "--step-cache=auto", "--quality", "draft"]) == 0
    out = capsys.readouterr().out
    assert "quality     draft: --precision auto, --attention auto, --step-cache auto as given, --cfg-cache" in out
    assert "step cache  searched (auto)" in out and "schedule    00#" in out and "0 predicts nothing" in out


def test_the_schedule_of_two_experts_for_a_card_that_is_not_here(capsys):
    assert main(["plan", "--task", "t2v-A14B", "--prompt", "a cat", "--on", "h200", "--step-cache", "magcache"]) == 0
    out = capsys.readouterr().out
    assert "H" * 26 + "L" * 14 + "  expert (H high noise, L low noise)" in out
    assert (
        "time        at least" in out and "NVIDIA H200's peaks: text" in out and "step cache  magcache of threshold 0.06" in out
    )
    assert main(["plan", "--task", "t2v-A14B", "--prompt", "a cat", "--on", "h200", "--device", "cpu"]) == 2
    assert "--on h200 and --device cpu name two devices" in capsys.readouterr().err


def test_a_run_says_its_schedule(tmp_path, capsys):
    words = [
        "--task",
        "ti2v-5B",
        "--ckpt_dir",
        "tiny",
        "--device",
        "cpu",
        "--prompt",
        "a red ball",
        "--quiet",
        "--size",
        "64*64",
    ]
    words += ["--frame_num", "5", "--sample_steps", "9", "--step-cache", "every:3,0", "--save_file", str(tmp_path / "ball.mp4")]
    assert main(["run", *words]) == 0
    out = capsys.readouterr().out
    assert "schedule    #..#..#.#  conditional" in out and "forwards    8 of 18" in out


# --- a language model for the prompt ----------------------------------------------------------------------------------------


@pytest.fixture
def writer(monkeypatch):
    """Stands in for the language model; what it was asked."""
    asked = []

    def extend(extension, prompt, pictures, **settings):
        asked.append((prompt, [picture.size for picture in pictures], settings["seed"]))
        note = "prompt not extended, used as it is: it is silent" if extension.prompt_extend_fallback else None
        return Extended(prompt=prompt if note else "a red ball bounces on a white background", note=note)

    monkeypatch.setattr(cli, "extend", extend)
    monkeypatch.setenv("DASH_API_KEY", "k")
    return asked


EXTENDED = "--task ti2v-5B --ckpt_dir tiny --use_prompt_extend --prompt_extend_method dashscope --base_seed 3"


def test_the_prompt_that_was_written_is_shown_and_used(writer, tmp_path, capsys):
    picture, stats = tmp_path / "x.png", tmp_path / "stats.json"
    Image.new("RGB", (64, 64)).save(picture)
    small = f"{EXTENDED} --size 64*64 --frame_num 5 --sample_steps 1 --quiet --stats {stats} --save_file {tmp_path / 'x.mp4'}"
    for prompt, given, shown in (("a ball", "", []), ("", f" --image {picture}", [(64, 64)])):
        assert cli.main(["run", *f"{small}{given}".split(), "--prompt", prompt]) == 0
        printed = capsys.readouterr().out
        assert "prompt      to be written out by qwen-" in printed and "(dashscope), in zh" in printed
        assert "prompt      a red ball bounces on a white background" in printed
        assert writer.pop() == (prompt, shown, 3) and not writer
        assert json.loads(stats.read_text())["plan"]["request"]["prompt"] == "a red ball bounces on a white background"


def test_a_fallback_is_told(writer, tmp_path, capsys):
    words = f"{EXTENDED} --prompt_extend_fallback --size 64*64 --frame_num 5 --sample_steps 1 --quiet".split()
    assert cli.main(["run", *words, "--prompt", "a ball", "--save_file", str(tmp_path / "x.mp4")]) == 0
    assert "warning     prompt not extended, used as it is: it is silent" in capsys.readouterr().out


def test_a_plan_asks_no_language_model(writer, tmp_path, capsys):
    picture = tmp_path / "x.png"
    Image.new("RGB", (64, 64)).save(picture)
    words = ["plan", *f"{EXTENDED} --image {picture} --json".split(), "--prompt", ""]
    assert cli.main(words) == 0 and not writer
    assert json.loads(capsys.readouterr().out)["request"]["prompt"] == ""


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("--prompt x", "DASH_API_KEY is not set; set it"),
        ("--prompt x --prompt_extend_method local_qwen --prompt_extend_model {folder}", "holds no model: no config.json"),
        ("--prompt x --prompt_extend_method local_qwen --prompt_extend_model {folder}/absent", "does not exist; give a folder"),
    ],
)
def test_what_is_missing_is_told_by_the_plan(change, says, monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("DASH_API_KEY", raising=False)
    for command in ("plan", "run"):
        assert cli.main([command, *EXTENDED.split(), *change.format(folder=tmp_path).split()]) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1
