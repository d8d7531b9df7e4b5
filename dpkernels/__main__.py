"""``python -m dpkernels``: the command line of the package."""

from dpkernels.cli import app

if __name__ == "__main__":
    app(prog_name="dpkernels")
