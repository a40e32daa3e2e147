"""`bsl-train` from a clone: `python scripts/train.py`."""

from lightning_bsl.app.train import main

if __name__ == "__main__":
    main()
