"""The same as `ptq quantize`, from a checkout: tools/quantize.py --plugin NAME [--recipe …] …"""

import sys

from ptqcore.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "quantize")
    main()
