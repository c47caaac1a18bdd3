"""What checkpointing keeps in memory beside torch: see ``torch_reprise._bench.memory``."""

from torch_reprise._bench.memory import main

if __name__ == "__main__":
    raise SystemExit(main())
