"""The fingerprint that a kernel takes of memory on a device is that of the same values on the CPU.

The CPU's is held against the definition, word for word, in tests/native/fingerprint_test.cpp.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from helpers import Changing, both_forms, message_of
from torch import Tensor

from torch_reprise import _C, CheckpointError, checkpoint

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning"),
    pytest.mark.filterwarnings("ignore:Sparse C.. tensor support is in beta:UserWarning"),
]

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex32,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


def random_bits(nbytes: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (nbytes,), dtype=torch.uint8, generator=generator)


def tensor_of(dtype: torch.dtype, *shape: int) -> Tensor:
    """Any bits at all; of a bool 0 or 1."""
    count = torch.Size(shape).numel()
    bits = random_bits(count * dtype.itemsize)
    return (bits & 1 if dtype is torch.bool else bits).view(dtype).view(shape)


def same_on_both(on_cpu: Tensor, on_device: Tensor) -> None:
    expected = _C.fingerprint(on_cpu)
    assert expected is not None
    assert on_device.is_cuda and _C.fingerprint(on_device) == expected


def test_it_is_taken_by_a_kernel() -> None:
    assert _C.HAS_CUDA_KERNELS, "built without nvcc: a copy on the CPU would be read"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 8, 9, 255, 256, 257, 2049, 70001])
def test_contiguous(dtype: torch.dtype, count: int) -> None:
    tensor = tensor_of(dtype, count)
    same_on_both(tensor, tensor.cuda())


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.t(),
    "permuted": lambda t: t.view(64, 3, 48).permute(2, 0, 1),
    "every second": lambda t: t[:, ::2],
    "every third row, every fifth column": lambda t: t[::3, 1::5],
    "a column": lambda t: t[:, 7],
    "a corner": lambda t: t[3:50, 5:40],
    "expanded": lambda t: t[:, :1].expand(-1, 33),
    "expanded twice": lambda t: t[3, 4].expand(17, 19),
    "overlapping windows": lambda t: t.reshape(-1).unfold(0, 9, 2),
    "shifted by one": lambda t: t.reshape(-1)[1:],
    "shifted by three": lambda t: t.reshape(-1)[3:1000],
    "one element": lambda t: t[5, 6],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", VIEWS)
def test_views(dtype: torch.dtype, name: str) -> None:
    tensor = tensor_of(dtype, 192, 48)
    same_on_both(VIEWS[name](tensor), VIEWS[name](tensor.cuda()))


def test_memory_that_is_not_aligned_to_its_elements() -> None:
    bits = random_bits(4096 + 16)
    whole = bits.cuda()
    for shift, dtype in itertools.product(range(1, 9), (torch.int16, torch.float32, torch.int64)):
        inside = torch.empty(0, dtype=dtype, device="cuda")
        # torch.frombuffer is the CPU's alone; a storage offset counts elements.
        inside.set_(
            whole[shift : shift + 4096].clone().untyped_storage(),  # type: ignore[call-overload]
            0,
            (4096 // dtype.itemsize,),
            (1,),
        )
        same_on_both(bits[shift : shift + 4096].clone().view(dtype), inside)
        same_on_both(bits[shift : shift + 4096], whole[shift : shift + 4096])


def test_many_dimensions() -> None:
    tensor = tensor_of(torch.int16, *[2] * 14)
    for order in (range(13, -1, -1), [*range(0, 14, 2), *range(1, 14, 2)]):
        same_on_both(tensor.permute(*order), tensor.cuda().permute(*order))
    # More than a kernel is given: gathered first.
    many = tensor_of(torch.uint8, *[2] * 18)
    order = [*range(0, 18, 2), *range(1, 18, 2)]
    same_on_both(many.permute(order), many.cuda().permute(order))


@pytest.mark.parametrize(
    "make",
    [
        lambda t: t.conj(),
        lambda t: t.conj().imag,
        lambda t: torch.view_as_real(t)[..., 1],
    ],
    ids=["conjugated", "negated", "imaginary"],
)
def test_lazy_signs(make: Callable[[Tensor], Tensor]) -> None:
    tensor = torch.randn(33, 7, dtype=torch.complex64)
    same_on_both(make(tensor), make(tensor.cuda()))


def test_sparse() -> None:
    dense = torch.randn(40, 30).relu()
    for sparse in (dense.to_sparse(), dense.to_sparse_csr(), dense.to_sparse_csc()):
        same_on_both(sparse, sparse.cuda())


def test_more_than_four_gigabytes() -> None:
    """Positions need more than 32 bits; the CPU's copy is as large."""
    count = (1 << 32) + 12345
    on_device = torch.empty(count, dtype=torch.uint8, device="cuda")
    on_device.copy_(random_bits(1 << 20).repeat(-(-count // (1 << 20)))[:count])
    same_on_both(on_device.cpu(), on_device)
    view = on_device.view(-1)[: (1 << 32) + 4096].view(-1, 4096).t()
    same_on_both(view.cpu().t().contiguous().t(), view)


def test_a_single_bit_is_seen_wherever_it_is() -> None:
    tensor = random_bits(1 << 22).cuda()
    before = _C.fingerprint(tensor)
    for position in (0, 1, 4095, 4096, 1 << 21, (1 << 22) - 1):
        tensor[position] ^= 4
        assert _C.fingerprint(tensor) != before
        tensor[position] ^= 4
    assert _C.fingerprint(tensor) == before


def test_it_waits_for_the_stream_that_writes() -> None:
    """Taken in the order of the current stream, behind what was launched there."""
    side = torch.cuda.Stream()
    for round_ in range(20):
        value = torch.zeros(1 << 24, device="cuda")
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(2_000_000)
            value.fill_(round_ + 1.0)
            found = _C.fingerprint(value)
        assert found == _C.fingerprint(torch.full((1 << 24,), round_ + 1.0))


def test_it_leaves_generators_and_the_current_device_alone() -> None:
    before = torch.cuda.get_rng_state()
    _C.fingerprint(torch.ones(1000, device="cuda"))
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert torch.cuda.current_device() == 0


@both_forms
def test_other_values_are_an_error(use_reentrant: bool) -> None:
    x = torch.randn(256, 256, device="cuda", requires_grad=True)
    fn = Changing(lambda t: t.sin().exp(), lambda t: (t * (1 + 2**-20)).sin().exp())
    out = checkpoint(fn, x, use_reentrant=use_reentrant, determinism_check="bitwise")
    text = message_of(CheckpointError, lambda: out.sum().backward())
    assert 'other values than its forward did (determinism_check="bitwise"' in text
    assert "float32 [256, 256] on cuda:0" in text


@both_forms
def test_sums_in_whatever_order_are_seen(use_reentrant: bool) -> None:
    """A million float additions into one place, by atomics: no two runs round alike."""
    index = torch.zeros(1 << 20, dtype=torch.long, device="cuda")

    def fn(t: Tensor) -> Tensor:
        return torch.zeros(4, device="cuda").index_add(0, index, t).exp()

    x = (torch.randn(1 << 20, device="cuda") * 1e-3).requires_grad_()
    torch.use_deterministic_algorithms(False)
    errors = 0
    for _ in range(10):
        out = checkpoint(fn, x, use_reentrant=use_reentrant, determinism_check="bitwise")
        try:
            out.sum().backward()
        except CheckpointError as error:
            error.__traceback__ = None
            errors += 1
    assert errors > 0
    torch.use_deterministic_algorithms(True)
    out = checkpoint(fn, x, use_reentrant=use_reentrant, determinism_check="bitwise")
    out.sum().backward()
