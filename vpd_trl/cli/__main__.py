"""`python -m vpd_trl.cli`, and so `accelerate launch -m vpd_trl.cli train …`."""

import sys

from .main import main


sys.exit(main())
