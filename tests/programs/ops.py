"""The statements that random programs are made of.

Each function writes one statement (or a few) into the builder's current block and returns the
variable it made.  The rules that they keep to are in builder.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .builder import Builder, Var

OpFunction = Callable[[Builder], Var]


@dataclass
class Op:
    """A registered statement and the programs it may appear in."""

    name: str
    function: OpFunction
    weight: int
    smooth: bool  # differentiable as often as one likes
    reentrant: bool  # within the documented limits of the reentrant form
    autocast: bool  # works under autocast


OPS: list[Op] = []


def op(
    weight: int = 2, *, smooth: bool = True, reentrant: bool = True, autocast: bool = True
) -> Callable[[OpFunction], OpFunction]:
    def register(function: OpFunction) -> OpFunction:
        OPS.append(Op(function.__name__, function, weight, smooth, reentrant, autocast))
        return function

    return register


@op(weight=6)
def unary(g: Builder) -> Var:
    form = g.rng.choice(
        [
            "F.gelu({x})",
            "F.gelu({x}, approximate='tanh')",
            "F.silu({x})",
            "torch.tanh({x})",
            "torch.sin({x})",
            "{x}.cos()",
            "torch.sigmoid({x})",
            "F.softplus({x})",
            "torch.exp(-{x}.abs())",
            "({x}.abs() + 0.1).sqrt()",
            "F.softmax({x}, dim=-1)",
            "F.log_softmax({x}, dim=1)",
            "{x}.cumsum(1) * 0.5",
            "F.elu({x})",
            "{x} * {x}.sigmoid()",
            "torch.atan({x})",
            "F.normalize({x}, dim=-1)",
            "F.hardtanh({x}, -0.8, 0.9)",
            "F.leaky_relu({x}, 0.1)",
            "({x} ** 2).mean(-1, keepdim=True) + {x}",
        ]
    )
    return g.bind(form.format(x=g.real()))


@op(weight=4)
def binary(g: Builder) -> Var:
    form = g.rng.choice(
        [
            "{a} * {b}",
            "{a} - 0.5 * {b}",
            "torch.maximum({a}, {b})",
            "{a} / (1.0 + {b} * {b})",
            "torch.addcmul({a}, {b}, {b}, value=0.3)",
            "torch.where({a} > 0, {a}, {b} * 0.2)",
            "torch.lerp({a}, {b}, 0.3)",
            "torch.atan2({a}, {b}.abs() + 0.5)",
        ]
    )
    return g.bind(form.format(a=g.real(), b=g.real()))


@op(weight=3)
def residual(g: Builder) -> Var:
    return g.bind(f"{g.real()} + 0.5 * {g.real()}", fresh=True)


@op(weight=4)
def linear(g: Builder) -> Var:
    x = g.real()
    if g.chance(0.4):
        module = g.module(f"nn.Linear({g.D}, {g.D}, bias={g.chance(0.7)}, dtype={g.dtype})")
        return g.bind(f"{module}({x})", fresh=True)
    weight = g.param(g.D, g.D)
    form = g.rng.choice(
        [
            f"F.linear({x}, {weight})",
            f"F.linear({x}, {weight}, {g.param(g.D)})",
            f"{x} @ {weight}",
            f"torch.einsum('btd,de->bte', {x}, {weight})",
            f"torch.addmm({g.param(g.D)}, {x}.reshape(-1, {g.D}), {weight}).view({g.shape})",
        ]
    )
    return g.bind(form, fresh=True)


@op(weight=2, autocast=False)
def batch_norm(g: Builder) -> Var:
    module = g.module(f"nn.BatchNorm1d({g.D}, dtype={g.dtype})")
    if module not in g.state:
        g.state.append(module)
    return g.bind(f"{module}({g.real()}.transpose(1, 2)).transpose(1, 2).contiguous()")


@op(weight=2)
def count(g: Builder) -> Var:
    counter = g.counter()
    result = g.bind(f"{g.real()} * (1.0 + {counter}.clone())")
    with g.block("with torch.no_grad():"):
        g.emit(f"{counter}.add_(0.125)")
    return result


@op(weight=2)
def setting(g: Builder) -> Var:
    return g.bind(f"{g.real()} * torch.linspace(0.5, SCALE.get(), {g.D}).sum().to({g.dtype}) * 0.2")


@op(weight=2)
def mlp(g: Builder) -> Var:
    wide = 2 * g.D
    up, down = g.param(wide, g.D), g.param(g.D, wide)
    hidden = g.temp(f"F.linear({g.real()}, {up})")
    return g.bind(f"F.linear({g.rng.choice(['F.gelu', 'F.silu', 'torch.tanh'])}({hidden}), {down})")


@op(weight=3)
def norm(g: Builder) -> Var:
    x, kind = g.real(), g.rng.randrange(4)
    if kind == 0:
        return g.bind(f"{g.module(f'nn.LayerNorm({g.D}, dtype={g.dtype})')}({x})")
    if kind == 1:
        return g.bind(f"F.layer_norm({x}, ({g.T}, {g.D}))")
    if kind == 2:
        return g.bind(f"F.rms_norm({x}, ({g.D},), {g.param(g.D)})")
    return g.bind(f"F.group_norm({x}.transpose(1, 2), 2).transpose(1, 2)")


@op(weight=2)
def conv(g: Builder) -> Var:
    weight = g.param(g.D, g.D, 3)
    return g.bind(f"F.conv1d({g.real()}.transpose(1, 2), {weight}, padding=1).transpose(1, 2)")


@op(weight=2)
def embedding(g: Builder) -> Var:
    table = g.param(7, g.D, scale=0.5)
    return g.bind(f"F.embedding({g.index()}, {table}) * {g.real()}")


@op(weight=1, smooth=False)
def sparse_embedding(g: Builder) -> Var:
    table = g.param(7, g.D, scale=0.5, shared=False)
    return g.bind(f"F.embedding({g.index()}, {table}, sparse=True) + {g.real()}")


@op(weight=3)
def attention(g: Builder) -> Var:
    x, weight = g.real(), g.param(3 * g.D, g.D)
    q, k, v = g.names(3)
    g.emit(f"{q}, {k}, {v} = F.linear({x}, {weight}).chunk(3, dim=-1)")
    scores = g.temp(f"F.softmax({q} @ {k}.transpose(-2, -1) / {g.D**0.5:.3f}, dim=-1)")
    if g.chance(0.5):
        g.uses("dropout")
        scores = g.temp(f"F.dropout({scores}, 0.2)")
    return g.bind(f"{scores} @ {v}")


@op(weight=2, smooth=False)
def sdpa(g: Builder) -> Var:
    x, heads = g.real(), 2
    q, k, v = g.names(3)
    g.emit(
        f"{q}, {k}, {v} = F.linear({x}, {g.param(3 * g.D, g.D)})"
        f".view({g.B}, {g.T}, 3, {heads}, {g.D // heads}).permute(2, 0, 3, 1, 4).unbind(0)"
    )
    drop = g.rng.choice([0.0, 0.0, 0.25])
    causal = g.chance(0.5)
    out = g.temp(
        f"F.scaled_dot_product_attention({q}, {k}, {v}, dropout_p={drop}, is_causal={causal})"
    )
    return g.bind(f"{out}.transpose(1, 2).reshape({g.shape})")


@op(weight=1, smooth=False)
def big_module(g: Builder) -> Var:
    x, kind = g.real(), g.rng.randrange(3)
    if kind == 0:
        module = g.module(f"nn.GRU({g.D}, {g.D}, batch_first=True, dtype={g.dtype})")
        return g.bind(f"{module}({x})[0]")
    if kind == 1:
        module = g.module(
            f"nn.MultiheadAttention({g.D}, 2, dropout=0.1, batch_first=True, dtype={g.dtype})"
        )
        t = g.temp(x)
        return g.bind(f"{module}({t}, {t}, {t}, need_weights={g.chance(0.5)})[0]")
    module = g.module(
        f"nn.TransformerEncoderLayer({g.D}, 2, {2 * g.D}, batch_first=True, dtype={g.dtype})"
    )
    return g.bind(f"{module}({x})")


@op(weight=5)
def dropout(g: Builder) -> Var:
    form = g.rng.choice(
        [
            "F.dropout({x}, 0.3)",
            "F.dropout({x}, 0.5)",
            "F.alpha_dropout({x}, 0.2, training=True)",
            "F.feature_alpha_dropout({x}, 0.2, training=True)",
            "F.dropout1d({x}, 0.3)",
            "F.dropout2d({x}.unsqueeze(0), 0.3).squeeze(0)",
            "torch.native_dropout({x}, 0.25, True)[0]",
            "nn.Dropout(0.4)({x})",
        ]
    )
    return g.bind(form.format(x=g.real()))


@op(weight=5)
def draw(g: Builder) -> Var:
    x = g.real()
    form = g.rng.choice(
        [
            "{x} * torch.rand_like({x})",
            "{x} * torch.randn({s}, dtype={dtype})",
            "{x} * torch.bernoulli(torch.sigmoid({x}.detach()))",
            "{x} * torch.empty_like({x}).uniform_(0.5, 1.5)",
            "{x} * torch.empty_like({x}).exponential_()",
            "{x}[:, torch.randperm({T})] * 1.5",
            "{x} * F.gumbel_softmax({x}, tau=1.0, dim=-1)",
            "{x} + 0.1 * torch.normal(0.0, 1.0, ({s}), dtype={dtype}) * {x}",
            "{x} * torch.randint(0, 3, ({s}))",
            "{x} * torch.poisson({x}.detach().abs())",
            "F.pad({x}, (1, 0))[..., torch.randperm({D})] * torch.rand(())",
            "{x} * (torch.rand({B}, 1, 1, dtype={dtype}) + 0.5)",
        ]
    )
    return g.bind(form.format(x=x, s=g.shape, dtype=g.dtype, B=g.B, T=g.T, D=g.D))


@op(weight=1, smooth=False)
def drawn_index(g: Builder) -> Var:
    g.uses("draw")
    probabilities = f"F.softmax({g.look()}, dim=-1).reshape(-1, {g.D})"
    index = g.temp(f"torch.multinomial({probabilities}, 1).view({g.B}, {g.T}) % 7")
    return g.bind(f"F.embedding({index}, {g.param(7, g.D, scale=0.5)}) * {g.real()}")


@op(weight=5)
def view(g: Builder) -> Var:
    x = g.real()
    half = g.D // 2
    form = g.rng.choice(
        [
            f"{x}.transpose(1, 2).reshape({g.shape})",
            f"{x}.permute(2, 0, 1).contiguous().permute(1, 2, 0)",
            f"torch.cat([{x}[..., {half}:], {x}[..., :{half}]], dim=-1)",
            f"torch.stack({x}.unbind(1)[::-1], dim=1)",
            f"torch.cat([c.sin() for c in {x}.chunk(2, dim=-1)], dim=-1)",
            f"{x}[:, :1].expand({g.shape}) * {x}",
            f"{x}.unflatten(-1, (2, {half})).flip(-2).flatten(-2)",
            f"{x}.roll(1, dims=1)",
            f"{x}.narrow(2, 1, 1) * {x}",
            f"{x}.reshape(-1, {g.D}).view({g.shape})",
            f"{x}.diagonal(dim1=1, dim2=2).sum(-1)[:, None, None] * {x}",
            f"{x}.movedim(0, -1).movedim(-1, 0)",
            f"F.pad({x}, (1, 1))[..., 1:-1]",
            f"{x}.flatten().as_strided(({g.shape}), ({g.T * g.D}, {g.D}, 1))",
            f"{x}.index_select(1, torch.arange({g.T}).flip(0))",
            f"torch.gather({x}, 2, {x}.argsort(-1))",
            f"{x}.unfold(2, 2, 1).sum(-1).mean(-1, keepdim=True) + {x}",
            f"torch.tril({x} @ {x}.mT) @ {x} * 0.2",
        ]
    )
    return g.bind(form)


@op(weight=2, autocast=False)
def other_shape(g: Builder) -> Var:
    x = g.real()
    form, kind = g.rng.choice(
        [
            (f"{x}.transpose(1, 2)", "swapped"),
            (f"{x}.mean((0, 1))", "row"),
            (f"{x}.amax(-1, keepdim=True)", "column"),
            (f"{x}[0, 0]", "row"),
            (f"{x}.transpose(1, 2).contiguous().sin()", "swapped"),
        ]
    )
    return g.bind(form, kind=kind)


@op(weight=5, autocast=False)
def inplace(g: Builder) -> Var:
    """Changes a fresh variable, directly or through views of it."""
    found = g.fresh()
    if found is not None and g.chance(0.8):
        name = found.name
        g.uses("in place on what a segment or statement returned")
    else:
        kind = g.rng.randrange(4 if g.reentrant else 6)
        if kind == 0:
            name = g.temp(f"{g.real()} * 1.5")
        elif kind == 1:
            name = g.temp(f"{g.real()}.clone()")
        elif kind == 2:
            name = g.temp(f"{g.real()} + {g.real()}")
        elif kind == 3:
            name = g.temp(f"F.linear({g.real()}, {g.param(g.D, g.D)})")
        elif kind == 4:
            name = g.temp(f"torch.zeros({g.shape}, dtype={g.dtype})")
        else:
            name = g.temp(f"{g.look()}.clone()")
    half = g.D // 2
    for _ in range(g.rng.randint(1, 3)):
        form = g.rng.choice(
            [
                "{v}.add_({b})",
                "{v}.mul_(0.7)",
                "{v}[:, 0].mul_(2.0)",
                "{v}.transpose(1, 2).add_(0.1)",
                f"{{v}}[..., ::2] = {{b}}[..., :{half}]",
                f"{{v}}.narrow(2, 0, {half}).zero_()",
                "{v}.flatten(1).narrow(1, 1, 2).sub_(0.3)",
                f"{{v}}.masked_fill_({g.look()} > 0.5, 0.25)",
                "{v}.addcmul_({b}, {b}, value=0.2)",
                "{v}[:, -1:].copy_({b}[:, :1])",
                "{v}.index_add_(1, torch.arange(1), {b}[:, :1], alpha=0.5)",
                "{v}[..., 0].unsqueeze(-1).mul_(torch.rand(()))",
                "{v} = ScalesInPlace.apply({v})",
            ]
        )
        g.emit(form.format(v=name, b=g.real(exclude=name) if "{b}" in form else ""))
    last = g.rng.choice(
        [
            "",
            "",
            "{v}.tanh_()",
            "F.relu_({v})",
            "{v} = F.dropout({v}, 0.3, inplace=True)",
            "F.silu({v}, inplace=True)",
            "{v}.sigmoid_()",
            "{v}[:, 0].sin_()",
        ]
    )
    if last:
        g.emit(last.format(v=name))
    if found is not None and name == found.name:
        found.fresh = False
        return found
    return g.bind(name)


@op(weight=2, smooth=False, reentrant=False)
def gradient_hook(g: Builder) -> Var:
    """A hook in the graph; some draw numbers in backward, between the replays of segments."""
    v = g.bind(f"{g.real()} * 1.25")
    form = g.rng.choice(["g * 0.5", "g.clamp(-1.0, 1.0)", "g * torch.rand_like(g)"])
    if "rand" in form:
        g.uses("draw in backward")
    g.emit(f"hook({v.name}, lambda g: {form})")
    return v


@op(weight=3, autocast=False)
def custom_function(g: Builder) -> Var:
    kind = g.rng.randrange(3)
    if kind == 0:
        return g.bind(f"SavesOutput.apply({g.real()})")
    if kind == 1:
        out, index = g.names(2)
        g.emit(f"{out}, {index} = SavesMany.apply({g.real()}, {g.real()}, 0.8)")
        return g.bind(f"{out} + 0.01 * {index}.unsqueeze(-1)")
    g.uses("draw")
    return g.bind(f"SavesDraw.apply({g.real()})")


@op(weight=3, autocast=False, reentrant=False)
def complex_numbers(g: Builder) -> Var:
    z = g.temp(
        f"torch.view_as_complex({g.real()}.float().reshape({g.B}, {g.T}, -1, 2).contiguous())"
    )
    form = g.rng.choice(
        [
            "{z} * torch.polar(torch.ones({half}), torch.arange({half}) * 0.3)",
            "torch.complex({z}.abs(), {z}.imag)",
            "{z} * {z}.conj()",
            "torch.fft.ifft(torch.fft.fft({z}, dim=1) * 0.5, dim=1)",
            "torch.tanh({z} * 0.3)",
            "{z} * torch.randn({half}, dtype=torch.complex64)",
        ]
    )
    return g.bind(form.format(z=z, half=g.D // 2), kind="complex")


@op(weight=2, autocast=False)
def half_precision(g: Builder) -> Var:
    other = g.rng.choice(["torch.bfloat16", "torch.bfloat16", "torch.float64", "torch.float16"])
    x = g.temp(f"{g.real()}.to({other})")
    form = g.rng.choice(
        ["{x} * {x}.sin()", "F.softmax({x}, dim=-1)", "F.gelu({x})", "{x} @ {x}.mT @ {x}"]
    )
    if g.chance(0.5):
        return g.bind(form.format(x=x), kind="half")
    return g.bind(f"({form.format(x=x)}).to({g.dtype})")


@op(weight=2, reentrant=False)
def detached(g: Builder) -> Var:
    if g.chance(0.3):
        return g.bind(f"{g.real()}.detach().sin()", grad=False)
    return g.bind(
        g.rng.choice(
            [f"{g.real()}.detach() * {g.real()}", f"{g.real()} - ({g.real()}).detach() * 0.3"]
        )
    )


@op(weight=2, reentrant=False)
def local_gradient(g: Builder) -> Var:
    """Backward inside the function: over a detached piece, or over its graph so far."""
    kind = g.rng.randrange(3)
    if kind == 0:
        q = g.temp(f"{g.real()}.detach().requires_grad_()")
        with g.block("with torch.enable_grad():"):
            e = g.temp(f"({q}.sin() * {q}.exp().tanh()) * {g.real()}.detach()")
        grad = g.temp(f"local_grad({e}, {q}, retain_graph={g.chance(0.3)})")
        return g.bind(f"{g.real()} * {grad}")
    x = g.bind(f"{g.real()} * 1.1").name
    with_draw = f" * torch.rand_like({x})" if g.chance(0.3) else ""
    e = g.temp(f"{x}.sin() * {x}.tanh(){with_draw}")
    create = g.smooth and kind == 1
    grad = g.temp(f"local_grad({e}, {x}, create_graph={create})")
    if create:
        g.uses("local gradient with create_graph")
    return g.bind(f"{e} + 0.5 * {grad}")
