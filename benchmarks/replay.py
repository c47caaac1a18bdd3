"""What it costs that a replay is the forward again: see ``torch_reprise._bench.replay``."""

from torch_reprise._bench.replay import main

if __name__ == "__main__":
    raise SystemExit(main())
