"""torch-reprise: a compiled runtime for activation checkpointing in PyTorch.

The names of ``torch.utils.checkpoint``, with the same meaning: change the import
and nothing else. ``torch_reprise.ledger`` tells what segments do.
"""

import torch as _torch

from . import _handshake
from ._build_info import INFO as _INFO

# Before the extension is loaded: see _handshake.
_handshake.check(_INFO, _torch.__version__, _torch.version.cuda, _handshake.running_python_tag())

from torch.utils.checkpoint import (  # noqa: E402
    SAC_IGNORED_OPS,
    CheckpointPolicy,
    SelectiveCheckpointContext,
    create_selective_checkpoint_contexts,
)

from . import _C, _compat, _tracing, ledger, rng  # noqa: E402
from ._errors import CheckpointError  # noqa: E402
from ._install import install, installed, is_installed, uninstall  # noqa: E402
from .checkpoint import (  # noqa: E402
    Checkpointer,
    CheckpointFunction,
    GraphExecGroup,
    check_backward_validity,
    checkpoint,
    detach_variable,
    is_recomputing,
    noop_context_fn,
    set_checkpoint_early_stop,
)
from .debug import set_checkpoint_debug_enabled  # noqa: E402
from .rng import DefaultDeviceType, get_device_states, set_device_states  # noqa: E402
from .sequential import checkpoint_sequential  # noqa: E402

_C.set_checkpoint_error(CheckpointError)
_compat.allow_transforms_inside()
_C.set_group_type(GraphExecGroup)
_C.set_unpack_for_dynamo(_tracing.unpack_outside_graph)
# Lines of these files are not what a user looks for in an error message.
_C.set_internal_paths([_compat.torch_directory(), *_compat.own_files()])

__version__ = _INFO.version

# fmt: off
__all__ = [  # noqa: RUF022, a line for each topic
    "checkpoint", "Checkpointer", "checkpoint_sequential", "CheckpointFunction", "GraphExecGroup",
    "CheckpointError", "set_checkpoint_debug_enabled", "set_checkpoint_early_stop",
    "is_recomputing",
    "install", "uninstall", "installed", "is_installed",
    "ledger",
    "rng", "get_device_states", "set_device_states", "DefaultDeviceType",
    "noop_context_fn", "check_backward_validity", "detach_variable",
    # torch's own
    "create_selective_checkpoint_contexts", "CheckpointPolicy", "SelectiveCheckpointContext",
    "SAC_IGNORED_OPS",
]
# fmt: on
