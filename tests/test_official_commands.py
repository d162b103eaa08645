"""Every command line of official_commands.txt: what it comes to here, and that it runs, on small models and sizes.

How many processes a line starts is read off its launcher; its flags stay as they are where it is parsed, and are made small
where it runs.
"""

import re
import shlex
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import av
import pytest
import torch
from clips_of import noise, write_clip, write_folder
from models import small_dims, write_native
from PIL import Image
from safetensors.torch import save_file

import wan_fast
from wan_fast import cli
from wan_fast.cli import _run_parser, main
from wan_fast.config import INPUTS, EngineConfig, Request, WanFastError
from wan_fast.examples import FOLDER, example
from wan_fast.flags import build
from wan_fast.manifest import dit_shapes
from wan_fast.parsing import parse_size
from wan_fast.processes import World, check
from wan_fast.prompt_extension import Extended, PromptExtension
from wan_fast.resolving import resolve
from wan_fast.tasks import TASKS

# of the shell variables in tests/test.sh; four processes, as the 12 heads of the 1.3B are not to be divided by eight
VARIABLES = {"GPUS": "4", "PY_FILE": "./generate.py"}
PROGRAMS = {"generate.py", "vace_wan_inference.py"}
ANOTHER_PROGRAM = {
    *("t2v_14B_singleGPU.py", "i2v_14B_singleGPU.py", "flf2v_14B_singleGPU.py", "vace.py"),  # Gradio
    *("vace_preprocess_demo.py", "vace_wan_demo.py", "vace_pipeline.py", "vace_preproccess.py", "preprocess_data.py"),
}
# of companions' programs, not of the official generate.py
REFUSED_FLAGS = {
    "--prompt_file": "a run makes one video: give its text to --prompt",
    "--image_path_file": "a run makes one video: give its picture to --image",
    "--model_name": "did you mean --task?",
}
# what VACE's own script has where its line says nothing
SCRIPT_DEFAULTS = {"--task": "vace-1.3B", "--ckpt_dir": "models/Wan2.1-VACE-1.3B/", "--size": "480p"}
# of the sizes of pictures
GRIDS = {"s2v-14B": 64}
OF_SEVERAL = {"--ulysses_size", "--ring_size", "--t5_fsdp", "--dit_fsdp"}


@dataclass(frozen=True)
class Line:
    """A printed line. options: (flag, value), None for a flag without one. processes: as many as its launcher starts."""

    text: str
    program: str
    options: tuple[tuple[str, str | None], ...]
    processes: int

    @classmethod
    def of(cls, text):
        words = [re.sub(r"\$(\w+)", lambda name: VARIABLES.get(name[1], name[1]), word) for word in shlex.split(text)]
        place = next(i for i, word in enumerate(words) if word.endswith(".py"))
        launcher = " ".join(words[:place])
        processes = re.search(r"--nproc_per_node[ =](\d+)", launcher)
        assert re.fullmatch(
            r"(\w+=\S+ )?(poetry run )?(python( -m torch\.distributed\.run)?|torchrun)( --?\S+| \d+)*", launcher
        )
        options = []
        for word in words[place + 1 :]:
            if word.startswith("--"):
                options.append((word, None))
            else:
                flag, value = options.pop()
                options.append((flag, word if value is None else f"{value} {word}"))
        if Path(words[place]).name == "vace_wan_inference.py":
            given = dict(options)
            options = [*((flag, value) for flag, value in SCRIPT_DEFAULTS.items() if flag not in given), *options]
        return cls(text, Path(words[place]).name, tuple(options), int(processes[1]) if processes else 1)

    @property
    def task(self):
        given = dict(self.options)
        return given["--task"].replace("s2v", "phantom") if "--phantom_ckpt" in given else given["--task"]

    @property
    def kind(self):
        if self.program in ANOTHER_PROGRAM:
            return "another program"
        assert self.program in PROGRAMS
        if REFUSED_FLAGS.keys() & dict(self.options):
            return "refused flag"
        return "text to speech" if "--enable_tts" in dict(self.options) else "run"

    @property
    def words(self):
        return words_of(self.options)


def words_of(options):
    return [word for option in options for word in option if word is not None]


LINES = [
    Line.of(text)
    for text in Path(__file__).with_name("official_commands.txt").read_text(encoding="utf-8").splitlines()
    if text and not text.startswith("#")
]
OF_KIND = {kind: [line for line in LINES if line.kind == kind] for kind in {line.kind for line in LINES}}


def id_of(line):
    return f"{line.task}-{LINES.index(line)}"


