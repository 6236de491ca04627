"""Copy the directory SOURCE to TARGET."""

import shutil
import sys

shutil.copytree(sys.argv[1], sys.argv[2])
