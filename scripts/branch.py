"""`bsl-branch` from a clone: `python scripts/branch.py`."""

from lightning_bsl.app.branch import main

if __name__ == "__main__":
    main()
