"""The stand-in for CUDA graphs is as strict as they are."""

import pytest
import torch
from tape import Tape

from wan_fast.kernels import guidance_step


@pytest.fixture(params=[False, True], ids=["grad", "inference"])
def mode(request):
    with torch.inference_mode(request.param):
        yield


def test_recording_has_no_effect_and_a_replay_has_it(mode):
    x, y = torch.arange(4.0), torch.zeros(4)

    def work():
        x.add_(1)
        x[2:].mul_(10)  # a view
        torch.sub(x, 5, out=y)
        x[0] = 7
        return y * 2, x[1:]

    replay, (made, view) = Tape()(work)
    assert torch.equal(x, torch.arange(4.0)) and not y.any() and made.isnan().all()
    replay()
    assert x.tolist() == [7, 2, 30, 40] and y.tolist() == [-4, -3, 25, 35]
    assert torch.equal(made, y * 2) and torch.equal(view, x[1:])
    x.zero_()
    replay()
    assert x.tolist() == [7, 1, 10, 10] and torch.equal(made, y * 2) and made.tolist() == [-8, -8, 10, 10]


def test_a_number_of_the_host_stays_that_of_the_recording(mode):
    x, numbers = torch.ones(2), [2.0]
    replay, _ = Tape()(lambda: x.mul_(numbers[0]))
    numbers[0] = 10.0
    replay()
    assert x.tolist() == [2, 2]


def test_state_that_moves_is_lost_and_memory_that_is_freed_is_noticed(mode):
    x, state = torch.zeros(2), [torch.ones(2)]
    replay, _ = Tape()(lambda: x.add_(state[0].view(1, 2)[0]))
    old, state[0] = state[0], torch.full((2,), 5.0)
    replay()
    assert x.tolist() == [1, 1], "the replay followed the name, not the address"
    del old
    with pytest.raises(AssertionError, match="memory that was freed"):
        replay()


def test_what_failed_is_undone(mode):
    x = torch.ones(2)

    def work():
        x.mul_(3)
        raise ValueError("in the midst")

    tape = Tape()
    with pytest.raises(ValueError, match="in the midst"):
        tape(work)
    assert x.tolist() == [1, 1] and not tape.busy


def test_an_operator_of_ours_that_writes(mode):
    generator = torch.Generator().manual_seed(0)
    state = [torch.randn(2, 3, 4, 5, generator=generator) for _ in range(4)]
    velocity, weights = torch.randn(2, 3, 4, 5, generator=generator), torch.rand(11, generator=generator)
    wanted, before = [x.clone() for x in state], [x.clone() for x in state]
    tape = Tape()
    replay, _ = tape(lambda: guidance_step(*state, velocity * 2, None, weights))
    assert all(map(torch.equal, state, before))
    for _ in range(2):
        weights.add_(0.5)
        guidance_step(*wanted, velocity * 2, None, weights)
        replay()
    assert all(map(torch.equal, state, wanted))
    assert (tape.captures, tape.replays, tape.launches) == (1, 2, 4)


def test_operators_with_many_results(mode):
    x = torch.arange(6.0)

    def work():
        first, second = x.view(2, 3).unbind()
        values, places = (first - second).sort(descending=True)
        return [values, places, *x.split(2)]

    wanted = [t.clone() for t in work()]
    replay, found = Tape()(work)
    replay()
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize(
    "reading",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.sum()),
        lambda x: float(x[0]),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.equal(x, x),
        lambda x: torch.tensor([1.0]),
        lambda x: x.new_tensor([1.0, 2.0]),
        lambda x: torch.randn(2, generator=torch.Generator()),
    ],
    ids=["item", "bool", "float", "tolist", "numpy", "cpu", "nonzero", "mask", "equal", "tensor", "new_tensor", "randn"],
)
def test_nothing_is_read_back_or_made_of_the_hosts_numbers(reading, mode):
    x = torch.ones(3)
    with pytest.raises(AssertionError, match=r"recorded work (reads|makes|draws)"):
        Tape()(lambda: reading(x))
