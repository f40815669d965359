"""`python -m jaxood.bench`."""

import sys

from jaxood.bench import main

if __name__ == '__main__':
    sys.exit(main())
