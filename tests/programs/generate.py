"""Builds a random training step as Python source.

`program(seed)` is a pure function of its arguments.  The source of what it returns reads

    def program(ckpt, rec):
        torch.manual_seed(17)
        p0 = nn.Parameter(...)              # leaves, constants, modules
        def f1(a2, *, a3): ...              # segments, nested to a random depth
        r4 = ckpt(f1, x0, a3=[v5, p0])
        rec("r4", r4)                       # snapshot of whatever it is given
        loss = ...
        loss.backward()                     # one of several backward plans
        rec("p0.grad", p0.grad)

`ckpt` is a checkpoint implementation or the plain call; `rec` collects snapshots.

Programs of the reentrant form are drawn from a narrower language (`reentrant=True`), within what
torch documents for that form and where its order of accumulation is that of the plain program: no
detached pieces, every parameter used once, no variable read more than twice, every argument read by
one node, all outputs used, `backward()` only.
"""

from __future__ import annotations

from dataclasses import dataclass

from .builder import Block, Builder, Node, Program, Scope, Var
from .ops import OPS, inplace
from .plan import write_plan


@dataclass
class Parameter:
    """One parameter of a generated function: how the call writes it, how the body reads it."""

    name: str
    keyword: bool
    template: str  # of the argument, with {0}, {1} for its tensors
    paths: list[str]  # expressions for those tensors inside the function
    kinds: list[str]
    grads: list[bool]


@dataclass
class Output:
    """A tensor that a generated function returns: where it is in the result, and what it is."""

    path: str
    kind: str
    fresh: bool
    grad: bool


@dataclass
class Function:
    name: str
    parameters: list[Parameter]
    outputs: list[Output]


CONTAINERS = [
    ("[{0}, {1}]", ["[0]", "[1]"]),
    ("({0}, {1})", ["[0]", "[1]"]),
    ("{{'k': {0}, 'n': 3}}", ["['k']"]),
    ("Pair({0}, {1})", [".left", ".right"]),
    ("Box({0})", [".value"]),
    ("{{'k': [{0}, None], 'l': ({1}, 'tag')}}", ["['k'][0]", "['l'][0]"]),
    ("[[{0}], {{'m': Pair({1}, 1.5)}}]", ["[0][0]", "[1]['m'].left"]),
]


