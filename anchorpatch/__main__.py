"""``python -m anchorpatch``: the command line, as ``torchrun -m anchorpatch`` needs it."""

from anchorpatch.cli.main import main

if __name__ == "__main__":
    main()
