"""`bsl-plan` from a clone: `python scripts/plan.py`."""

from lightning_bsl.app.plan import main

if __name__ == "__main__":
    main()
