"""The same program with and without segments on a GPU: equal bits of everything."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from fresh import play as play_in_fresh_process
from helpers import Run, assert_exact, both_forms, grads, plain, setting
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from torch_reprise import checkpoint, checkpoint_sequential, ledger
from torch_reprise._demo.model import GPT, GPTConfig

pytestmark = pytest.mark.cuda

DEVICE = "cuda"


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=DEVICE).requires_grad_()


def standing() -> list[Tensor]:
    """Where the device's generator stands: its state has the seed and the offset."""
    return [torch.cuda.get_rng_state(DEVICE)]


def backward(out: Tensor, *leaves: Tensor) -> list[Any]:
    """What a program returns: its output, gradients, and where the generator stood and stands."""
    before = standing()
    torch.rand(5, device=DEVICE)
    out.float().square().sum().backward()
    return [out.detach().clone(), grads(leaves), before, standing()]


# A model.


def trained(
    run: Run,
    around: Callable[[], Any],
    dtype: torch.dtype = torch.float32,
    scaled: bool = False,
    steps: int = 3,
) -> list[Any]:
    """Some steps of AdamW on a GPT with dropout; `around` is in force in the forward alone."""
    model = GPT(GPTConfig(3, 128, 2, 64, 96, 0.1)).to(DEVICE, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler(DEVICE, enabled=scaled)
    inputs, targets = torch.randint(96, (2, 4, 64)).to(DEVICE)
    seen: list[Any] = []
    for _ in range(steps):
        optimizer.zero_grad()
        with around():
            hidden = model.run_blocks(model.embed(inputs), run)
            loss = model.loss(hidden, targets)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        seen.append([loss.detach().clone(), grads(model), standing()])
    return [seen, [p.detach().clone() for p in model.parameters()]]


def plainly() -> Any:
    return sdpa_kernel(SDPBackend.MATH)


@contextmanager
def in_bfloat16(backend: SDPBackend) -> Iterator[None]:
    with torch.autocast(DEVICE, torch.bfloat16), sdpa_kernel(backend):
        yield


@contextmanager
def in_half() -> Iterator[None]:
    with torch.autocast(DEVICE, torch.float16), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        yield


@contextmanager
def in_tf32() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    with (
        setting(lambda: matmul.allow_tf32, partial(setattr, matmul, "allow_tf32"), True),
        sdpa_kernel(SDPBackend.MATH),
    ):
        yield


@contextmanager
def with_another_library() -> Iterator[None]:
    prefer = torch.backends.cuda.preferred_blas_library
    with setting(prefer, prefer, "cublaslt"), sdpa_kernel(SDPBackend.MATH):
        yield


TRAININGS: dict[str, Callable[[Run], list[Any]]] = {
    "float32": lambda run: trained(run, plainly),
    "bfloat16 weights": lambda run: trained(run, plainly, torch.bfloat16),
    "autocast, flash attention": lambda run: trained(
        run, partial(in_bfloat16, SDPBackend.FLASH_ATTENTION)
    ),
    "autocast, memory-efficient attention": lambda run: trained(
        run, partial(in_bfloat16, SDPBackend.EFFICIENT_ATTENTION)
    ),
    "autocast, attention of operators": lambda run: trained(
        run, partial(in_bfloat16, SDPBackend.MATH)
    ),
    "half with scaled gradients": lambda run: trained(run, in_half, scaled=True),
    "TF32 in the forward only": lambda run: trained(run, in_tf32),
    "cuBLASLt in the forward only": lambda run: trained(run, with_another_library),
}


@both_forms
@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_is_exact(name: str, use_reentrant: bool) -> None:
    assert_exact(TRAININGS[name], use_reentrant=use_reentrant)


@both_forms
def test_settings_of_the_forward_matter_here(use_reentrant: bool) -> None:
    """TF32 is another product on this device: the test above could fail."""
    a, b = torch.randn(2, 256, 256, device=DEVICE)
    exact = a @ b
    with in_tf32():
        assert not torch.equal(a @ b, exact)


# Small programs.


def convolutions(run: Run) -> list[Any]:
    block = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.RReLU(),
        nn.Dropout2d(0.3),
        nn.Conv2d(8, 4, 3),
        nn.BatchNorm2d(4, momentum=None),
        nn.ReLU(inplace=True),
    ).to(DEVICE)
    x = leaf(4, 3, 16, 16)
    found = [backward(run(block, x), x, *block.parameters()) for _ in range(2)]
    return [found, [buffer.clone() for buffer in block.buffers()]]


DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: F.dropout(x, 0.4),
    "dropout in place": lambda x: F.dropout(x * 1, 0.4, inplace=True),
    "alpha_dropout": lambda x: F.alpha_dropout(x, 0.4, training=True),
    "feature dropout": lambda x: F.dropout1d(x, 0.4),
    "rrelu": lambda x: F.rrelu(x, training=True),
    "rand": lambda x: x * torch.rand_like(x),
    "randn": lambda x: x + torch.randn_like(x) * x,
    "randint": lambda x: x * torch.randint(1, 5, x.shape, device=x.device),
    "randperm": lambda x: x[:, torch.randperm(x.shape[1], device=x.device)].exp(),
    "bernoulli": lambda x: x * torch.bernoulli(x.detach().sigmoid()),
    "normal": lambda x: x * torch.empty_like(x).normal_(2.0, 0.5),
    "exponential": lambda x: x * torch.empty_like(x).exponential_(),
    "geometric": lambda x: x * torch.empty_like(x).geometric_(0.3),
    "log-normal": lambda x: x * torch.empty_like(x).log_normal_(),
    "cauchy": lambda x: x * torch.empty_like(x).cauchy_().clamp(-3, 3),
    "random": lambda x: x * torch.empty_like(x).random_(0, 7),
    "multinomial": lambda x: x * torch.multinomial(x.detach().exp(), 4).sum().float(),
    "poisson": lambda x: x * torch.poisson(x.detach().exp()),
    "gumbel": lambda x: F.gumbel_softmax(x, hard=True).cumprod(-1) * x,
    "gamma": lambda x: x * torch._standard_gamma(x.detach().exp()),
    "uniform, two kernels' worth": lambda x: x * torch.rand(1 << 22, device=x.device).sum(),
    "two devices": lambda x: x * F.dropout(torch.ones(24), 0.5).to(x.device) * torch.rand_like(x),
}


@both_forms
@pytest.mark.parametrize("name", DRAWS)
def test_every_way_to_draw(name: str, use_reentrant: bool) -> None:
    def program(run: Run) -> list[Any]:
        x = leaf(16, 24)
        with setting(
            torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, False
        ):
            out = run(lambda t: DRAWS[name](DRAWS[name](t.sin()).exp().clamp(max=9.0)), x)
            return backward(out, x)

    assert_exact(program, use_reentrant=use_reentrant)


def explicit_generator(run: Run) -> list[Any]:
    generator = torch.Generator(DEVICE).manual_seed(11)
    x = leaf(64)

    def fn(t: Tensor) -> Tensor:
        mask = torch.empty_like(t).bernoulli_(0.5, generator=generator)
        return (t * mask).exp() * torch.rand(64, device=DEVICE, generator=generator)

    found = backward(run(fn, run(fn, x)), x)
    return [found, generator.get_state()]


def moves_to_the_device(run: Run) -> list[Any]:
    x = torch.randn(32).requires_grad_()

    def fn(t: Tensor) -> Tensor:
        on_device = F.dropout(F.dropout(t.sin(), 0.5).to(DEVICE).exp(), 0.5)
        return F.dropout(on_device.cpu().sin(), 0.5)

    return backward(run(fn, x), x)


def in_place(run: Run) -> list[Any]:
    x = leaf(32, 32)

    def fn(t: Tensor) -> Tensor:
        y = (t * 2).add_(1).sin_()
        return F.dropout(y.mul_(0.5), 0.2, inplace=True).relu_()

    return backward(run(fn, x), x)


def nested(run: Run) -> list[Any]:
    x = leaf(32)

    def level(depth: int, t: Tensor) -> Tensor:
        t = F.dropout(t.sin(), 0.3)
        return F.dropout((run(level, depth - 1, t) if depth else t).exp(), 0.3)

    return backward(run(level, 3, x), x)


def offloaded(run: Run) -> list[Any]:
    x = leaf(64, 64)

    def fn(t: Tensor) -> Tensor:
        with save_on_cpu(pin_memory=True):
            t = F.dropout(t.sin() @ t, 0.5)
        return F.dropout(t.tanh(), 0.5).exp()

    with save_on_cpu(pin_memory=True):
        first = run(fn, x)
    return backward(run(fn, first), x)


