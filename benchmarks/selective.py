"""What selective checkpointing costs: see ``torch_reprise._bench.selective``."""

from torch_reprise._bench.selective import main

if __name__ == "__main__":
    raise SystemExit(main())
