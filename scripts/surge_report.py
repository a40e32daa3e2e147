"""`bsl-surge-report` from a clone: `python scripts/surge_report.py`."""

from lightning_bsl.app.surge_report import main

if __name__ == "__main__":
    main()
