"""Where the memory plan has CUDA graphs, and what they cost."""

from dataclasses import replace

import pytest

from wan_fast.config import EngineConfig, Request, WanFastError
from wan_fast.memory import GIB
from wan_fast.planning import plan

FIVE = EngineConfig(task="ti2v-5B", checkpoint="nobody/nothing-here")
CAT = Request(prompt="a cat", seed=0)
SMALL = replace(CAT, size=(64, 64))


def memory(request=CAT, **options):
    return plan(replace(FIVE, **options), request).memory


def test_graphs_are_kept_where_their_memory_fits_twice(gpu):
    gpu(80)
    kept = memory()
    assert kept.graphs == "kept" and not kept.offload
    once = {stage: count - kept.working["denoise"] for stage, count in kept.peak.items()}
    assert once == memory(cuda_graphs=False).peak
    needed = max(kept.peak.values())
    assert memory(vram=needed).graphs == "kept"
    released = memory(vram=needed - 1)
    assert released.graphs == "released" and released.peak == once and not released.offload
    assert memory(vram=max(once.values())).graphs == "released"


def test_there_are_none_where_weights_move_or_they_are_not_wanted(gpu):
    gpu(80)
    for options in (dict(cuda_graphs=False), dict(offload_model=True), dict(vram=24 * GIB)):
        none = memory(**options)
        assert none.graphs == "off" and not none.decode_graphs and none.offload == ("cuda_graphs" not in options)


def test_asking_for_graphs_is_asking_for_all_models_on_the_device(gpu):
    with pytest.raises(WanFastError, match="--cuda-graphs and --offload_model True exclude each other"):
        replace(FIVE, cuda_graphs=True, offload_model=True)
    gpu(80)
    assert memory(cuda_graphs=True).graphs == "kept"
    gpu(22)
    assert memory().offload
    with pytest.raises(WanFastError, match="leave out --cuda-graphs"):
        memory(cuda_graphs=True)


def test_a_cpu_has_none():
    none = plan(EngineConfig(task="ti2v-5B", checkpoint="tiny", device="cpu"), SMALL).memory
    assert none.graphs == "off" and not none.decode_graphs
    with pytest.raises(WanFastError, match="--cuda-graphs: the device is a CPU, which has none; leave it out"):
        plan(EngineConfig(task="ti2v-5B", checkpoint="tiny", device="cpu", cuda_graphs=True), SMALL)


def test_chunks_of_the_vae_have_graphs_where_they_are_short(gpu):
    gpu(80)
    assert not memory().decode_graphs, "a chunk of 1280*704 keeps the GPU busy for longer than the host"
    assert memory(SMALL).decode_graphs
    assert memory(cuda_graphs=True).decode_graphs
    assert not memory(SMALL, cuda_graphs=False).decode_graphs


@pytest.mark.parametrize("cuda_graphs", [None, True])
def test_strips_have_no_graphs(gpu, cuda_graphs):
    gpu(24)
    strips = memory(cuda_graphs=cuda_graphs, offload_model=False)
    assert strips.decode_tiles > 1 and strips.graphs == "released" and not strips.decode_graphs