def in_world(monkeypatch, size, rank=0):
    for name, value in (("WORLD_SIZE", size), ("RANK", rank), ("LOCAL_RANK", rank)):
        monkeypatch.setenv(name, str(value))


def test_every_line_is_accounted_for():
    counts = {"run": 95, "text to speech": 1, "another program": 17, "refused flag": 5}
    assert Counter(line.kind for line in LINES) == counts
    assert {line.program for line in LINES} == PROGRAMS | ANOTHER_PROGRAM
    # whose program has other flags
    assert {line.task for line in OF_KIND["run"]} == TASKS.keys() - {"unianimate-14B"}


# --- what a line comes to ---------------------------------------------------------------------------------------------------


def words_with_files(line):
    """Its words, with files that are here: a picture for pictures and videos, a folder for a LoRA's."""
    here = {f"--{name}": str(FOLDER / "girl.jpg") for name in (*INPUTS, "ref_image")}
    here |= dict.fromkeys(("--lora_dir", "--phantom_ckpt"), str(FOLDER))
    return words_of([(flag, here.get(flag, value)) for flag, value in line.options])


@pytest.mark.parametrize("line", OF_KIND["run"], ids=id_of)
def test_understood(line):
    parsed = _run_parser("run").parse_args(words_with_files(line))
    config, request, given = build(EngineConfig, parsed), build(Request, parsed), dict(line.options)
    extension = build(PromptExtension, parsed)
    assert extension.use_prompt_extend == ("--use_prompt_extend" in given)
    for name in ("method", "model", "target_lang"):
        assert getattr(extension, f"prompt_extend_{name}") == given.get(f"--prompt_extend_{name}")
    assert (config.task, config.checkpoint, request.prompt) == (line.task, given["--ckpt_dir"], given.get("--prompt"))
    assert (config.ulysses_size, config.ring_size) == (int(given.get("--ulysses_size", 1)), int(given.get("--ring_size", 1)))
    assert (config.t5_fsdp, config.dit_fsdp) == ("--t5_fsdp" in given, "--dit_fsdp" in given)
    pictures = {name: request.given(name) for name in INPUTS}
    if not request.prompt:  # an example's, or an extended one
        request = replace(request, **{"prompt": "a cat", **({} if any(pictures.values()) else example(config.spec))})
    todo = resolve(config.spec, request)
    assert todo.size == parse_size(given["--size"]) if "--size" in given else config.spec.name == "animate-14B"
    if "--phantom_ckpt" in given:
        assert config.dit == str(FOLDER) and todo.fps == int(given.get("--sample_fps", 16))


@pytest.mark.parametrize("line", [line for line in OF_KIND["run"] if line.processes == 1], ids=id_of)
def test_one_process_is_enough(line):
    check(build(EngineConfig, _run_parser("run").parse_args(words_with_files(line))), World())


@pytest.mark.parametrize("line", [line for line in OF_KIND["run"] if line.processes > 1], ids=id_of)
def test_several_processes(line, monkeypatch, capsys):
    words = ["run", *words_with_files(line)]
    in_world(monkeypatch, line.processes)
    assert main(words) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"wan-fast: error: this version runs on one process, and there are {line.processes};")
    assert printed.err.count("\n") == 1 and not printed.out
    in_world(monkeypatch, line.processes, rank=line.processes - 1)
    monkeypatch.setattr("wan_fast.processes.PATIENCE", 0)
    assert main(words) == 2 and capsys.readouterr() == ("", "")
    in_world(monkeypatch, 1)
    assert main(words) == 2
    said = f"for several processes, and there is 1; start them with torchrun --nproc_per_node={line.processes} -m wan_fast run"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("line", OF_KIND["text to speech"], ids=id_of)
