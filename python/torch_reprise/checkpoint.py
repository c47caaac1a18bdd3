"""``checkpoint`` and what belongs to it: the drop-in for ``torch.utils.checkpoint``.

One Python frame of ours runs per segment, the one of :func:`checkpoint`; all
else is in the compiled core (``csrc/segment/segment.h`` tells the life of a
segment).
"""

from __future__ import annotations

import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from contextvars import ContextVar
from types import FunctionType, MethodType
from typing import Any, TypeAlias, TypeVar, overload

import torch
from torch.utils import checkpoint as torch_checkpoint

from . import _C, _compat
from ._contexts import ContextFn, Contexts, ContextSetting, make_contexts
from ._errors import (
    CheckpointError,
    require_bool,
    require_callable,
    require_generators,
    require_optional_bool,
)
from ._host_rng import with_host_rng
from ._tracing import called_by_compiled_code, in_graph, is_dynamo_compiling, under_tracer
from .debug import DebugSession, debug_enabled, debug_setting

__all__ = [
    "CheckpointError",
    "CheckpointFunction",
    "Checkpointer",
    "GraphExecGroup",
    "check_backward_validity",
    "checkpoint",
    "detach_variable",
    "is_recomputing",
    "noop_context_fn",
    "set_checkpoint_early_stop",
]

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

_early_stop: ContextVar[bool | None] = ContextVar("torch_reprise.early_stop", default=None)

DETERMINISM_CHECKS = ("default", "none", "bitwise")
AMBIENT_POLICIES = {"restore": 0, "check": _C.AMBIENT_CHECK, "ignore": _C.AMBIENT_IGNORE}


def noop_context_fn() -> Contexts:
    """The default ``context_fn``: no context around the forward, none around the replay."""
    return nullcontext(), nullcontext()


def is_recomputing() -> bool:
    """Whether a checkpointed function is being run again, on this thread, for backward.

    For what a function does besides computing, and that must happen once: metrics, logging,
    attributes of Python objects. Random numbers, buffers and settings need no such care. Costs
    tens of nanoseconds. torch has no such function.
    """
    return _C.is_recomputing()


class set_checkpoint_early_stop(ContextSetting):
    """Context manager and decorator: whether replays stop as soon as all they need is recomputed.

    Args:
        enable: overrides the ``early_stop`` argument of every checkpoint that
            begins inside the block (not of those that are replayed inside).

    The setting belongs to the current thread or task (a context variable);
    torch's is one for the process.
    """

    def __init__(self, enable: bool) -> None:
        require_bool("enable", enable)
        super().__init__(_early_stop, enable)


def _is_noop(context_fn: Any) -> bool:
    return context_fn is noop_context_fn or context_fn is torch_checkpoint.noop_context_fn


def _validate(
    *,
    context_fn: Any,
    debug: Any,
    determinism_check: Any,
    early_stop: Any,
    preserve_rng_state: Any,
    respect_saved_tensors_hooks: Any,
    use_reentrant: Any,
) -> None:
    """Raises TypeError or ValueError for options that no call can be made with."""
    require_optional_bool("use_reentrant", use_reentrant)
    require_callable("context_fn", context_fn)
    if determinism_check not in DETERMINISM_CHECKS:
        raise ValueError(
            f"determinism_check must be one of {DETERMINISM_CHECKS}, got {determinism_check!r}"
        )
    require_bool("debug", debug)
    require_bool("early_stop", early_stop)
    require_bool("preserve_rng_state", preserve_rng_state)
    require_optional_bool("respect_saved_tensors_hooks", respect_saved_tensors_hooks)
    if use_reentrant is not False:
        given = [
            name
            for name, is_given in (
                ("context_fn", not _is_noop(context_fn)),
                ("debug", debug),
                ("respect_saved_tensors_hooks", respect_saved_tensors_hooks is not None),
            )
            if is_given
        ]
        if given:
            raise ValueError(
                f"{' and '.join(given)} can only be used with use_reentrant=False: the reentrant "
                "form saves no tensors that a context could act on"
            )


_OPTIONS = tuple(inspect.signature(_validate).parameters)


# What the core takes a call's options as: which form, flags, generators.
_Plain: TypeAlias = tuple[bool, int, tuple[torch.Generator, ...] | None] | tuple[()]


def _plain(options: dict[str, Any]) -> _Plain:
    """What the core runs a call with; empty if Python has to look at each call."""
    if not _is_noop(options["context_fn"]) or options["debug"] or options.get("preserve_host_rng"):
        return ()
    flags = _flags(**{name: options[name] for name in _FLAG_OPTIONS if name in options})
    return options["use_reentrant"] is not False, flags, options.get("generators")


