"""`python -m qcft`."""

from qcft.cli import main

if __name__ == "__main__":
    main()