def test_text_to_speech_is_refused_with_what_to_do(line, capsys):
    assert main(["run", *words_with_files(line)]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("wan-fast: error: --enable_tts needs CosyVoice") and "give its file as --audio" in said.err
    assert said.err.count("\n") == 1 and not said.out


@pytest.mark.parametrize("line", OF_KIND["refused flag"], ids=id_of)
def test_flags_of_other_programs_are_refused_with_what_to_do(line, monkeypatch, capsys):
    in_world(monkeypatch, line.processes)
    assert main(["run", *line.words]) == 2
    flag = next(flag for flag, _ in line.options if flag in REFUSED_FLAGS)
    assert capsys.readouterr() == ("", f"wan-fast: error: unknown flag {flag}; {REFUSED_FLAGS[flag]}\n")


@pytest.mark.parametrize("flag", REFUSED_FLAGS)
def test_a_flag_of_another_program(flag, capsys):
    assert main(["run", "--task", "t2v-14B", flag.replace("_", "-"), "x"]) == 2
    assert capsys.readouterr().err.endswith(f"; {REFUSED_FLAGS[flag]}\n")


# --- what a line makes --------------------------------------------------------------------------------------------------------


def small(line):
    """Its options with small values; what is made on the way is named in angle brackets."""
    options = []
    for flag, value in line.options:
        if flag in OF_SEVERAL:
            continue
        if flag == "--size":
            (width, height), grid = parse_size(value), GRIDS.get(line.task, TASKS[line.task].vae_spec.grid)
            value = f"{grid * (1 + (width > height))}*{grid * (1 + (width < height))}"
        elif flag == "--ckpt_dir":
            value = f"<{line.task.replace('t2i', 't2v')}>"
        elif flag == "--phantom_ckpt":
            value = f"<{line.task}>"
        elif flag == "--frame_num" and not TASKS[line.task].image_only:
            value = "5"
        elif flag in ("--src_video", "--src_mask", "--lora_dir"):
            value = f"<{flag}>"
        elif flag in ("--audio", "--pose_video"):
            value = str(FOLDER / {"--audio": "talk.ogg", "--pose_video": "pose.mp4"}[flag])
        elif flag == "--src_root_path":
            value = f"<{flag}>" + "/src_pose.mp4" * value.endswith(".mp4")
        elif flag == "--prompt":
            value = value and "a cat"
        elif flag in ("--src_ref_images", "--ref_image"):
            value = ",".join(str(FOLDER / name) for name, _ in zip(("girl.jpg", "snake.jpg"), value.split(","), strict=False))
        elif flag.strip("-") in INPUTS:
            picture = FOLDER / Path(value).with_suffix(".jpg").name
            value = str(picture if picture.is_file() else FOLDER / "girl.jpg")
        options.append((flag, value))
    given = dict(options)
    if TASKS[line.task].kind == "speech":
        options += [("--infer_frames", "8"), ("--num_clip", "1")]
    elif "--frame_num" not in given and not TASKS[line.task].image_only:
        options.append(("--frame_num", "5"))
    if "--lora_dir" not in given:  # which brings its own number
        options.append(("--sample_steps", "2"))
    return tuple(sorted(options))


RUNS = {small(line): line for line in reversed(OF_KIND["run"])}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The file or folder that a name in angle brackets stands for."""
    folder = tmp_path_factory.mktemp("official")
    found = {}

    def lora():
        path = folder / "Wan2.2-Lightning" / "Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V1"
        path.mkdir(parents=True)
        out_features, in_features = dit_shapes(small_dims("t2v-A14B"))["blocks.0.self_attn.q.weight"]
        pair = {
            "diffusion_model.blocks.0.self_attn.q.lora_down.weight": torch.ones(2, in_features) / in_features,
            "diffusion_model.blocks.0.self_attn.q.lora_up.weight": torch.ones(out_features, 2) / 100,
        }
        for expert in ("high_noise", "low_noise"):
            save_file(pair, path / f"{expert}_model.safetensors")
        return path

    def clip(name):
        return write_clip(folder / f"{name}.mp4", noise(6, height=32, width=64))

    def animate():
        path = write_native(folder / "animate-14B", "animate-14B")
        factors = {"blocks.0.self_attn.q.lora_A.default.weight": torch.ones(2, 256)}
        factors["blocks.0.self_attn.q.lora_B.default.weight"] = torch.ones(256, 2) / 100
        torch.save({"state_dict": factors}, path / "relighting_lora.ckpt")
        return path

    def make(name):
        if name not in found:
            if name == "animate-14B":
                found[name] = animate()
            elif name == "--src_root_path":
                found[name] = folder / "driving"
                write_folder(found[name], 5)
            elif name in TASKS:
                found[name] = write_native(folder / name, name)
            else:
                found[name] = lora() if name == "--lora_dir" else clip(name.strip("-"))
        return str(found[name])

    yield make
    shutil.rmtree(folder)


@pytest.mark.parametrize("options", RUNS, ids=lambda options: id_of(RUNS[options]))
def test_runs(options, made, tmp_path, capsys, monkeypatch):
    spec = TASKS[RUNS[options].task]
    asked = []

    def extended(extension, prompt, pictures, **settings):
        asked.append((extension, prompt, len(pictures)))
        return Extended(prompt=f"{prompt}, at length")

    monkeypatch.setattr(cli, "extend", extended)
    monkeypatch.setenv("DASH_API_KEY", "your_key")
    target = tmp_path / ("made.png" if spec.image_only else "made.mp4")
    words = [re.sub(r"^<(.+)>", lambda name: made(name[1]), word) for word in words_of(options)]
    assert main(["run", *words, "--device", "cpu", "--quiet", "--save_file", str(target)]) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out.splitlines()
    given = dict(options)
    assert len(asked) == ("--use_prompt_extend" in given)
    for extension, prompt, pictures in asked:
        assert f"prompt      {prompt}, at length" in printed
        shown = len(spec.needs & {"image", "first_frame", "last_frame"}) or ("--image" in given)
        assert pictures == shown and extension.prompt_extend_model == given.get("--prompt_extend_model")
    assert printed[-1] == str(target) and [p.name for p in tmp_path.iterdir()] == [target.name]
    said = re.search(r"(\d+)x(\d+), (\d+) frames", "\n".join(printed))
    width, height, frames = map(int, said.groups())
    if spec.image_only:
        assert Image.open(target).size == (width, height) and frames == 1
    else:
        with av.open(str(target)) as container:
            shapes = [(frame.width, frame.height) for frame in container.decode(video=0)]
        assert shapes == [(width, height)] * frames and frames == 5
    given = dict(options)
    if not ({"--prompt", "--ref_image"} | {f"--{name}" for name in INPUTS}) & given.keys():
        assert printed[0].startswith("example     nothing was asked for, so the task's own: ")
    else:
        assert not any(line.startswith("example") for line in printed)
    if "--lora_dir" in given:
        assert any(line.startswith("preset      lightning-4step") for line in printed)


# --- nothing asked for --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [name for name, spec in TASKS.items() if example(spec)])
def test_a_task_alone_shows_its_example(task, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert main(["plan", "--task", task, "--on", "h200"]) == 0
    said = capsys.readouterr().out.splitlines()[0]
    shown = example(TASKS[task])
    assert said.startswith("example     ") and said.endswith(shown["prompt"])
    assert {name for name in shown if name in INPUTS} >= TASKS[task].needs - {"prompt"}
    for path in Request(**shown).given(next(iter({*shown} & {*INPUTS}), "noise")):
        assert Path(path).name in said and Path(path).stat().st_size <= 60_000
    assert main(["plan", "--task", task, "--on", "h200", "--json"]) == 0
    assert f'"prompt": "{shown["prompt"]}"' in capsys.readouterr().out


def test_the_official_examples_of_text():
    assert example(TASKS["t2i-14B"]) == {"prompt": "一个朴素端庄的美人"}
    for task in ("t2v-1.3B", "t2v-A14B", "ti2v-5B"):
        assert example(TASKS[task])["prompt"].startswith(
            "Two anthropomorphic cats in comfy boxing gear and bright gloves fight"
        )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--task i2v-14B --prompt cat", "task i2v-14B needs --image, got none"),
        ("--task i2v-14B --image {}", "task i2v-14B needs a prompt, got none"),
        ("--task i2v-14B --image {} --prompt ''", "task i2v-14B needs a prompt, got none"),
        ("--task t2v-14B --prompt ''", "task t2v-14B needs a prompt, got none"),
        ("--task flf2v-14B --first_frame {}", "task flf2v-14B needs --last_frame, got none"),
        ("--task vace-14B --src_ref_images {}", "task vace-14B needs a prompt, got none"),
    ],
)
def test_what_is_left_out_beside_something_is_missed(words, says, capsys):
    assert main(["plan", "--on", "h200", *shlex.split(words.format(FOLDER / "girl.jpg"))]) == 2
    assert says in capsys.readouterr().err


def test_from_python_nothing_is_made_up():
    with pytest.raises(WanFastError, match="needs a prompt"):
        wan_fast.plan(EngineConfig(task="ti2v-5B", checkpoint="tiny", device="cpu"), Request())


# --- several processes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "asked", "processes", "says"),
    [
        ("t2v-1.3B", dict(ulysses_size=8), 8, "must divide the 12 heads of t2v-1.3B, got 8; take --ring_size 8"),
        ("vace-1.3B", dict(ulysses_size=8), 8, "must divide the 12 heads of vace-1.3B, got 8; take --ring_size 8"),
        (
            "ti2v-5B",
            dict(ulysses_size=7),
            7,
            "the 24 heads of ti2v-5B, got 7; take as many processes as one of 2 3 4 6 8 12 24",
        ),
        ("t2v-14B", dict(ulysses_size=8), 4, "8 times --ring_size 1 must be the number of processes, and there are 4; take"),
        ("t2v-14B", dict(ulysses_size=2, ring_size=2), 8, "take --ulysses_size 8 or --ring_size 8"),
        ("t2v-1.3B", dict(), 8, "1 times --ring_size 1 must be .* 8; take --ring_size 8$"),
        ("t2v-A14B", dict(dit_fsdp=True), 8, "1 times --ring_size 1 must be .* 8; take --ulysses_size 8$"),
        ("t2v-14B", dict(ulysses_size=2, ring_size=4), 8, "this version runs on one process, and there are 8"),
        ("t2v-1.3B", dict(ring_size=8), 8, "this version runs on one process, and there are 8"),
        ("t2v-14B", dict(ulysses_size=4, ring_size=2), 1, "^--ulysses_size 4 --ring_size 2: .*--nproc_per_node=8 "),
        (
            "t2v-14B",
            dict(t5_fsdp=True),
            1,
            "^--t5_fsdp: for several .*, and there is 1; start .*--nproc_per_node=NUMBER_OF_GPUS",
        ),
        ("t2v-14B", dict(dit_fsdp=True), 1, "^--dit_fsdp: for several processes, and there is 1"),
    ],
)
def test_what_is_asked_of_processes_must_fit_them(task, asked, processes, says):
    with pytest.raises(WanFastError, match=says):
        check(EngineConfig(task=task, **asked), World(size=processes))


@pytest.mark.parametrize(
    ("task", "asked", "says"),
    [
        ("t2v-A14B", dict(ring_size=2), "--ring_size is of the Wan 2.1 tasks, got 2 for t2v-A14B; take --ulysses_size 2"),
        ("i2v-A14B", dict(ring_size=8), "got 8 for i2v-A14B"),
        ("ti2v-5B", dict(ring_size=4, ulysses_size=2), "got 4 for ti2v-5B; take --ulysses_size 8"),
        ("t2v-14B", dict(ulysses_size=0), "--ulysses_size must be a number of processes, 1 or more, got 0"),
        ("t2v-14B", dict(ring_size=-1), "--ring_size must be a number of processes, 1 or more, got -1"),
        ("t2v-14B", dict(t5_cpu=True, t5_fsdp=True), "--t5_cpu has .* --t5_fsdp .*; leave one out"),
    ],
)
def test_flags_for_several_processes_that_no_number_of_them_allows(task, asked, says):
    with pytest.raises(WanFastError, match=says):
        EngineConfig(task=task, **asked)


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"WORLD_SIZE": "eight"}, "WORLD_SIZE must be a whole number, got 'eight'; start with torchrun, or unset"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE must be a whole number, got ''"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be 1 or more, got 0"),
        ({"WORLD_SIZE": "8", "RANK": "-1"}, "RANK must be a whole number, got '-1'"),
        ({"WORLD_SIZE": "8", "RANK": "8"}, "RANK must be below its WORLD_SIZE of 8, got 8"),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "2"}, "LOCAL_RANK must be below its WORLD_SIZE of 2, got 2"),
        ({"RANK": "1"}, "RANK must be below its WORLD_SIZE of 1, got 1"),
    ],
)
def test_an_environment_that_torchrun_did_not_make(environment, says, monkeypatch, capsys):
    with pytest.raises(WanFastError, match=re.escape(says)):
        World.of(environment)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["run", "--task", "t2v-14B"]) == 2
    assert says in capsys.readouterr().err


def test_torchrun_is_read():
    assert World.of({"WORLD_SIZE": "16", "RANK": "9", "LOCAL_RANK": "1"}) == World(size=16, rank=9, local_rank=1)
    assert World.of({}) == World()


def test_an_engine_in_each_process_of_another_program(monkeypatch):
    """From Python only what is asked of several processes is refused, not that there are some."""
    in_world(monkeypatch, 2)
    config, request = EngineConfig(task="ti2v-5B", checkpoint="tiny", device="cpu"), Request(prompt="cat")
    assert wan_fast.plan(config, request).tokens
    with pytest.raises(WanFastError, match="this version runs on one process, and there are 2"):
        wan_fast.plan(replace(config, ulysses_size=2), request)
    in_world(monkeypatch, 1)
    with pytest.raises(WanFastError, match="--dit_fsdp: for several processes, and there is 1"):
        wan_fast.Engine(replace(config, dit_fsdp=True))


@pytest.mark.parametrize(("text", "size"), [("480p", (832, 480)), ("720P", (1280, 720))])
def test_sizes_have_names(text, size):
    assert parse_size(text) == size
