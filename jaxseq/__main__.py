"""`python -m jaxseq` is the command `jaxseq`."""

import sys

from jaxseq.cli import main

sys.exit(main())