def _validated(parameters: dict[str, Any]) -> dict[str, Any]:
    """The options among a function's parameters, after :func:`_validate`."""
    options = {name: parameters[name] for name in _OPTIONS}
    _validate(**options)
    return options


def _stops_early(early_stop: bool) -> bool:
    """As the call says, unless the user's setting says otherwise."""
    setting = _early_stop.get()
    return early_stop if setting is None else setting


def _flags(
    early_stop: bool,
    preserve_rng_state: bool,
    determinism_check: str,
    context_fn: ContextFn = noop_context_fn,
    check_rng: bool = True,
    ambient: str = "restore",
    preserve_state: bool = True,
) -> int:
    flags = AMBIENT_POLICIES[ambient]
    if not _is_noop(context_fn):
        flags |= _C.OWN_CONTEXTS
    if preserve_state:
        flags |= _C.PRESERVE_STATE
    if early_stop:
        flags |= _C.EARLY_STOP
    if preserve_rng_state:
        flags |= _C.PRESERVE_RNG_STATE
    if determinism_check != "none":
        flags |= _C.CHECK_DETERMINISM
        if check_rng:
            flags |= _C.CHECK_RNG
    if determinism_check == "bitwise":
        flags |= _C.CHECK_VALUES
    return flags


_FLAG_OPTIONS = tuple(inspect.signature(_flags).parameters)


def _with_selective_support(
    context_fn: ContextFn, respect_hooks: bool | None, preserve_rng_state: bool
) -> ContextFn:
    """What selective checkpointing needs from us, if ``context_fn`` makes its contexts."""

    def contexts() -> Contexts:
        forward, replay = make_contexts(context_fn)
        _compat.support_selective(forward, replay, respect_hooks, preserve_rng_state)
        return forward, replay

    return contexts


def _contexts_of(
    context_fn: ContextFn,
    respect_hooks: bool | None,
    preserve_rng_state: bool,
    debug: bool,
    preserve_host_rng: bool = False,
) -> tuple[ContextFn | None, DebugSession | None]:
    """What makes the contexts around forward and replay, None if nothing is wanted around them."""
    contexts: ContextFn | None = None
    if not _is_noop(context_fn):
        contexts = _with_selective_support(context_fn, respect_hooks, preserve_rng_state)
    if preserve_host_rng:
        contexts = with_host_rng(contexts)
    session = None
    if debug_enabled(debug):
        session = DebugSession()
        contexts = session.wrap(contexts)
    return contexts, session


def _warn_use_reentrant(name: str, stacklevel: int) -> None:
    warnings.warn(
        f"torch_reprise.{name}: pass use_reentrant explicitly. Without it the reentrant form is "
        "used, as in torch, which plans to make this an error; use_reentrant=False is "
        "recommended, use_reentrant=True keeps what happens now.",
        UserWarning,
        stacklevel=stacklevel + 1,
    )


def _run(
    function: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    use_reentrant: bool | None,
    context_fn: ContextFn,
    determinism_check: str,
    debug: bool,
    early_stop: bool,
    preserve_rng_state: bool,
    respect_saved_tensors_hooks: bool | None,
    generators: tuple[torch.Generator, ...] | None = None,
    preserve_host_rng: bool = False,
    check_rng: bool = True,
    ambient: str = "restore",
    preserve_state: bool = True,
) -> Any:
    """A call with any options; they are valid, ``function`` is not checked yet."""
    if is_dynamo_compiling():
        return in_graph(function, args, kwargs, None if _is_noop(context_fn) else context_fn)
    require_callable("function", function)
    flags = _flags(
        _stops_early(early_stop),
        preserve_rng_state,
        determinism_check,
        context_fn,
        check_rng,
        ambient,
        preserve_state,
    )
    if _C.is_traced():
        return under_tracer(
            function,
            args,
            kwargs,
            None if _is_noop(context_fn) else context_fn,
            determinism_check="none" if determinism_check == "none" else "default",
            early_stop=early_stop,
            preserve_rng_state=preserve_rng_state,
            respect_saved_tensors_hooks=respect_saved_tensors_hooks,
        )
    if use_reentrant is not False:
        return _C.run_reentrant(function, args, kwargs, flags, generators)
    contexts, session = _contexts_of(
        context_fn, respect_saved_tensors_hooks, preserve_rng_state, debug, preserve_host_rng
    )
    return _C.run_segment(function, args, kwargs, flags, contexts, session, generators)


