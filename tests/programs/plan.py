"""The second half of a program: a loss and one of several ways to go backward."""

from __future__ import annotations

from .builder import Block, Builder, Node


def write_plan(g: Builder) -> None:
    """Records what the forward made, a loss over all of it, a backward plan, and the gradients."""
    if g.chance(0.5):
        g.join_unread()
    g.emit("rec.generators('forward')")
    outs = [v for v in g.scope.variables if v.reads == 0]
    if not any(v.grad for v in outs):
        outs += [v for v in g.scope.variables if v.grad][-1:] or [
            g.bind(f"{g.real()} * {g.param(g.D)}")
        ]
    outs.sort(key=lambda v: not v.grad)
    steps = g.B * g.T * g.D
    first = outs[0]
    for v in outs:
        (c,) = g.names(1, "c")
        last = g.rng.choice([0.5, 1.0, 1.5])
        g.setup.append(
            f"{c} = torch.linspace(-1.0, {last}, {steps}, dtype={g.dtype}).view({g.shape})"
        )
        factor = "" if v.grad or g.reentrant else f" * {g.coerce(first)}"
        g.roots.append((g.coerce(v) + factor, c))
    terms = [f"({c} * {v}).sum()" for v, c in g.roots]
    g.emit("leaves = {" + ", ".join(f"'{n}': {n}" for n in g.leaves if n[0] != "m") + "}")
    for n in g.leaves:
        if n[0] == "m":
            g.emit(f"leaves.update({{'{n}.' + k: p for k, p in {n}.named_parameters()}})")
    g.emit("wanted = [t for t in leaves.values() if t.requires_grad]")
    plans = {"backward": 4, "retain": 2}
    if not g.reentrant:
        plans |= {"grad": 2, "inputs": 2, "intermediate": 2, "anomaly": 1, "roots": 1}
        if len(terms) > 1:
            plans |= {"partial": 3, "dropped": 1}
    if g.smooth:
        plans = {"double": 4, "grad penalty": 3, "triple": 1}
    plan = g.rng.choices(list(plans), list(plans.values()))[0]
    g.uses(f"plan: {plan}")
    g.emit(f"loss = {' + '.join(terms)}")
    g.emit("rec('loss', loss)")
    for line in backward(g, plan, terms):
        g.emit(line)
    g.emit("rec('grads', {n: t.grad for n, t in leaves.items()})")
    g.emit("rec.generators('backward')")


def backward(g: Builder, plan: str, terms: list[str]) -> list[Node]:
    if plan == "backward":
        return ["loss.backward()"]
    if plan == "retain":
        again: list[Node] = [
            "loss.backward(retain_graph=True)",
            "rec('first', {n: t.grad for n, t in leaves.items()})",
        ]
        return again * g.rng.randint(1, 2) + ["loss.backward()"]
    if plan == "grad":
        return ["rec('grad', torch.autograd.grad(loss, wanted, allow_unused=True))"]
    if plan == "inputs":
        return [f"loss.backward(inputs=wanted[::{g.rng.choice([2, 3])}])"]
    if plan == "intermediate":
        middle = g.rng.choice(g.scope.variables).name
        return [
            f"wanted = [t for t in [{middle}, *wanted[:1]] if t.requires_grad]",
            "rec('grad', torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True))",
            "loss.backward()",
        ]
    if plan == "anomaly":
        return [Block("with torch.autograd.set_detect_anomaly(True):", ["loss.backward()"])]
    if plan == "roots":
        roots = ", ".join(f"({v}, {c})" for v, c in g.roots)
        return [
            f"roots = [(v, c) for v, c in [{roots}] if v.requires_grad]",
            "torch.autograd.backward([v for v, _ in roots], [c for _, c in roots])",
        ]
    if plan == "partial":
        return [
            f"part = {terms[0]}",
            "rec('grad', torch.autograd.grad(part, wanted, retain_graph=True, allow_unused=True))",
            "loss.backward()",
        ]
    if plan == "dropped":
        return ["del loss", f"{terms[0]}.backward()"]
    create = "torch.autograd.grad({}, wanted, create_graph=True, allow_unused=True)"
    if plan == "double":
        return [
            f"first = {create.format('loss')}",
            "rec('first', first)",
            "(loss + 0.1 * penalty(first)).backward()",
        ]
    if plan == "grad penalty":
        return [f"first = {create.format('loss')}", "(0.5 * loss + penalty(first)).backward()"]
    return [
        f"first = {create.format('loss')}",
        f"second = {create.format('loss + penalty(first)')}",
        "(0.5 * loss + penalty(second)).backward()",
    ]
