"`python -m fuselip_edu` is the command `fuselip-edu`."
import sys

from fuselip_edu.cli import main

sys.exit(main())
