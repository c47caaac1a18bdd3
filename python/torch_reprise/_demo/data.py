"""English text that needs no download: the help topics that CPython carries.

``pydoc_data.topics`` is the language reference as ``help("for")`` prints it, several hundred
kilobytes of prose and code. It differs a little between Python versions; nothing here depends on
its exact content.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Corpus:
    """A text as character numbers.

    Attributes:
        tokens: int64, shape (characters,); entry i is the place of character i in ``alphabet``.
        alphabet: every character of the text once, sorted.
    """

    tokens: Tensor
    alphabet: str

    def batches(
        self, count: int, batch: int, context: int, seed: int
    ) -> list[tuple[Tensor, Tensor]]:
        """Draws ``count`` pairs (inputs, targets), each int64 of shape (batch, context).

        Drawn from a generator of its own, so that every training run sees the same ones and none
        of the numbers that dropout draws are used up.
        """
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(
            len(self.tokens) - context, (count, batch, 1), generator=generator, dtype=torch.int64
        )
        windows = self.tokens[starts + torch.arange(context + 1)]
        return [(window[:, :-1], window[:, 1:]) for window in windows]


def load() -> Corpus:
    """The help topics of the running Python.

    Raises:
        RuntimeError: this Python was installed without them.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise RuntimeError(
            "the demo trains on Python's own help topics, and this Python was installed without "
            "the module pydoc_data.topics: use a complete CPython (on some distributions the help "
            "topics are in a package of their own)"
        ) from None
    text = "\n".join(topics[name] for name in sorted(topics))
    alphabet = "".join(sorted(set(text)))
    place = {character: number for number, character in enumerate(alphabet)}
    return Corpus(torch.tensor([place[character] for character in text]), alphabet)