def on_other_streams(run: Run) -> list[Any]:
    """The function works on a stream of its own, and backward is called from a third one."""
    x = leaf(512, 512)
    inside, outside = torch.cuda.Stream(), torch.cuda.Stream()

    def fn(t: Tensor) -> Tensor:
        inside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(inside):
            for _ in range(8):
                t = F.dropout((t @ t).tanh(), 0.2)
        torch.cuda.current_stream().wait_stream(inside)
        t.record_stream(torch.cuda.current_stream())
        return t * t

    out = run(fn, run(fn, x))
    outside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(outside):
        found = backward(out, x)
    torch.cuda.current_stream().wait_stream(outside)
    return found


def second_derivative(run: Run) -> list[Any]:
    x = leaf(32)
    out = run(lambda t: F.dropout(t.sin(), 0.3).exp() * t, x)
    (first,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    return backward(first * out, x)


def default_device(run: Run) -> list[Any]:
    x = leaf(32)
    with torch.device(DEVICE):
        out = run(lambda t: t * torch.rand(32) + torch.arange(32.0) * t, x)
    return backward(out, x)


def complex_numbers(run: Run) -> list[Any]:
    x = leaf(32, 2)
    out = run(
        lambda t: torch.fft.ifft(torch.view_as_complex(F.dropout(t, 0.3)).exp()).conj().abs(), x
    )
    return backward(out, x)


def packed(run: Run) -> list[Any]:
    """Attention over sequences of several lengths in one jagged tensor."""
    lengths = [5, 17, 2, 9]
    parts = [torch.randn(n, 4, 32, device=DEVICE, dtype=torch.bfloat16) for n in lengths]
    x = torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)

    def fn(t: Tensor) -> Tensor:
        q = t.transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, (q * 2).sin(), q).transpose(1, 2)
        return F.dropout(mixed.sin(), 0.5)

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = run(fn, x).values()
    out.float().square().sum().backward()
    assert x.grad is not None
    return [out.detach().clone(), x.grad.values().clone(), standing()]


BOTH_FORMS: dict[str, Callable[[Run], list[Any]]] = {
    "convolutions and batch norm": convolutions,
    "an explicit generator": explicit_generator,
    "moves to the device": moves_to_the_device,
    "in place": in_place,
    "nested": nested,
    "offloaded": offloaded,
    "on other streams": on_other_streams,
    "default device": default_device,
    "complex numbers": complex_numbers,
}


@both_forms
@pytest.mark.parametrize("name", BOTH_FORMS)
def test_a_program_is_exact(name: str, use_reentrant: bool) -> None:
    assert_exact(BOTH_FORMS[name], use_reentrant=use_reentrant)


@pytest.mark.parametrize("program", [second_derivative, packed], ids=lambda p: p.__name__)
def test_a_program_of_the_form_with_hooks_is_exact(program: Callable[[Run], list[Any]]) -> None:
    assert_exact(program)


# cuDNN's RNNs draw the masks between their layers from a state that is no generator's. The forward
# of the reentrant form has no graph and saves nothing, so that nobody sees that state.


def lstm(layers: int = 3) -> nn.LSTM:
    return nn.LSTM(16, 16, num_layers=layers, dropout=0.5).to(DEVICE)


def several_steps(run: Run) -> list[Any]:
    """The first one makes the state, the others go on with it; at last one without a segment."""
    module, x = lstm(), leaf(5, 4, 16)
    found = [backward(run(lambda t: module(t)[0], x), x, *module.parameters()) for _ in range(3)]
    return [found, module(x)[0].detach(), standing()]


def with_other_draws(run: Run) -> list[Any]:
    module, x = nn.GRU(16, 16, num_layers=2, dropout=0.3).to(DEVICE), leaf(5, 4, 16)

    def fn(t: Tensor) -> Tensor:
        return F.dropout(module(F.dropout(t, 0.3))[0], 0.3) * torch.rand_like(t)

    found = [backward(run(fn, x), x, *module.parameters()) for _ in range(3)]
    return [found, fn(x).detach(), standing()]