@overload
def checkpoint(
    function: Callable[..., T],
    *args: Any,
    use_reentrant: bool | None = ...,
    context_fn: ContextFn = ...,
    determinism_check: str = ...,
    debug: bool = ...,
    early_stop: bool = ...,
    preserve_rng_state: bool = ...,
    respect_saved_tensors_hooks: bool | None = ...,
    **kwargs: Any,
) -> T: ...


@overload
def checkpoint(
    function: None = None,
    *,
    use_reentrant: bool | None = ...,
    context_fn: ContextFn = ...,
    determinism_check: str = ...,
    debug: bool = ...,
    early_stop: bool = ...,
    preserve_rng_state: bool = ...,
    respect_saved_tensors_hooks: bool | None = ...,
) -> Callable[[F], F]: ...


def checkpoint(function: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Runs ``function(*args, **kwargs)`` without keeping what its backward needs.

    Backward runs the function again (a *replay*) to get it. Gradients, outputs,
    and generator states are bit for bit those of the plain call, wherever the
    function itself is deterministic.

    Args:
        function: what to run; a function, a module, any callable. Left out,
            ``checkpoint`` returns a decorator with these options.
        *args, **kwargs: its arguments. Tensors in them, also inside of tuples,
            lists and dicts, are saved like any saved tensor: version-checked and
            seen by ``torch.autograd.graph.saved_tensors_hooks`` around the call.
        use_reentrant: False for the form with saved-tensor hooks, which supports
            every way of calling backward; True for the form that runs the
            forward without a graph. None warns and means True, as in torch.
        context_fn: returns two context managers, for the forward and for the
            replays (selective checkpointing:
            :func:`create_selective_checkpoint_contexts`). use_reentrant=False only.
        determinism_check: ``"default"`` compares shape, dtype and device of every
            recomputed tensor with the forward's, ``"none"`` only their number.
            ``"bitwise"`` (not in torch) compares their values too, by a 64-bit
            fingerprint of each, and with use_reentrant=True those of the outputs: it
            reads every saved tensor once more in forward and replay, on a CUDA device
            waiting for it.
        debug: adds the operators of forward and replay to the error of a replay
            that does not match. use_reentrant=False only; works together with
            ``context_fn`` (torch refuses that).
        early_stop: end the replay when the last tensor that backward can still
            ask for is recomputed; ignored with use_reentrant=True.
        preserve_rng_state: replay with the random numbers of the forward, and
            leave the generators as if there had been no replay. Looks after the
            default generators of the CPU and of all initialised devices,
            wherever the arguments are, and keeps only states that a replay can
            need.
        respect_saved_tensors_hooks: whether what selective checkpointing saves
            goes through the user's saved-tensor hooks; None is torch's default.

    Returns:
        What the function returns, or the decorator.

    Raises:
        TypeError, ValueError: an option or ``function`` is not what it must be.
        CheckpointError: in backward, when the replay does not match. The message
            has the position, the node that asked, the source line of the
            forward, what was expected and what was found.

    Differences from torch: keyword arguments and nested containers work in the
    reentrant form too; more in the documentation's list of limits.
    """
    if not is_dynamo_compiling():
        # The core finds the options in ``kwargs``. Were they parameters, Python would look up
        # the default of each, in every call.
        result = _run_plainly(function, args, kwargs)
        if result is not _NOT_RUN:
            return result
    return _checkpoint(function, *args, **kwargs)


def _checkpoint(
    function: Any = None,
    *args: Any,
    use_reentrant: bool | None = None,
    context_fn: ContextFn = noop_context_fn,
    determinism_check: str = "default",
    debug: bool = False,
    early_stop: bool = True,
    preserve_rng_state: bool = True,
    respect_saved_tensors_hooks: bool | None = None,
    **kwargs: Any,
) -> Any:
    """:func:`checkpoint`, called in any way, with its parameters."""
    if function is not None and is_dynamo_compiling():
        return in_graph(function, args, kwargs, None if _is_noop(context_fn) else context_fn)
    if use_reentrant is None and function is not None:
        _warn_use_reentrant("checkpoint", stacklevel=3)
    if preserve_rng_state is False and called_by_compiled_code() and not _C.is_traced():
        preserve_rng_state = True
    options = _validated(locals())
    if args or function is not None:
        return _run(function, args, kwargs, **options)
    unknown = ", ".join(kwargs)
    if unknown:
        raise ValueError(
            "checkpoint was called without a function, which makes a decorator, and with "
            f"keyword arguments that it does not know: {unknown}"
        )
    return functools.partial(_decorated, options)


def _decorated(options: dict[str, Any], function: Callable[..., Any]) -> Any:
    """What a decorator makes: of a function another one, which compilers and tracers know."""
    require_callable("function", function)
    if is_dynamo_compiling():  # which cannot make an object that has __getattr__
        return _checkpointed_function(options, (), function)
    if isinstance(function, FunctionType):
        return _checkpointed_function(options, _plain(options), function)
    return _Checkpointed(options, _plain(options), function)


def _checkpointed_function(
    options: dict[str, Any], plain: _Plain, function: Callable[..., Any]
) -> Callable[..., Any]:
    @functools.wraps(function)
    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        return _run_decorated(options, plain, function, args, kwargs)

    return checkpointed


def _run_decorated(
    options: dict[str, Any],
    plain: _Plain,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    if not is_dynamo_compiling():
        if options["use_reentrant"] is None:
            _warn_use_reentrant("checkpoint", stacklevel=3)
        if plain:
            result = _run_configured(*plain, function, args, kwargs)
            if result is not _NOT_RUN:
                return result
    return _run(function, args, kwargs, **options)


_C.set_settings(_early_stop, debug_setting, noop_context_fn)
_run_plainly = _C.run_plainly
_run_configured = _C.run_configured
_NOT_RUN = _C.NOT_RUN

checkpoint.__signature__ = inspect.signature(_checkpoint)  # type: ignore[attr-defined]
_compat.skip_frames_of(checkpoint, _checkpoint, _run)


class _Checkpointed:
    """A callable object, or a bound method, that is checkpointed whenever it is called."""

    def __init__(
        self, options: dict[str, Any], plain: _Plain, function: Callable[..., Any]
    ) -> None:
        self._options = options
        self._plain = plain
        self._function = function
        functools.update_wrapper(self, function, updated=())

    def __getattr__(self, name: str) -> Any:
        # What is not found here: attributes that other decorators gave the function, among them
        # the mark of an abstract method, but not what a protocol asks for (copy, pickle).
        if name.startswith("__") and name != "__isabstractmethod__":
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.__dict__["_function"], name)

    def __eq__(self, other: object) -> bool:
        # A method is made anew whenever it is looked up.
        if not isinstance(other, _Checkpointed):
            return NotImplemented
        if self is other:
            return True
        function = self._function
        return (
            isinstance(function, MethodType)
            and function == other._function
            and self._options is other._options
        )

    def __hash__(self) -> int:
        return hash(self._function) if isinstance(self._function, MethodType) else id(self)

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        return _run_decorated(self._options, self._plain, self._function, args, kwargs)

    def __reduce__(self) -> str | tuple[Any, ...]:
        # Where it stands in place of its function: by name, as that one would be.
        found: Any = sys.modules.get(getattr(self, "__module__", ""))
        name = getattr(self, "__qualname__", "")
        for part in name.split("."):
            found = getattr(found, part, None)
        return name if found is self else (_decorated, (self._options, self._function))

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        bind = getattr(self._function, "__get__", None)
        if instance is None or bind is None:
            return self
        bound = bind(instance, owner)
        if is_dynamo_compiling():
            return _checkpointed_function(self._options, (), bound)
        return _Checkpointed(self._options, self._plain, bound)


class Checkpointer:
    """A configured :func:`checkpoint`, for options without taking keywords from ``fn``.

    ``Checkpointer(**options)(fn, *args, **kwargs)`` passes every keyword argument
    on to ``fn``, including one that is called ``debug`` or ``early_stop``. The
    options are those of :func:`checkpoint` and are checked once, when it is made;
    options that torch does not have live here only.

    Args:
        use_reentrant: as in :func:`checkpoint`, but False by default.
        context_fn, determinism_check, debug, early_stop, preserve_rng_state,
            respect_saved_tensors_hooks: as in :func:`checkpoint`.
        generators: explicit ``torch.Generator`` objects that the function draws
            from, in addition to those that are found: in its arguments, closure,
            defaults and the globals it names, and in the attributes of the module
            or object that it belongs to. Name the ones that only functions called
            by it can reach.
        preserve_host_rng: also replay Python's ``random`` and, if NumPy is imported,
            its global generator. use_reentrant=False only. Costs tens of
            microseconds per segment, for those states are Python objects.
        check_rng: whether a replay that leaves a generator elsewhere than the
            forward did is an error. Turn it off where other threads draw from the
            default generators while backward runs. determinism_check="none" turns
            it off as well.
        ambient: what a replay does about what besides its arguments decides what the
            function computes: autocast, modes, default dtype and device, context
            variables, and torch's settings of SDPA, deterministic algorithms,
            float32 precision, cuDNN, mkldnn and BLAS. ``"restore"`` puts the
            forward's in force for as long as the replay runs. ``"check"`` does so
            too, and raises if a setting that no context manager ends (default dtype
            and device, torch's settings) is another one when the replay begins.
            ``"ignore"`` replays with what is there.
        preserve_state: give what the function changes by itself, the values that the
            forward began with for the replay and those it has now after it: buffers
            of its modules (so that a BatchNorm counts a batch once), small tensors
            that it closes over. Modules are in training or evaluation as in the
            forward. A parameter, or a tensor that the function closes over, that was
            changed in place since the forward is an error that names it.

    Raises:
        TypeError, ValueError: as in :func:`checkpoint`.
    """

    def __init__(
        self,
        *,
        use_reentrant: bool = False,
        context_fn: ContextFn = noop_context_fn,
        determinism_check: str = "default",
        debug: bool = False,
        early_stop: bool = True,
        preserve_rng_state: bool = True,
        respect_saved_tensors_hooks: bool | None = None,
        generators: Iterable[torch.Generator] = (),
        preserve_host_rng: bool = False,
        check_rng: bool = True,
        ambient: str = "restore",
        preserve_state: bool = True,
    ) -> None:
        require_bool("use_reentrant", use_reentrant)
        require_bool("preserve_host_rng", preserve_host_rng)
        require_bool("check_rng", check_rng)
        require_bool("preserve_state", preserve_state)
        if ambient not in tuple(AMBIENT_POLICIES):
            raise ValueError(f"ambient must be one of {tuple(AMBIENT_POLICIES)}, got {ambient!r}")
        generators = require_generators("generators", generators)
        if generators and not preserve_rng_state:
            raise ValueError(
                "generators are replayed with preserve_rng_state=True alone; leave one of them out"
            )
        if preserve_host_rng and use_reentrant:
            raise ValueError("preserve_host_rng can only be used with use_reentrant=False")
        self._options: dict[str, Any] = {
            **_validated(locals()),
            "generators": generators or None,
            "preserve_host_rng": preserve_host_rng,
            "check_rng": check_rng,
            "ambient": ambient,
            "preserve_state": preserve_state,
        }
        self._plain = _plain(self._options)

    def __call__(self, function: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
        if self._plain and not is_dynamo_compiling():
            result = _run_configured(*self._plain, function, args, kwargs)
            if result is not _NOT_RUN:
                return result  # type: ignore[no-any-return]
        return _run(function, args, kwargs, **self._options)  # type: ignore[no-any-return]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_plain"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._plain = _plain(self._options)

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self._options.items())
        return f"Checkpointer({options})"


class CheckpointFunction:
    """The reentrant form under torch's name: ``apply(run_function, preserve, *args)``.

    In torch this is an ``autograd.Function``; here it is a name for
    ``checkpoint(run_function, *args, use_reentrant=True)``, whose node is in C++.
    """

    @staticmethod
    def apply(run_function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        require_callable("run_function", run_function)
        require_bool("preserve_rng_state", preserve_rng_state)
        flags = _flags(True, preserve_rng_state, "default")
        return _C.run_reentrant(run_function, args, {}, flags, None)


class GraphExecGroup(torch_checkpoint.GraphExecGroup):
    """Backward calls inside of one group share the replays of segments.

    Pipeline schedules split backward into one call for the inputs' gradients and
    one for the weights'. Inside ``with GraphExecGroup():`` a segment is replayed
    once for both, and its tensors are kept until the graph lets go of them or the
    group ends. Calls whose regions overlap are allowed (torch raises).
    """

    def __exit__(self, *args: object) -> None:
        super().__exit__(*args)
        _C.end_group(self)


def detach_variable(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The tensors of a tuple detached, each with the ``requires_grad`` it had.

    Raises:
        RuntimeError: ``inputs`` is not a tuple (torch's choice of type).
    """
    if not isinstance(inputs, tuple):
        raise RuntimeError(
            f"detach_variable takes a tuple of tensors and other values, got "
            f"{type(inputs).__name__}"
        )
    return tuple(
        item.detach().requires_grad_(item.requires_grad) if isinstance(item, torch.Tensor) else item
        for item in inputs
    )


def check_backward_validity(inputs: Iterable[Any]) -> None:
    """Warns if none of the tensors among ``inputs`` requires grad."""
    if not any(isinstance(item, torch.Tensor) and item.requires_grad for item in inputs):
        warnings.warn(
            "None of the inputs have requires_grad=True, so no gradient reaches them",
            UserWarning,
            stacklevel=2,
        )
