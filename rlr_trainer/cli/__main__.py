"""`python -m rlr_trainer.cli`, and so `accelerate launch -m rlr_trainer.cli train ...`."""

import sys

from rlr_trainer.cli import main

sys.exit(main())
