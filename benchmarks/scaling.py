"""Growth of the cost of checkpointing beside torch: see ``torch_reprise._bench.scaling``."""

from torch_reprise._bench.scaling import main

if __name__ == "__main__":
    raise SystemExit(main())
