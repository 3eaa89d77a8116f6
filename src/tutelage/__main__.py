"""`python -m tutelage`, also what `accelerate launch -m tutelage` runs."""

import sys

from tutelage.cli import main

sys.exit(main())
