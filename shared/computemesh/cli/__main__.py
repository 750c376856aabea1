"""``python -m computemesh.cli``"""

from computemesh.cli import main

if __name__ == "__main__":
    main()
