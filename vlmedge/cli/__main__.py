"""`python -m vlmedge.cli` is the command `vlmedge`."""

from vlmedge.cli.app import main

if __name__ == "__main__":
    main()
