"""Bookkeeping of checkpointing beside torch: see ``torch_reprise._bench.overhead``."""

from torch_reprise._bench.overhead import main

if __name__ == "__main__":
    raise SystemExit(main())
