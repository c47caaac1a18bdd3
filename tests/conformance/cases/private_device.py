"""R8: a device that torch knows nothing of; it is registered for good, so in another process."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import environment
from ..implementations import Implementation
from ..registry import Needs, case


def _on_a_private_device(kind: str, about: str) -> None:
    @case(
        "R8",
        f"dropout on a device that is not shaped as CUDA is, {about}",
        issues=(127676,),
        needs=Needs.PRIVATE_DEVICE,
        fresh_process=True,
    )
    def program(use: Implementation) -> Any:
        testdev = environment.private_device(kind)
        testdev.seed_devices()

        def fn(x: Tensor) -> Tensor:
            use.tick()
            return testdev.draws(x)  # type: ignore[no-any-return]

        x = testdev.leaf_on("testdev:1", 16)
        out = use.checkpoint(fn, x)
        between = torch.rand(3, device="testdev:1")
        out.sum().backward()
        return testdev.to_host([out, x.grad, between]), testdev.states()


_on_a_private_device("opaque", "opaque generator")
_on_a_private_device("philox", "Philox generator")
