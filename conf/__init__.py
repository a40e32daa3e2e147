"""The configuration groups. A Hydra application uses them with ``hydra.searchpath: [pkg://lightning_bsl.conf]``."""
