"""``python -m ringspan`` is the command ``ringspan``."""

from ringspan.cli import main

if __name__ == "__main__":
    main()
