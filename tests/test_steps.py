import pytest
import torch
from golden_adapter import GRIDS, Scheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from wan_fast.steps import official, sigma_grid, solver_rows, step_plan
from wan_fast.tasks import TASKS

# timesteps the official schedulers send to the model: (solver, steps, shift)
TIMESTEPS = {
    (
        "unipc",
        50,
        5.0,
    ): """999 995 991 987 982 978 973 968 963 957 952 946 940 934 927 920 913 906 898 890 882 873 863 854
        843 833 821 809 796 783 768 753 737 720 701 681 660 636 611 584 555 522 487 448 405 356 302 241 172 92""",
    (
        "unipc",
        40,
        3.0,
    ): """999 991 982 973 963 954 944 933 922 911 899 887 874 861 847 832 817 801 785 767 749 730 710 688
        666 642 617 590 562 531 499 465 428 388 345 299 249 195 136 71""",
    (
        "unipc",
        40,
        12.0,
    ): """999 997 995 993 990 988 985 982 979 976 972 969 965 961 956 952 947 941 936 929 922 915 907 898
        888 877 865 852 837 819 799 776 749 717 678 631 571 492 386 235""",
    (
        "unipc",
        50,
        16.0,
    ): """999 998 997 995 994 993 991 989 988 986 984 982 980 978 976 973 971 968 965 963 959 956 953 949
        945 941 936 931 926 920 914 907 899 891 882 872 861 848 834 818 799 778 752 722 685 639 581 504 399 245""",
    ("dpm++", 6, 5.0): "1000 961 909 833 714 500",
    # not rounded: as Wan2.2-Lightning, which brought this solver, tells the model
    ("euler", 4, 5.0): f"1000 937.5 {1000 * 2.5 / 3!r} 625",
    ("lcm", 4, 5.0): f"1000 937.5 {1000 * 2.5 / 3!r} 625",
}

# x after each step from (1, -0.5), with v = 0.7 tanh(x) + 0.3 t / 1000
TRAJECTORIES = {
    ("unipc", 6, 5.0): [
        0.9679504,
        -0.4990848,
        0.9258177,
        -0.4970253,
        0.8680388,
        -0.4925131,
        0.7831779,
        -0.4827090,
        0.6503938,
        -0.4562720,
        0.3755316,
        -0.3817025,
    ],
    ("unipc", 4, 1.0): [0.7920042, -0.4940605, 0.6331741, -0.4640406, 0.5253931, -0.4143416, 0.4224970, -0.3644398],
    ("dpm++", 6, 5.0): [
        0.9679571,
        -0.4990968,
        0.9253821,
        -0.4972777,
        0.8669294,
        -0.4931260,
        0.7814713,
        -0.4835678,
        0.6476990,
        -0.4575523,
        0.3731574,
        -0.3827218,
    ],
    ("dpm++", 4, 1.0): [0.7917210, -0.4941295, 0.6200790, -0.4703192, 0.5049645, -0.4233794, 0.4046623, -0.3721690],
}


@pytest.mark.parametrize("case", TIMESTEPS, ids=str)
def test_timesteps(case):
    solver, steps, shift = case
    plan = step_plan(TASKS["t2v-14B"], official(solver, steps, shift), (5.0, 5.0))
    assert [step.timestep for step in plan] == [float(t) for t in TIMESTEPS[case].split()]
    assert plan[-1].next_sigma == 0 and [step.index for step in plan] == list(range(steps))


def test_first_sigmas():
    assert sigma_grid("unipc", 50, 5.0)[:3] == pytest.approx((0.99979985, 0.99573237, 0.99153048), abs=1e-7)
    assert sigma_grid("dpm++", 50, 5.0)[:3] == pytest.approx((1.0, 0.99593496, 0.99173552), abs=1e-7)


@pytest.mark.parametrize("case", TRAJECTORIES, ids=str)
def test_trajectory(case):
    scheduler, x, seen = Scheduler(*case), torch.tensor([1.0, -0.5]), []
    for t in scheduler.timesteps:
        x = scheduler.step(0.7 * torch.tanh(x) + 0.3 * t / 1000, t, x)
        seen.append(x)
    torch.testing.assert_close(torch.cat(seen), torch.tensor(TRAJECTORIES[case]), atol=2e-6, rtol=0)


def test_experts_and_their_guidance():
    for task, high, guidance in (("t2v-A14B", 26, (3.0, 4.0)), ("i2v-A14B", 15, (3.5, 3.5))):
        spec = TASKS[task]
        steps = step_plan(spec, official("unipc", spec.num_steps, spec.shift), guidance)
        assert [step.expert for step in steps] == ["high_noise"] * high + ["low_noise"] * (40 - high)
        assert {step.guidance_scale for step in steps[:high]} == {guidance[1]}
        assert {step.guidance_scale for step in steps[high:]} == {guidance[0]}
        assert len({step.kind for step in steps}) == 2


@given(st.sampled_from(["unipc", "dpm++", "euler"]), st.integers(1, 60), st.floats(0.5, 20))
@settings(max_examples=60, deadline=None)
def test_the_true_velocity_leads_to_the_clean_sample(solver, steps, shift):
    """Where the model's x0 does not change along the path, every solver must arrive at it, whatever its order."""
    sigmas = sigma_grid(solver, steps, shift)
    x0, noise = 0.3, -1.7
    x, previous, seen = (1 - sigmas[0]) * x0 + sigmas[0] * noise, 0.0, [0.0, 0.0]
    for i, (corrector, predictor) in enumerate(solver_rows(solver, sigmas)):
        assert x == pytest.approx((1 - sigmas[i]) * x0 + sigmas[i] * noise, abs=1e-5)
        now = [x0, *seen]
        if corrector:
            x = sum(w * v for w, v in zip(corrector, [previous, *now], strict=True))
        previous, seen = x, now[:2]
        x = sum(w * v for w, v in zip(predictor, [x, *now[:2]], strict=True))
    assert x == pytest.approx(x0, abs=1e-6)


def diffusers_scheduler(name, shift):
    diffusers = pytest.importorskip("diffusers")
    if name == "diffusers_euler":
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize(("steps", "shift"), [(1, 5.0), (2, 5.0), (7, 3.0), (20, 8.0)])
def test_solvers_equal_those_of_diffusers_on_its_grid(name, steps, shift):
    theirs = diffusers_scheduler(name, shift)
    theirs.set_timesteps(steps)
    ours = Scheduler(name, steps, shift)
    torch.testing.assert_close(torch.tensor(ours.timesteps), theirs.timesteps.float(), atol=1e-3, rtol=0)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas.float(), atol=1e-6, rtol=0)
    x = y = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    for t, t_theirs in zip(ours.timesteps, theirs.timesteps, strict=True):
        x = ours.step(torch.tanh(x) + t / 2000, t, x)
        y = theirs.step(torch.tanh(y) + t / 2000, t_theirs, y, return_dict=False)[0]
    torch.testing.assert_close(x, y, atol=2e-5, rtol=1e-5)
