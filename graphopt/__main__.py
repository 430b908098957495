"""``python -m graphopt``: the command line."""

from graphopt.cli import run

if __name__ == "__main__":
    run()
