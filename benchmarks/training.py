"""Step time and memory of GPTs beside torch: see ``torch_reprise._bench.training``."""

from torch_reprise._bench.training import main

if __name__ == "__main__":
    raise SystemExit(main())
