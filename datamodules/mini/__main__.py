"""`python -m datamodules.mini`: write the mini world's shards and dreambooth-mini."""

from jsonargparse import auto_cli

from datamodules.mini.export import export

if __name__ == "__main__":
    auto_cli(export, as_positional=False)
