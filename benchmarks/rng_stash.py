"""What replaying random numbers costs beside torch: see ``torch_reprise._bench.rng``."""

from torch_reprise._bench.rng import main

if __name__ == "__main__":
    raise SystemExit(main())
