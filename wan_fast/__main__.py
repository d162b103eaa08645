import sys

from wan_fast.cli import main

sys.exit(main())
