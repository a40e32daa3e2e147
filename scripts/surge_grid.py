"""`bsl-surge-grid` from a clone: `python scripts/surge_grid.py`."""

from lightning_bsl.app.surge_grid import main

if __name__ == "__main__":
    main()
