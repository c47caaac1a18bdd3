"""Random programs, checkpointed and not, give the same bits.

`tests/programs` writes the programs; this file decides how many run and proves that a broken
checkpoint would be noticed.  `REPRISE_PROGRAMS=N` runs N programs of the non-reentrant form instead
of the default, `REPRISE_CHECKPOINT=torch` runs `torch.utils.checkpoint` in place of ours.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from programs import generate, run
from torch import Tensor

IMPLEMENTATION = os.environ.get("REPRISE_CHECKPOINT", "reprise")
PROGRAMS = int(os.environ.get("REPRISE_PROGRAMS", "500"))
REENTRANT_PROGRAMS = max(60, PROGRAMS // 5)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)  # conftest.py puts it back


def assert_exact(seed: int, ckpt: run.Implementation, **options: Any) -> None:
    verdict = run.check(seed, ckpt, **options)
    if verdict.difference:
        pytest.fail(
            f"seed {seed} ({ckpt.name}): {verdict.difference}\n{run.listing(verdict.program)}\n"
            f"to reduce it: python -m programs.run --seeds {seed} --reduce"
            f"{' --reentrant' if verdict.program.reentrant else ''}",
            pytrace=False,
        )


@pytest.mark.parametrize("seed", range(PROGRAMS))
def test_random_program_is_exact(seed: int) -> None:
    assert_exact(seed, run.implementation(IMPLEMENTATION, style=seed))


@pytest.mark.parametrize("seed", range(REENTRANT_PROGRAMS))
def test_random_reentrant_program_is_exact(seed: int) -> None:
    # Keyword and nested arguments are ours alone: torch refuses them in this form.
    nested = IMPLEMENTATION != "torch"
    ckpt = run.implementation(IMPLEMENTATION, reentrant=True, style=seed)
    assert_exact(seed, ckpt, reentrant=True, nested_arguments=nested)


# --- the generator -----------------------------------------------------------


@pytest.mark.skipif(IMPLEMENTATION != "reprise", reason="counts our replays")
def test_programs_are_replayed() -> None:
    from torch_reprise import ledger

    without = []
    for seed in range(40):
        before = ledger.replays()
        run.check(seed, run.implementation("reprise", style=seed))
        without += [seed] * (ledger.replays() == before)
    assert len(without) < 8, without


@pytest.mark.parametrize("reentrant", [False, True])
def test_few_programs_are_discarded_and_all_are_deterministic(reentrant: bool) -> None:
    discarded = 0
    for seed in range(150):
        program, plain, attempts = run.valid_program(seed, reentrant=reentrant)
        discarded += attempts
        assert plain.difference(run.execute(program, run.PLAIN)) == "", run.listing(program)
    assert discarded / (150 + discarded) < 0.2


def test_a_seed_is_a_program() -> None:
    for seed in range(20):
        assert generate.program(seed).source == generate.program(seed).source
    assert len({generate.program(seed).source for seed in range(50)}) == 50


FEATURES = {
    False: """
        linear mlp norm conv embedding sparse_embedding attention sdpa big_module unary binary
        residual dropout draw drawn_index view other_shape inplace gradient_hook custom_function
        complex_numbers half_precision detached local_gradient
        |draw in backward|local gradient with create_graph|autocast|autocast off|no_grad region
        |saved-tensor hooks|segment within autocast|segment within saved-tensor hooks
        |segment without grad|no tensor argument|tensors in containers|keyword argument
        |argument that is no tensor|several outputs|sibling segments|loop of segments
        |parameter passed and used|parameter used again
        |in place on what a segment or statement returned|set_checkpoint_early_stop
        |early_stop=False|determinism_check='none'|preserve_rng_state=True|context_fn=two_contexts
        |debug=True|depth 1|depth 2|depth 3|depth 4
        |plan: backward|plan: retain|plan: grad|plan: inputs|plan: intermediate|plan: anomaly
        |plan: roots|plan: partial|plan: dropped|plan: double|plan: grad penalty|plan: triple
    """,
    True: """
        linear mlp norm conv embedding attention sdpa unary binary dropout draw view inplace
        |autocast|tensors in containers|keyword argument|several outputs
        |depth 1|depth 2|depth 3|depth 4|plan: backward|plan: retain
    """,
}


@pytest.mark.parametrize(("reentrant", "programs"), [(False, 320), (True, 60)])
def test_every_feature_appears(reentrant: bool, programs: int) -> None:
    words, *phrases = FEATURES[reentrant].split("|")
    wanted = words.split() + [p.strip() for p in phrases]
    found: Counter[str] = Counter()
    for seed in range(programs):
        found.update(set(run.valid_program(seed, reentrant=reentrant)[0].features))
    assert {name: found[name] for name in wanted if found[name] < 2} == {}


# --- a broken checkpoint is noticed ------------------------------------------


def broken(replay: Callable[..., Any]) -> run.Implementation:
    """torch's checkpoint around a function that is `replay(fn, ...)` from its second run on."""

    def checkpoint(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        options = {k: kwargs.pop(k) for k in run.OPTIONS if k in kwargs}
        options["debug"] = False
        runs = 0

        def once_right(*args: Any, **kwargs: Any) -> Any:
            nonlocal runs
            runs += 1
            return fn(*args, **kwargs) if runs == 1 else replay(fn, *args, **kwargs)

        return torch.utils.checkpoint.checkpoint(
            once_right, *args, use_reentrant=False, **options, **kwargs
        )

    return run.Implementation(
        "broken", checkpoint, torch.utils.checkpoint.set_checkpoint_early_stop
    )


def other_numbers(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    torch.rand(())
    return fn(*args, **kwargs)


def next_number(value: Any) -> Any:
    """The same structure, the first element of every real tensor one ulp higher."""
    if isinstance(value, dict):
        return {k: next_number(v) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(next_number(v) for v in value)
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() == 0:
        return value
    with torch.no_grad():
        moved = value.detach().clone(memory_format=torch.contiguous_format)
        first = moved.view(-1)[:1]
        first.copy_(torch.nextafter(first, first + 1))
    return moved.requires_grad_(value.requires_grad)


def one_ulp(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return fn(*next_number(args), **next_number(kwargs))


def without_autocast(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with torch.autocast("cpu", enabled=False):
        return fn(*args, **kwargs)


def step_with_dropout(ckpt: run.Implementation, rec: run.Recorder) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 8, requires_grad=True)
    y = ckpt(lambda x: torch.nn.functional.dropout(x.sin().exp(), 0.5) * x, x)
    y.sum().backward()
    rec("grad", x.grad)
    rec.generators("backward")


@pytest.mark.parametrize("replay", [other_numbers, one_ulp])
def test_a_broken_replay_is_noticed(replay: Callable[..., Any]) -> None:
    plain, right, wrong = run.Recorder(), run.Recorder(), run.Recorder()
    step_with_dropout(run.PLAIN, plain)
    step_with_dropout(broken(lambda fn, *a, **k: fn(*a, **k)), right)
    step_with_dropout(broken(replay), wrong)
    assert plain.difference(right) == ""
    assert "grad: " in plain.difference(wrong)


def test_state_that_is_left_behind_is_noticed() -> None:
    @contextlib.contextmanager
    def draws_on_exit() -> Iterator[None]:
        yield
        torch.rand(())

    def leaky(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(
            fn,
            *args,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (contextlib.nullcontext(), draws_on_exit()),
        )

    plain, left = run.Recorder(), run.Recorder()
    step_with_dropout(run.PLAIN, plain)
    step_with_dropout(run.Implementation("leaky", leaky, run.PLAIN.early_stop), left)
    assert "generator after backward" in plain.difference(left) or "grad" in plain.difference(left)


@pytest.mark.parametrize(
    ("replay", "feature", "share"),
    [
        (other_numbers, "draw", 0.5),
        (one_ulp, "depth 1", 0.4),
        (without_autocast, "segment within autocast", 0.3),
    ],
)
def test_random_programs_notice_a_broken_replay(
    replay: Callable[..., Any], feature: str, share: float
) -> None:
    """Of the programs that use what is broken, a good share comes out different."""
    noticed = tried = 0
    for seed in range(70):
        program, plain, _ = run.valid_program(seed)
        if program.features[feature]:
            tried += 1
            noticed += run.compare(program, plain, broken(replay)) != ""
    assert tried >= 8
    assert noticed / tried >= share


def test_a_failing_program_is_reduced() -> None:
    ckpt = broken(other_numbers)
    for seed in range(50):
        verdict = run.check(seed, ckpt)
        if verdict.difference and not verdict.difference.startswith("raised"):
            break
    small = run.reduce(verdict.program, ckpt)
    assert run.compare(small, run.execute(small, run.PLAIN), ckpt)
    assert len(small.source.splitlines()) < len(verdict.program.source.splitlines()) / 2
