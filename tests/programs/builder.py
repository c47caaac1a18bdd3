"""Writing a program: its tree, its variables and the choice among them.

A program is a tree of lines and indented blocks, not text, so that a failing one can be reduced
(run.py).  Rules that keep every program valid and deterministic without checkpointing:

* every variable stands for a real tensor of the program's shape (B, T, D) and base dtype, or for
  one of the kinds in `COERCION`, which says how to get there;
* a variable is changed in place only as long as it is fresh: nobody has read it, and what made it
  did not save it;
* values stay within a few orders of magnitude, so that a difference is not lost in infinities.
"""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class Var:
    """A name in a program; `kind` is a key of COERCION."""

    name: str
    kind: str = "real"
    fresh: bool = False  # may be changed in place
    reads: int = 0
    grad: bool = True  # has, as far as the builder can tell, a gradient


# How a variable of each kind becomes a real tensor of the base dtype and of shape (B, T, D).
COERCION: dict[str, str] = {
    "real": "{v}",
    "any": "{v}.to({dtype})",  # made under autocast: its dtype depends on the op
    "half": "{v}.to({dtype})",
    "complex": "torch.view_as_real({v}).flatten(-2).to({dtype})",  # (B, T, D / 2)
    "swapped": "{v}.transpose(1, 2)",  # (B, D, T)
    "row": "{v}.expand({B}, {T}, {D})",  # (D,)
    "column": "{v}.expand({B}, {T}, {D})",  # (B, T, 1)
    "bool": "{v}.to({dtype})",
}


@dataclass
class Block:
    """A compound statement: `header` ends in a colon."""

    header: str
    body: list[Node] = field(default_factory=list)


Node = str | Block


def render(nodes: list[Node], indent: int = 0) -> list[str]:
    lines: list[str] = []
    for node in nodes:
        if isinstance(node, str):
            lines.append("    " * indent + node)
        else:
            lines.append("    " * indent + node.header)
            lines += render(node.body, indent + 1) or ["    " * (indent + 1) + "pass"]
    return lines


@dataclass
class Program:
    seed: int
    nodes: list[Node]
    features: Counter[str]
    reentrant: bool = False

    @property
    def source(self) -> str:
        return "\n".join(render([Block("def program(ckpt, rec):", self.nodes)])) + "\n"


@dataclass
class Scope:
    """The variables of one function; `parent` is what its closure can see."""

    parent: Scope | None = None
    variables: list[Var] = field(default_factory=list)

    def visible(self) -> list[Var]:
        outer = self.parent.visible() if self.parent else []
        return outer + self.variables


