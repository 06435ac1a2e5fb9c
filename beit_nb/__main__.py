"""`python -m beit_nb` (and so `torchrun -m beit_nb`) is the command `beit`.

Written by hand: a notebook cannot export a module of this name.
"""

import sys

from beit_nb.cli import main

if __name__ == "__main__":
    sys.exit(main())
