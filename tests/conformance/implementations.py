"""What the cases are run on: one object for each implementation of checkpointing.

A program asks for what it wants (`early_stop=False`, the host's generators) and not for how that
is spelled. An option that an implementation does not have and that makes it more careful
(`host_rng`, `bitwise`, `generators`) is left out there: what its users get without it is the
verdict. A feature that it does not have at all is `Unsupported`, and the case is not run.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch.utils import checkpoint as torch_checkpoint

Run = Callable[..., Any]
Policy = Callable[..., torch_checkpoint.CheckpointPolicy]


class Unsupported(Exception):
    """The implementation has no such feature; the text says which."""


class Implementation:
    """The plain program: checkpointing is a call. The others derive from it."""

    spec = "plain"
    """What finds it again in another process (see `find`)."""
    title = "plain"
    plain = True

    def __init__(self) -> None:
        self._ticks: list[None] = []

    # Programs call it in the function that they checkpoint. append is atomic, += is not, and the
    # device threads of autograd call functions too.
    def tick(self) -> None:
        self._ticks.append(None)

    @property
    def calls(self) -> int:
        """How often functions that were checkpointed ran."""
        return len(self._ticks)

    def configured(
        self,
        *,
        early_stop: bool = True,
        debug: bool = False,
        selective: Policy | None = None,
        host_rng: bool = False,
        bitwise: bool = False,
        generators: Iterable[torch.Generator] = (),
    ) -> Run:
        """`run(function, *args, **kwargs)` with these options, in the form with hooks."""
        return lambda function, /, *args, **kwargs: function(*args, **kwargs)

    def checkpoint(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        return self.configured()(function, *args, **kwargs)

    def reentrant(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    def sequential(self, functions: list[Callable[..., Any]], segments: int, value: Any) -> Any:
        for function in functions:
            value = function(value)
        return value

    def group(self) -> AbstractContextManager[Any]:
        """Backward calls in it share replays."""
        return nullcontext()


class LikeTorch(Implementation):
    """A function that is called as `torch.utils.checkpoint.checkpoint` is.

    What else it has (`checkpoint_sequential`, `GraphExecGroup`,
    `create_selective_checkpoint_contexts`) is looked for in the module that it comes from.
    """

    plain = False

    def __init__(self, spec: str, title: str, function: Run, module: ModuleType) -> None:
        super().__init__()
        self.spec = spec
        self.title = title
        self._function = function
        self._module = module

    def _feature(self, name: str) -> Any:
        if not hasattr(self._module, name):
            raise Unsupported(f"has no {name}")
        return getattr(self._module, name)

    def _options(self, early_stop: bool, debug: bool, selective: Policy | None) -> dict[str, Any]:
        options: dict[str, Any] = {"use_reentrant": False}
        if not early_stop:
            options["early_stop"] = False
        if debug:
            options["debug"] = True
        if selective is not None:
            contexts = self._feature("create_selective_checkpoint_contexts")
            options["context_fn"] = functools.partial(contexts, selective)
        return options

    def configured(
        self,
        *,
        early_stop: bool = True,
        debug: bool = False,
        selective: Policy | None = None,
        host_rng: bool = False,
        bitwise: bool = False,
        generators: Iterable[torch.Generator] = (),
    ) -> Run:
        options = self._options(early_stop, debug, selective)
        return functools.partial(self._function, **options)

    def reentrant(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        return self._function(function, *args, use_reentrant=True, **kwargs)

    def sequential(self, functions: list[Callable[..., Any]], segments: int, value: Any) -> Any:
        chain = self._feature("checkpoint_sequential")
        return chain(functions, segments, value, use_reentrant=False)

    def group(self) -> AbstractContextManager[Any]:
        group: AbstractContextManager[Any] = self._feature("GraphExecGroup")()
        return group


class Reprise(LikeTorch):
    """torch_reprise, with the options that torch does not have."""

    def configured(
        self,
        *,
        early_stop: bool = True,
        debug: bool = False,
        selective: Policy | None = None,
        host_rng: bool = False,
        bitwise: bool = False,
        generators: Iterable[torch.Generator] = (),
    ) -> Run:
        options = self._options(early_stop, debug, selective)
        more: dict[str, Any] = {}
        if host_rng:
            more["preserve_host_rng"] = True
        if bitwise:
            more["determinism_check"] = "bitwise"
        if generators:
            more["generators"] = tuple(generators)
        if not more:
            return functools.partial(self._function, **options)
        run: Run = self._module.Checkpointer(**options, **more)
        return run


class _StateHook:
    """The generators that torch looks after by itself; torch_remat wants to be given a hook."""

    def __init__(self, host_rng: bool, generators: tuple[torch.Generator, ...]) -> None:
        self._host = host_rng
        self._generators = generators

    def _modules(self) -> list[tuple[Callable[[], Any], Callable[[Any], Any]]]:
        pairs: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [
            (torch.get_rng_state, torch.set_rng_state)
        ]
        if torch.cuda.is_initialized():
            pairs.append((torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all))
        pairs += [(g.get_state, g.set_state) for g in self._generators]
        if self._host:
            random = importlib.import_module("random")
            numpy = importlib.import_module("numpy.random")
            pairs += [(random.getstate, random.setstate), (numpy.get_state, numpy.set_state)]
        return pairs

    def snapshot(self) -> Any:
        return [get() for get, _ in self._modules()]

    def restore(self, state: Any) -> None:
        # As many as there were: CUDA may have been initialised since.
        for value, (_, put) in zip(state, self._modules(), strict=False):
            put(value)


class Remat(Implementation):
    """torch_remat, whose options, function and arguments are three calls."""

    spec = "torch_remat"
    plain = False

    def __init__(self, module: ModuleType) -> None:
        super().__init__()
        self.title = "torch_remat"
        self._module = module

    def configured(
        self,
        *,
        early_stop: bool = True,
        debug: bool = False,
        selective: Policy | None = None,
        host_rng: bool = False,
        bitwise: bool = False,
        generators: Iterable[torch.Generator] = (),
    ) -> Run:
        if selective is not None:
            raise Unsupported("has no context_fn; it saves regions that the function marks")
        if debug:
            raise Unsupported("has no debug option")
        # Its replays always run to the end.
        hook = _StateHook(host_rng, tuple(generators))
        decorate = self._module.checkpoint(recompute_state_hooks=(hook,))
        return lambda function, /, *args, **kwargs: decorate(function)(*args, **kwargs)

    def reentrant(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        raise Unsupported("has no reentrant form")

    def sequential(self, functions: list[Callable[..., Any]], segments: int, value: Any) -> Any:
        raise Unsupported("has no checkpoint_sequential")

    def group(self) -> AbstractContextManager[Any]:
        # It is built on torch's form with hooks, which follows torch's group.
        return torch_checkpoint.GraphExecGroup()


STANDARD = ("torch.utils.checkpoint", "torch_reprise", "torch_remat")


def find(spec: str) -> Implementation:
    """A fresh object for `spec`: a name in `STANDARD`, "plain", or "package.module:attribute".

    The attribute is a function that is called as torch's, or a class derived from
    `Implementation`.

    Raises:
        ImportError: there is no such module.
        AttributeError: the module has no such attribute.
    """
    if spec == "plain":
        return Implementation()
    if spec == "torch.utils.checkpoint":
        return LikeTorch(spec, "torch", torch_checkpoint.checkpoint, torch_checkpoint)
    if spec == "torch_reprise":
        ours = importlib.import_module(spec)
        return Reprise(spec, spec, ours.checkpoint, ours)
    if spec == "torch_remat":
        return Remat(importlib.import_module(spec))
    name, _, attribute = spec.partition(":")
    module = importlib.import_module(name)
    found = getattr(module, attribute or "checkpoint")
    if isinstance(found, type) and issubclass(found, Implementation):
        made = found()
        made.spec = spec
        return made
    return LikeTorch(spec, spec, found, module)


def version(spec: str) -> str | None:
    """The version of the package that `spec` is in; None if it does not say."""
    name = "torch" if spec.startswith("torch.") else spec.partition(":")[0].partition(".")[0]
    found = getattr(importlib.import_module(name), "__version__", None)
    if found is None:
        from importlib import metadata

        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            return None
    return str(found)