class Builder:
    """Writes one program.  What ops.py, generate.py and plan.py have in common."""

    def __init__(self, seed: int, reentrant: bool, nested_arguments: bool) -> None:
        self.rng = random.Random(f"{seed} {reentrant}")
        self.seed, self.reentrant, self.nested_arguments = seed, reentrant, nested_arguments
        self.B, self.T = self.rng.choice([1, 2, 3]), self.rng.choice([2, 3, 5])
        self.D = self.rng.choice([4, 8])
        self.dtype = self.rng.choice(["torch.float32"] * 3 + ["torch.float64"])
        self.smooth = not reentrant and self.chance(0.3)
        self.autocast = False
        self.no_grad = False
        self.touched = False  # what was read since the last variable was made has a gradient
        self.features: Counter[str] = Counter()
        self.setup: list[Node] = []
        self.main: list[Node] = []
        self.out = self.main
        self.scope = Scope()
        self.leaves: list[str] = []
        self.modules: dict[str, str] = {}
        self.params: dict[tuple[int, ...], list[str]] = {}
        self.roots: list[tuple[str, str]] = []  # outputs and what the loss multiplies them with
        self.state: list[str] = []  # what a program changes besides computing
        self.count = 0

    @property
    def shape(self) -> str:
        return f"{self.B}, {self.T}, {self.D}"

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def uses(self, feature: str) -> None:
        self.features[feature] += 1

    def names(self, n: int, prefix: str = "v") -> list[str]:
        self.count += n
        return [f"{prefix}{i}" for i in range(self.count - n, self.count)]

    def emit(self, node: Node) -> None:
        self.out.append(node)

    @contextlib.contextmanager
    def block(self, header: str) -> Iterator[None]:
        block, outer = Block(header), self.out
        self.out.append(block)
        self.out = block.body
        try:
            yield
        finally:
            self.out = outer

    def temp(self, expression: str) -> str:
        """A name that only the statement being written knows."""
        (name,) = self.names(1)
        self.emit(f"{name} = {expression}")
        return name

    def bind(
        self, expression: str, kind: str = "real", fresh: bool = False, grad: bool | None = None
    ) -> Var:
        name = expression if expression.isidentifier() else self.temp(expression)
        if self.autocast and kind == "real":
            kind = "any"
        grad = (self.touched if grad is None else grad) and not self.no_grad
        var = Var(name, kind, fresh and not self.no_grad, grad=grad)
        self.touched = False
        self.scope.variables.append(var)
        return var

    def coerce(self, var: Var) -> str:
        return COERCION[var.kind].format(v=var.name, dtype=self.dtype, B=self.B, T=self.T, D=self.D)

    def pick(self, exclude: str = "") -> Var:
        """A variable to read: rather a recent one; a new leaf where none may be read."""
        # Of what a closure captures, the reentrant form differentiates with respect to leaves only.
        here = self.reentrant or (self.scope.variables and self.chance(0.85))
        pool = self.scope.variables if here else self.scope.visible()
        pool = [v for v in pool if v.name != exclude]
        if self.reentrant:
            pool = [v for v in pool if v.reads < 2 and v.grad]
        if not pool:
            return self.leaf()
        if self.chance(0.8):
            pool = [v for v in pool if v.grad] or pool
        recent = pool[-4:] if self.chance(0.7) else pool
        return self.read(self.rng.choice(recent))

    def look(self) -> str:
        """A variable whose value is used but not its gradient: it does not count as read."""
        pool = [v for v in self.scope.variables if not v.fresh] or [self.leaf()]
        return self.coerce(self.rng.choice(pool)) + ".detach()"

    def read(self, var: Var) -> Var:
        var.reads += 1
        var.fresh = False
        self.touched |= var.grad
        return var

    def real(self, exclude: str = "") -> str:
        return self.coerce(self.pick(exclude))

    def fresh(self) -> Var | None:
        """A variable of this very function that may be changed in place."""
        found = [v for v in self.scope.variables if v.fresh and v.kind == "real"]
        return self.rng.choice(found) if found else None

    def leaf(self) -> Var:
        (name,) = self.names(1, "x")
        tail = ".requires_grad_()" if self.reentrant or self.chance(0.75) else ""
        self.setup.append(f"{name} = torch.randn({self.shape}, dtype={self.dtype}){tail}")
        self.leaves.append(name)
        return self.read(Var(name, grad=bool(tail)))

    def param(self, *shape: int, scale: float = 0.4, shared: bool = True) -> str:
        self.touched = True
        known = self.params.setdefault(shape, [])
        shared = shared and not self.reentrant
        if shared and known and self.chance(0.5):
            self.uses("parameter used again")
            return self.rng.choice(known)
        (name,) = self.names(1, "p")
        self.setup.append(
            f"{name} = nn.Parameter(torch.randn({shape}, dtype={self.dtype}) * {scale})"
        )
        self.leaves.append(name)
        if shared:
            known.append(name)
        return name

    def module(self, expression: str) -> str:
        self.touched = True
        name = self.modules.get(expression)
        if name is None or self.reentrant or self.chance(0.5):
            (name,) = self.names(1, "m")
            self.setup.append(f"{name} = {expression}")
            self.modules[expression] = name
            self.leaves.append(name)
        return name

    def counter(self) -> str:
        """A tensor that one place of the program reads and changes in place."""
        (name,) = self.names(1, "c")
        self.setup.append(f"{name} = torch.zeros({self.D}, dtype={self.dtype})")
        self.state.append(name)
        return name

    def index(self) -> str:
        draw = f"torch.randint(0, 7, ({self.B}, {self.T}))"
        if self.chance(0.3):
            self.uses("draw")
            return draw
        (name,) = self.names(1, "i")
        self.setup.append(f"{name} = {draw}")
        return name
