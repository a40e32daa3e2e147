"""``python -m lightning_bsl`` lists the commands."""

from lightning_bsl.app.commands import overview

if __name__ == "__main__":
    print(overview())
