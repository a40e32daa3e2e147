"""`bsl-report` from a clone: `python scripts/report.py`."""

from lightning_bsl.app.report import main

if __name__ == "__main__":
    main()
