"""``python -m kd_lightning``: the command line interface."""

from kd_lightning.cli import main

if __name__ == "__main__":
    main()