class Generator(Builder):
    """Statements and segments."""

    def statement(self, depth: int) -> None:
        """One statement of a body; `depth` is how many segments may still be nested in it."""
        roll = self.rng.random()
        if depth > 0 and roll < 0.15:
            self.segment(self.rng.randint(1, depth))
        elif roll < 0.19 and not self.reentrant:
            self.within("with torch.no_grad():", "no_grad region", no_grad=True)
        elif roll < 0.26 and self.dtype == "torch.float32":
            self.autocast_region(depth)
        elif roll < 0.29 and not self.reentrant:
            self.saved_tensor_hooks(depth)
        elif roll < 0.33:
            dtype, scale = self.rng.choice(["float32", "float64"]), self.rng.choice([0.75, 1.5])
            self.within(f"with settings(torch.{dtype}, {scale}):", "settings", depth)
        else:
            self.operation()

    def operation(self) -> None:
        allowed = [
            o
            for o in OPS
            if (o.smooth or not self.smooth)
            and (o.reentrant or not self.reentrant)
            and (o.autocast or not self.autocast)
        ]
        chosen = self.rng.choices(allowed, [o.weight for o in allowed])[0]
        self.uses(chosen.name)
        chosen.function(self)

    def within(self, header: str, feature: str, depth: int = 0, no_grad: bool = False) -> None:
        self.uses(feature)
        outer = self.no_grad
        self.no_grad = outer or no_grad
        with self.block(header):
            for _ in range(self.rng.randint(1, 2)):
                self.operation()
            if depth > 0 and self.chance(0.8):
                self.uses(f"segment within {feature}")
                self.segment(self.rng.randint(1, depth))
        self.no_grad = outer

    def autocast_region(self, depth: int) -> None:
        outer = self.autocast
        self.autocast = not (outer and self.chance(0.6))
        if self.autocast:
            options = self.rng.choice(["", "", ", cache_enabled=False"])
            header = f"with torch.autocast('cpu', dtype=torch.bfloat16{options}):"
            self.within(header, "autocast", depth)
        else:
            self.within("with torch.autocast('cpu', enabled=False):", "autocast off", depth)
        self.autocast = outer

    def saved_tensor_hooks(self, depth: int) -> None:
        # None that keeps an output itself, as save_on_cpu does on the CPU: nobody frees the cycle
        # through its node, without checkpointing either.
        hooks = self.rng.choice(
            [
                "saved_tensors_hooks(same_layout_copy, lambda t: t)",
                "saved_tensors_hooks(lambda t: (t.detach(), 1), lambda t: t[0])",
                "saved_tensors_hooks(lambda t: Box(same_layout_copy(t)), lambda b: b.value)",
            ]
        )
        self.within(f"with torch.autograd.graph.{hooks}:", "saved-tensor hooks", depth)

    def join_unread(self) -> None:
        """Makes one variable of those that nobody has read, so that little code is dead."""
        unread = [
            v
            for v in self.scope.variables
            if v.reads == 0 and (self.reentrant or self.chance(0.95))
        ]
        while len(unread) > 1:
            a, b = self.coerce(self.read(unread.pop(0))), self.coerce(self.read(unread.pop(0)))
            form = self.rng.choice(
                [
                    "{a} * {b}",
                    "{a} + {b}.sin() * {b}",
                    "{a} * torch.tanh({b})",
                    "{a} / (1.0 + {b}.abs())",
                ]
            )
            if not self.reentrant and self.chance(0.5):
                a, b = b, a
            elif self.reentrant:
                form = form.replace("{b}.sin() * {b}", "{b}.sin()")
            unread.append(self.bind(form.format(a=a, b=b)))

    # --- segments ---------------------------------------------------------------------------------

    def segment(self, depth: int) -> None:
        """A function and one or more checkpointed calls of it."""
        self.uses(f"depth {depth}")
        function, first_arguments = self.define(depth)
        self.call(function, first_arguments)
        if not self.reentrant and self.chance(0.2):
            self.uses("sibling segments")
            self.call(function, None)

    def parameter(self) -> Parameter:
        (name,) = self.names(1, "a")
        keyword = self.chance(0.3) and self.nested_arguments
        if self.nested_arguments and self.chance(0.35):
            # A class of the user's own is opaque to the reentrant form.
            known = [c for c in CONTAINERS if not (self.reentrant and "Box" in c[0])]
            template, suffixes = self.rng.choice(known)
            self.uses("tensors in containers")
        else:
            template, suffixes = "{0}", [""]
        if keyword:
            self.uses("keyword argument")
        return Parameter(name, keyword, template, [name + s for s in suffixes], [], [])

    def arguments(self, parameter: Parameter, first: bool) -> str:
        tensors = []
        for i in range(len(parameter.paths)):
            if first and not self.reentrant and not self.autocast and self.chance(0.5):
                var = self.pick()
                parameter.kinds.append(var.kind)
                parameter.grads.append(var.grad)
                tensors.append(var.name)
            elif first:
                var = self.pick()
                parameter.kinds.append("real")
                parameter.grads.append(var.grad)
                tensors.append(self.coerce(var) + (".contiguous()" if self.reentrant else ""))
            else:
                tensors.append(self.of_kind(parameter.kinds[i]))
        return parameter.template.format(*tensors)

    def of_kind(self, kind: str) -> str:
        if kind == "real":
            return self.real()
        return self.read(self.rng.choice([v for v in self.scope.visible() if v.kind == kind])).name

    def define(self, depth: int) -> tuple[Function, list[str]]:
        (name,) = self.names(1, "f")
        closed_over = not self.reentrant and self.chance(0.08)
        if closed_over:
            self.uses("no tensor argument")
        parameters = (
            [] if closed_over else [self.parameter() for _ in range(self.rng.randint(1, 3))]
        )
        first_arguments = [self.arguments(p, True) for p in parameters]
        positional = [p.name for p in parameters if not p.keyword]
        keywords = [p.name for p in parameters if p.keyword]
        extra: list[str] = []  # parameters that are no tensors
        if self.chance(0.3) and (self.nested_arguments or not keywords):
            self.uses("argument that is no tensor")
            extra = [self.rng.choice(["k=2", "flag=True", "k=0.5", "tag='a'", "nothing=None"])]
        passed = ""
        if self.chance(0.15) and not self.reentrant and positional:
            self.uses("parameter passed and used")
            passed = self.param(self.D, self.D)
            positional.append("weight")
            parameters.append(Parameter("weight", False, "{0}", [], [], []))
            first_arguments.append(passed)
        star = ["*"] if keywords else []
        header = f"def {name}({', '.join(positional + extra + star + keywords)}):"

        outer_out, self.scope = self.out, Scope(self.scope)
        block = Block(header)
        self.out.append(block)
        self.out = block.body
        for p in parameters:
            for path, kind, grad in zip(p.paths, p.kinds, p.grads, strict=True):
                if self.reentrant:
                    self.bind(f"Enter.apply({path})", grad=grad)
                else:
                    self.scope.variables.append(Var(path, kind, grad=grad))
        if passed:
            self.bind(f"F.linear({self.real()}, weight) + F.linear({self.real()}, {passed})")
        if extra and extra[0][0] == "k":
            self.bind(f"{self.real()} * k")
        statements = self.rng.randint(2, 4)
        nested_at = self.rng.randrange(statements) if depth > 1 else -1
        for i in range(statements):
            if i == nested_at:
                self.segment(depth - 1)
            else:
                self.statement(depth - 1)
        outputs = self.result()
        self.scope, self.out = self.scope.parent, outer_out  # type: ignore[assignment]
        return Function(name, parameters, outputs), first_arguments

    def result(self) -> list[Output]:
        """Writes the return statement; what the caller finds where."""
        self.join_unread()
        own = [v for v in self.scope.variables if v.name.isidentifier() and v.name[0] != "a"]
        if self.reentrant:
            own = [v for v in own if v.reads < 2]
        if not any(v.grad for v in own):
            own.append(self.bind(f"{self.real()} * 0.9 + {self.param(self.D)}"))
        main = [v for v in own if v.grad][-1]
        fresh = main.fresh and not self.reentrant
        self.read(main)
        if self.chance(0.5):
            self.emit(f"return {main.name}")
            return [Output("", main.kind, fresh, main.grad)]
        other = self.rng.choice(own)
        if self.reentrant and other is main:
            other = self.bind(f"{self.coerce(main)} + 0.25")
        self.read(other)
        self.uses("several outputs")
        detach = ".detach()" if self.reentrant else ""
        extras = ["3", "None", f"{self.coerce(main)}{detach}.argmax(-1)"]
        if not self.reentrant:
            extras += [
                f"{self.coerce(main)} > 0",
                f"{other.name}.detach()",
                "'tag'",
                self.rng.choice(self.scope.visible()).name,
            ]
        forms = [("({0}, {1}, {2})", ["[0]", "[1]"])]
        if self.nested_arguments:
            forms += [
                ("[{0}, {2}, {1}]", ["[0]", "[2]"]),
                ("{{'out': {0}, 'aux': ({1}, {2})}}", ["['out']", "['aux'][0]"]),
                ("Pair({0}, [{1}, {2}])", [".left", ".right[0]"]),
                ("({0}, {{'n': {2}, 'o': {1}}})", ["[0]", "[1]['o']"]),
            ]
        if not self.reentrant:
            forms.append(("(Box({0}), [{2}, {1}])", ["[0].value", "[1][1]"]))
        template, paths = self.rng.choice(forms)
        self.emit("return " + template.format(main.name, other.name, self.rng.choice(extras)))
        return [
            Output(path, v.kind, False, v.grad)
            for path, v in zip(paths, (main, other), strict=True)
        ]

    def options(self) -> list[str]:
        if self.reentrant:
            return ["preserve_rng_state=True"] if self.chance(0.2) else []
        chosen = []
        for option, probability in (
            ("early_stop=False", 0.2),
            ("determinism_check='none'", 0.1),
            ("preserve_rng_state=True", 0.1),
            ("context_fn=two_contexts", 0.08),
            ("debug=True", 0.02),
        ):
            if self.chance(probability) and not (
                option == "debug=True" and "context_fn=two_contexts" in chosen
            ):
                self.uses(option)
                chosen.append(option)
        return chosen

    def call(self, function: Function, first_arguments: list[str] | None) -> None:
        arguments = first_arguments or [
            self.arguments(p, False) if p.paths else self.param(self.D, self.D)
            for p in function.parameters
        ]
        written = [
            f"{p.name}={a}" if p.keyword else a
            for p, a in sorted(
                zip(function.parameters, arguments, strict=True), key=lambda pair: pair[0].keyword
            )
        ]
        callee = self.rng.choice(
            [function.name] * 4 + [f"Call({function.name})", f"functools.partial({function.name})"]
        )
        (result,) = self.names(1, "r")
        line = f"{result} = ckpt({', '.join([callee, *written, *self.options()])})"
        roll = self.rng.random()
        if roll < 0.1:
            self.uses("set_checkpoint_early_stop")
            with self.block(f"with ckpt.early_stop({self.chance(0.3)}):"):
                self.emit(line)
        elif roll < 0.15 and not self.reentrant:
            self.uses("segment without grad")
            with self.block("with torch.no_grad():"):
                self.emit(line)
        else:
            self.emit(line)
        if self.scope.parent is None:
            self.emit(f"rec('{result}', {result})")
        without_grad = 0.1 <= roll < 0.15 and not self.reentrant
        for o in function.outputs:
            self.bind(
                result + o.path, o.kind, o.fresh and not without_grad, o.grad and not without_grad
            )
        if function.outputs[0].fresh and not self.autocast and self.chance(0.6):
            inplace(self)
        single = len(function.parameters) == 1 and function.parameters[0].template == "{0}"
        positional = single and not function.parameters[0].keyword
        if (
            positional
            and not self.reentrant
            and function.parameters[0].kinds == ["real"]
            and self.chance(0.3)
        ):
            self.loop(function)

    def loop(self, function: Function) -> None:
        """The same function over its own result, as a stack of layers does."""
        first = function.outputs[0]
        self.uses("loop of segments")
        (carry,) = self.names(1, "w")
        self.emit(f"{carry} = {self.real()}")
        with self.block(f"for _ in range({self.rng.randint(2, 3)}):"):
            out = self.coerce(Var(f"ckpt({function.name}, {carry}){first.path}", first.kind))
            self.emit(f"{carry} = {out}")
        self.bind(f"{carry} * 1.0", grad=first.grad)

    # --- the whole --------------------------------------------------------------------------------

    def build(self) -> Program:
        for _ in range(self.rng.randint(1, 2)):
            self.scope.variables.append(self.leaf())
            self.scope.variables[-1].reads = 0
        depth = self.rng.choice([1, 1, 2, 2, 3, 4])
        statements = self.rng.randint(1, 4)
        segment_at = self.rng.randrange(statements)
        for i in range(statements):
            if i == segment_at:
                self.segment(depth)
            else:
                self.statement(depth)
        write_plan(self)
        for name in self.state:
            buffers = f"list({name}.buffers())" if name.startswith("m") else name
            self.emit(f"rec('state of {name}', {buffers})")
        head: list[Node] = [f"torch.manual_seed({self.seed})"]
        return Program(self.seed, head + self.setup + self.main, self.features, self.reentrant)


def program(seed: int, *, reentrant: bool = False, nested_arguments: bool = True) -> Program:
    """The program of this seed; the same arguments always give the same source."""
    return Generator(seed, reentrant, nested_arguments).build()
