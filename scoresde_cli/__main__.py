import sys

from scoresde_cli.cli import main

sys.exit(main())
