"""`python -m loragen_agents` does what `loragen-agents` does."""

import sys

from loragen_agents.cli import main

sys.exit(main())