def several_at_once(run: Run) -> list[Any]:
    """Segments whose replays come in the other order, and operators outside of any between."""
    modules, x = [lstm(2), lstm(3)], leaf(5, 4, 16)

    def fn(t: Tensor) -> Tensor:
        for module in modules:
            t = module(module(t)[0])[0]
        return t

    outside = modules[0](x)[0].detach()
    out = run(fn, modules[1](run(fn, x) + outside)[0])
    found = backward(out, x, *[p for module in modules for p in module.parameters()])
    return [found, modules[0](x)[0].detach(), standing()]


def one_inside_of_another(run: Run) -> list[Any]:
    module, x = lstm(2), leaf(5, 4, 16)

    def inner(t: Tensor) -> Tensor:
        result: Tensor = module(t)[0]
        return result

    def outer(t: Tensor) -> Tensor:
        return inner(run(inner, inner(run(inner, t)).sin()))

    found = [backward(run(outer, x), x, *module.parameters()) for _ in range(2)]
    return [found, inner(x).detach(), standing()]


def seeded_between(run: Run) -> list[Any]:
    """After the new seed the next operator makes the state anew, which no replay may do for it."""
    module, x = lstm(2), leaf(5, 4, 16)
    found = []
    for _ in range(2):
        out = run(lambda t: F.dropout(module(t)[0], 0.5), x)
        torch.manual_seed(3)
        found += backward(out, x, *module.parameters())
        found += [module(x)[0].detach(), standing()]
    return found


RNNS = [several_steps, with_other_draws, several_at_once, one_inside_of_another, seeded_between]


@pytest.mark.parametrize("program", RNNS, ids=lambda p: p.__name__)
@pytest.mark.parametrize("check", ["default", "bitwise"])
def test_the_dropout_of_rnns(program: Callable[[Run], list[Any]], check: str) -> None:
    program(plain)  # the first one of a process makes the state
    assert_exact(program, determinism_check=check)


def test_the_dropout_state_of_an_rnn_is_counted_and_dropped() -> None:
    module, x = lstm(2), leaf(5, 4, 16)
    before = ledger.stashed_bytes()
    out = checkpoint(lambda t: module(t)[0], x, use_reentrant=False)
    again = checkpoint(lambda t: module(t)[0], x, use_reentrant=False)
    each = (ledger.stashed_bytes() - before) // 2
    assert each > 1 << 20
    del out, again
    assert ledger.stashed_bytes() - before < 1 << 10


@both_forms
def test_a_sequence_is_exact(use_reentrant: bool) -> None:
    def program(run: Run) -> list[Any]:
        layers = nn.Sequential(
            *[nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Dropout(0.2)) for _ in range(6)]
        ).to(DEVICE)
        x = leaf(8, 32)
        out = (
            layers(x)
            if run is plain
            else checkpoint_sequential(layers, 3, x, use_reentrant=use_reentrant)
        )
        return backward(out, x, *layers.parameters())

    assert_exact(program, use_reentrant=use_reentrant)


def test_selective_is_exact() -> None:
    def policy(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        saved = operator in (torch.ops.aten.mm.default, torch.ops.aten.native_dropout.default)
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    def program(run: Run) -> list[Any]:
        x, weight = leaf(32, 32), leaf(32, 32)

        def fn(t: Tensor) -> Tensor:
            t = F.dropout((t @ weight).sin(), 0.3)
            return (torch.rand_like(t) * t @ weight).exp().tanh() * torch.rand_like(t)

        return backward(run(fn, x), x, weight)

    assert_exact(program, context_fn=partial(create_selective_checkpoint_contexts, policy))


@both_forms
@pytest.mark.parametrize("name", ["in place", "on other streams", "moves to the device"])
def test_equal_bits_are_no_mismatch(name: str, use_reentrant: bool) -> None:
    assert_exact(BOTH_FORMS[name], use_reentrant=use_reentrant, determinism_check="bitwise")


@both_forms
def test_cuda_first_used_inside(use_reentrant: bool) -> None:
    program = """
x = torch.arange(64.0).requires_grad_()

def moved(t):
    y = dropout(t.to("cuda").sin(), 0.5)
    return dropout(y.cpu().exp(), 0.5)

out = run(moved, x)
assert torch.cuda.is_initialized()
torch.rand(100, device="cuda")
out.sum().backward()
report([out.tolist(), x.grad.tolist(), offsets(), torch.rand(4, device="cuda").tolist()])
"""
    expected = play_in_fresh_process(program, form=None)
    assert play_in_fresh_process(program, form=use_reentrant) == expected
