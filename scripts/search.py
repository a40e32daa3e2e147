"""`bsl-search` from a clone: `python scripts/search.py`."""

from lightning_bsl.app.search import main

if __name__ == "__main__":
    main()
